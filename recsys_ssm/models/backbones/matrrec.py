"""MaTrRec: Mamba, then causal self-attention, in each layer (Zhang et al. 2024, arXiv 2407.19239).

    x = norm(x + drop(mamba(x)));  x = norm(x + drop(attention(x)));  x = norm(x + drop(ffn(x)))

Mamba carries the long past, attention the short histories. Both see earlier tokens alone, so every position may be
trained, although the public code trains the last position of each prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from recsys_ssm.models.backbones.attention import CausalAttention, attention_mask
from recsys_ssm.models.backbones.base import Backbone, Init, Layer, Mixer, reinitialise
from recsys_ssm.models.backbones.mamba import MambaBlock


class MaTrRec(Backbone):
    """Layers of a Mamba block, causal attention and a feed-forward network, each with a residual sum and LayerNorm.

    The defaults are the published layer: 88,896 parameters, 89,024 with the LayerNorm of the item embeddings, which
    belongs to the tokenizer. Its rates of dropout are .2 on ML-1M and .4 on the Amazon datasets.

    Args:
        d_model: D.
        n_layers: Number of layers, each of one Mamba block and one attention.
        d_state, d_conv, expand, dt_rank: As in :class:`~recsys_ssm.models.backbones.mamba.MambaBlock`.
        nhead: Number of attention heads.
        ffn: Width of the feed-forward network as a multiple of D.
        dropout: Dropout rate of the outputs of Mamba, attention and network.
        attention_dropout: Dropout rate of the attention weights; None: ``dropout``.
        norm_eps, init, init_std: As in :class:`~recsys_ssm.models.backbones.base.Stack`.

    Raises:
        ValueError: ``d_model`` is not a multiple of ``nhead``, or ``n_layers`` or ``ffn`` is below 1.

    Example:
        >>> import torch
        >>> from recsys_ssm import MaTrRec
        >>> backbone = MaTrRec(d_model=8, d_state=4)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, state = backbone.step(torch.randn(2, 8), backbone.init_state(batch_size=2))
        >>> output.shape
        torch.Size([2, 8])
    """

    causal = True
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-MaTrRec", "next_item": "MaTrRec"}
    style: ClassVar[Mapping[str, str]] = {"color": "#56b4e9", "linestyle": "-", "marker": "h"}

    def __init__(
        self,
        *,
        d_model: int = 64,
        n_layers: int = 1,
        d_state: int = 32,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        nhead: int = 1,
        ffn: int = 4,
        dropout: float = 0.2,
        attention_dropout: float | None = None,
        norm_eps: float = 1e-12,
        init: Init = "normal",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        for option, value in (("n_layers", n_layers), ("ffn", ffn)):
            if value < 1:
                raise ValueError(f"{option}={value}: a layer needs it; give at least 1")
        self.d_model = d_model

        def layer(mixer: Mixer, ffn: int) -> Layer:
            return Layer(
                mixer,
                d_model,
                norm="post",
                norm_eps=norm_eps,
                residual=True,
                gated=False,
                ffn=ffn,
                ffn_activation="gelu",
                dropout=dropout,
            )

        self.layers = nn.ModuleList()
        for _ in range(n_layers):
            mamba = MambaBlock(
                d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank
            )
            attention = CausalAttention(
                d_model=d_model,
                nhead=nhead,
                dropout=dropout if attention_dropout is None else attention_dropout,
            )
            after = layer(attention, ffn)
            assert after.ffn is not None
            after.ffn.dropout.p = (
                0.0  # RecBole's Transformer layer drops the network's output alone
            )
            self.layers.extend((layer(mamba, 0), after))
        reinitialise(self, init, init_std)

    def forward(
        self, tokens: Tensor, seq_idx: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        contexts = (seq_idx, attention_mask(tokens, seq_idx, causal=True))
        last = len(self.layers) - 1
        for i, layer in enumerate(self._layers()):
            tokens = layer(tokens, contexts[i % 2], at if i == last else None)
        return tokens

    def init_state(self, batch_size: int) -> list[Any]:
        """Return the state of each sublayer before the first token, as :meth:`Backbone.init_state` does."""
        return [layer.init_state(batch_size) for layer in self._layers()]

    def step(self, token: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Advance by one token, as :meth:`Backbone.step` does; the time of a call grows with the tokens before."""
        states = []
        for layer, layer_state in zip(self._layers(), state, strict=True):
            token, layer_state = layer.step(token, layer_state)
            states.append(layer_state)
        return token, states

    def _layers(self) -> Iterator[Layer]:
        return iter(cast(Iterable[Layer], self.layers))
