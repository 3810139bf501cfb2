"""LiGR: a pre-norm Transformer whose residual sums are gated (Borisyuk et al. 2025, arXiv 2502.03417)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from recsys_ssm.models.backbones.attention import CausalAttention, attention_mask
from recsys_ssm.models.backbones.base import Init, Stack


class Ligr(Stack):
    """Causal attention in a :class:`Stack`; the defaults are eSASRec's layers (arXiv 2508.06450), as in RecTools.

    ``x = x + sigmoid(W x + b) * drop(attention(norm(x)))``, then the same sum around a SwiGLU network of width 4·D.

    RecTools' ``LiGRLayers`` end without a norm, so ``final_norm`` is off.

    Args:
        d_model: D.
        n_layers: Number of layers.
        nhead: Number of attention heads.
        dropout: Dropout rate of the attention weights and, as in :class:`Stack`, of the sublayers.
        norm, residual, gated, ffn, ffn_activation, final_norm, init, stack: Options of :class:`Stack`.

    Raises:
        ValueError: ``d_model`` is not a multiple of ``nhead``, or as :class:`Stack`.

    Example:
        >>> import torch
        >>> from recsys_ssm import Ligr
        >>> backbone = Ligr(d_model=8, n_layers=1, nhead=2)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, state = backbone.step(torch.randn(2, 8), backbone.init_state(batch_size=2))
        >>> output.shape
        torch.Size([2, 8])
    """

    causal = True
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-LiGR", "next_item": "eSASRec"}
    style: ClassVar[Mapping[str, str]] = {"color": "#cc79a7", "linestyle": "--", "marker": "v"}

    def __init__(
        self,
        *,
        d_model: int = 64,
        n_layers: int = 1,
        nhead: int = 1,
        dropout: float = 0.2,
        norm: Literal["post", "pre", "none"] = "pre",
        residual: bool = True,
        gated: bool = True,
        ffn: int = 4,
        ffn_activation: Literal["gelu", "swiglu"] = "swiglu",
        final_norm: bool = False,
        init: Init = "xavier",
        **stack: Any,
    ) -> None:
        super().__init__(
            *(
                CausalAttention(d_model=d_model, nhead=nhead, dropout=dropout)
                for _ in range(n_layers)
            ),
            d_model=d_model,
            dropout=dropout,
            norm=norm,
            residual=residual,
            gated=gated,
            ffn=ffn,
            ffn_activation=ffn_activation,
            final_norm=final_norm,
            init=init,
            **stack,
        )

    def context(self, tokens: Tensor, seq_idx: Tensor | None) -> Tensor | None:
        """Return the attention mask that all layers share."""
        return attention_mask(tokens, seq_idx, causal=True)
