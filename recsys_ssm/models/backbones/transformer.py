"""Transformer encoder: the embedder of FT-Transformer and, if causal, that of SASRec."""

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
    """Encoder layers of Vaswani et al. 2017 with the parameters of ``nn.TransformerEncoderLayer``.

    The defaults are the published FT-Transformer tower: 2 layers, 2 heads, no dropout, feed-forward width 2048, norm
    after each sum, every token sees every other; 1,186,048 parameters at d_model 128.

    SASRec (Kang and McAuley 2018, arXiv 1808.09781) as RecBole builds it: d_model 64, ``dim_feedforward=256``,
    ``activation=gelu``, ``causal=true``, ``inner_dropout=0``, ``norm_eps=1e-12``, ``init=normal``; 99,968 parameters,
    100,096 with the LayerNorm of the item embeddings, which belongs to the tokenizer.

    Args:
        d_model: D.
        n_layers: Number of layers.
        nhead: Number of attention heads.
        dim_feedforward: Inner width of the feed-forward network.
        dropout: Dropout rate of the outputs of attention and network.
        attention_dropout: Dropout rate of the attention weights; None: ``dropout``.
        inner_dropout: Dropout rate within the network; None: ``dropout``.
        activation: Activation of the network.
        norm_first: Put LayerNorm before attention and network, and once more at the end, rather than after each sum.
        norm_eps: Number that LayerNorm adds to the variance.
        causal: Hide later tokens from each token.
        init, init_std: As in :class:`~recsys_ssm.models.backbones.base.Stack`.

    Raises:
        ValueError: ``d_model`` is not a multiple of ``nhead``, or ``n_layers`` is below 1.

    Example:
        >>> import torch
        >>> from recsys_ssm import Transformer
        >>> backbone = Transformer(d_model=8, n_layers=1, dim_feedforward=16, causal=True)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, state = backbone.step(torch.randn(2, 8), backbone.init_state(batch_size=2))
        >>> output.shape
        torch.Size([2, 8])
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
            raise ValueError(
                f"d_model={d_model} is not a multiple of nhead={nhead}; change one of them"
            )
        if n_layers < 1:
            raise ValueError(f"n_layers={n_layers}: an encoder needs a layer; give at least 1")
        self.d_model, self.norm_first, self.causal = d_model, norm_first, causal
        # NOTE[DIFF] nn.TransformerEncoder copies its first layer, so its layers start equal; here each is drawn anew.
        # NOTE[DIFF] The SASRec of the paper normalises queries alone and has a ReLU network of width D; with the
        # options named above this is RecBole's, a post-norm encoder.
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
        """Return an empty cache of keys and values for each layer; needs ``causal``."""
        if not self.causal:
            return super().init_state(batch_size)
        return [no_tokens(layer.self_attn, batch_size) for layer in self._layers()]

    def step(
        self, token: Tensor, state: list[AttentionState]
    ) -> tuple[Tensor, list[AttentionState]]:
        """Advance by one token, as :meth:`Backbone.step` does; the time of a call grows with the tokens before."""
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
        """Apply all that follows attention, which turned the layer's input x into y; each token by itself."""
        x = x + self._drop(layer.dropout1, y)
        if not self.norm_first:
            x = layer.norm1(x)
        inner = layer.linear1(layer.norm2(x) if self.norm_first else x)
        inner = self._drop(layer.dropout, layer.activation(inner))
        x = x + self._drop(layer.dropout2, layer.linear2(inner))
        return x if self.norm_first else layer.norm2(x)

    def _drop(self, rate: nn.Dropout, x: Tensor) -> Tensor:
        return dropout(x, rate.p, training=self.training)
