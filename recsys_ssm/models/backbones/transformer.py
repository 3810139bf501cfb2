"""Transformer encoder: the FT-Transformer's embedder and, causal, SASRec's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from recsys_ssm.models.backbones.attention import (
    AttentionState,
    attend,
    attend_step,
    attention_mask,
    no_tokens,
)
from recsys_ssm.models.backbones.base import Backbone, Init, pick, reinitialise
from recsys_ssm.ops.dropout import dropout


class Transformer(Backbone):
    """``n_layers`` of the encoder layer of Vaswani et al. 2017, its parameters those of ``nn.TransformerEncoderLayer``.

    The published FT-Transformer tower is the default: 2 layers, 2 heads, no dropout, feed-forward 2048,
    normalisation after, every token seeing every other; 1,186,048 parameters at d_model 128.

    SASRec (Kang and McAuley 2018, arXiv 1808.09781) as RecBole has it: d_model 64, ``dim_feedforward=256``,
    ``activation=gelu``, ``causal=true``, ``inner_dropout=0``, ``norm_eps=1e-12``, ``init=normal``; 99,968 parameters,
    100,096 with the LayerNorm of the item embeddings, which is the tokenizer's.

    Args:
        d_model: D.
        n_layers: How many.
        nhead: Attention heads.
        dim_feedforward: Inner width of the feed-forward network.
        dropout: Of the output of attention and of the network.
        attention_dropout: Of the attention weights; none: ``dropout``.
        inner_dropout: Within the network; none: ``dropout``.
        activation: Of the network.
        norm_first: LayerNorm before attention and network, and once more at the end, in place of after each sum.
        norm_eps: What LayerNorm adds to the variance.
        causal: Whether a token sees no later one.
        init, init_std: As :class:`~recsys_ssm.models.backbones.base.Stack`.

    Raises:
        ValueError: ``d_model`` is no multiple of ``nhead``, or there is no layer.
    """

    causal = False
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-Transformer", "next_item": "SASRec"}
    style: ClassVar[Mapping[str, str]] = {"color": "#d55e00", "linestyle": "--", "marker": "s"}

    def __init__(
        self,
        *,
        d_model: int = 128,
        n_layers: int = 2,
        nhead: int = 2,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        inner_dropout: float | None = None,
        activation: Literal["relu", "gelu"] = "relu",
        norm_first: bool = False,
        norm_eps: float = 1e-5,
        causal: bool = False,
        init: Init = "own",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"d_model={d_model} is no multiple of nhead={nhead}")
        if n_layers < 1:
            raise ValueError(f"n_layers={n_layers}: an encoder needs a layer")
        self.d_model, self.norm_first, self.causal = d_model, norm_first, causal
        # One by one, not nn.TransformerEncoder: that copies its first layer, so that all start out equal.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d_model,
                nhead,
                dim_feedforward,
                dropout,
                activation,
                layer_norm_eps=norm_eps,
                batch_first=True,
                norm_first=norm_first,
            )
            for _ in range(n_layers)
        )
        for layer in self._layers():
            layer.self_attn.dropout = dropout if attention_dropout is None else attention_dropout
            layer.dropout.p = dropout if inner_dropout is None else inner_dropout
        self.final_norm = nn.LayerNorm(d_model, eps=norm_eps) if norm_first else nn.Identity()
        reinitialise(self, init, init_std)

    def forward(
        self, tokens: Tensor, seq_idx: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        mask = attention_mask(tokens, seq_idx, self.causal)
        *earlier, last = self._layers()
        for layer in earlier:
            tokens = self._after(layer, tokens, self._attend(layer, tokens, mask))
        y = self._attend(last, tokens, mask)
        return self.final_norm(self._after(last, pick(tokens, at), pick(y, at)))

    def init_state(self, batch_size: int) -> list[AttentionState]:
        if not self.causal:
            return super().init_state(batch_size)
        return [no_tokens(layer.self_attn, batch_size) for layer in self._layers()]

    def step(
        self, token: Tensor, state: list[AttentionState]
    ) -> tuple[Tensor, list[AttentionState]]:
        """As :meth:`Backbone.step`, in time that grows with the number of tokens before."""
        states = []
        for layer, seen in zip(self._layers(), state, strict=True):
            y, seen = attend_step(
                layer.self_attn, layer.norm1(token) if self.norm_first else token, seen
            )
            token = self._after(layer, token, y)
            states.append(seen)
        return self.final_norm(token), states

    def _layers(self) -> Iterator[nn.TransformerEncoderLayer]:
        return iter(cast(Iterable[nn.TransformerEncoderLayer], self.layers))

    def _attend(
        self, layer: nn.TransformerEncoderLayer, x_BLD: Tensor, mask: Tensor | None
    ) -> Tensor:
        return attend(layer.self_attn, layer.norm1(x_BLD) if self.norm_first else x_BLD, mask)

    def _after(self, layer: nn.TransformerEncoderLayer, x: Tensor, y: Tensor) -> Tensor:
        """All that comes after attention, which turned the layer's input x into y; each token by itself."""
        x = x + self._drop(layer.dropout1, y)
        if not self.norm_first:
            x = layer.norm1(x)
        inner = layer.linear1(layer.norm2(x) if self.norm_first else x)
        inner = self._drop(layer.dropout, layer.activation(inner))
        x = x + self._drop(layer.dropout2, layer.linear2(inner))
        return x if self.norm_first else layer.norm2(x)

    def _drop(self, rate: nn.Dropout, x: Tensor) -> Tensor:
        return dropout(x, rate.p, training=self.training)
