"""Transformer encoder: the FT-Transformer's embedder.

Legend: B rows, L tokens, D = d_model, H heads.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from recsys_ssm.models.backbones.base import Backbone


class Transformer(Backbone):
    """``n_layers`` of PyTorch's ``TransformerEncoderLayer`` (Vaswani et al. 2017), every token seeing every other.

    The published FT-Transformer tower is the default: 2 layers, 2 heads, no dropout, feed-forward 2048,
    normalisation after; 1,186,048 parameters at d_model 128.

    Raises:
        ValueError: ``d_model`` is no multiple of ``nhead``.
    """

    causal: ClassVar[bool] = False

    def __init__(
        self,
        *,
        d_model: int = 128,
        n_layers: int = 2,
        nhead: int = 2,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        activation: Literal["relu", "gelu"] = "relu",
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"d_model={d_model} is no multiple of nhead={nhead}")
        self.d_model, self.nhead = d_model, nhead
        # One by one, not nn.TransformerEncoder: that copies its first layer, so that all start out equal.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d_model,
                nhead,
                dim_feedforward,
                dropout,
                activation,
                batch_first=True,
                norm_first=norm_first,
            )
            for _ in range(n_layers)
        )
        self.final_norm = nn.LayerNorm(d_model) if norm_first else nn.Identity()

    def forward(self, tokens: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        mask = None if seq_idx is None else self._mask(seq_idx)
        for layer in self.layers:
            tokens = layer(tokens, src_mask=mask)
        return self.final_norm(tokens)

    def _mask(self, seq_idx: Tensor) -> Tensor:
        """(B·H, L, L), True where a token may not look; padding sees its kind, so no row of the softmax is empty."""
        apart_BLL = seq_idx.unsqueeze(2) != seq_idx.unsqueeze(1)
        return apart_BLL.repeat_interleave(self.nhead, dim=0)
