"""The contract of a backbone, and the stack of layers most of them are."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Parameters of a recurrence stay in float32 (or float64) whatever the precision of the rest."""
    return x if x.dtype == torch.float64 else x.float()


class Backbone(nn.Module, abc.ABC):
    """Tokens in, tokens of the same shape out.

    A new architecture is one file here with a subclass, and one file in ``conf/backbone``.
    """

    causal: ClassVar[bool]
    """Whether an output depends on no later token. Only such a backbone may be trained at every position."""
    pooling: ClassVar[Literal["last", "mean"]] = "last"
    """Which output stands for the whole row: the last token's, or the mean where tokens are not mixed."""

    d_model: int

    @abc.abstractmethod
    def forward(self, tokens: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Mix the tokens of each row.

        Args:
            tokens: (B, L, D).
            seq_idx: (B, L) integers: -1 is padding, any other number names the packed sequence a position belongs
                to. Positions of different sequences do not see each other. None: each row is one sequence.

        Returns:
            (B, L, D); what stands at padding is unspecified.
        """


class Mixer(nn.Module, abc.ABC):
    """What a layer of a :class:`Stack` mixes tokens with: a Mamba block, say."""

    @abc.abstractmethod
    def forward(self, x_BLD: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """As :meth:`Backbone.forward`."""

    def init_state(self, batch_size: int) -> Any:
        """The state before the first token of ``batch_size`` sequences, on the parameters' device."""
        raise NotImplementedError(
            f"{type(self).__name__} sees the whole row: it cannot go step by step"
        )

    def step(self, x_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token further: (B, D) and the state to (B, D) and the next state; the given one is not changed."""
        raise NotImplementedError(
            f"{type(self).__name__} sees the whole row: it cannot go step by step"
        )


class Layer(nn.Module):
    """A mixer with normalisation, dropout and, if asked for, a residual connection around it."""

    def __init__(
        self,
        mixer: Mixer,
        d_model: int,
        *,
        norm: Literal["post", "pre", "none"],
        residual: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = nn.Identity() if norm == "none" else nn.LayerNorm(d_model)
        self.norm_first = norm == "pre"
        self.residual = residual
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        return self._after(x_BLD, self.mixer(self._before(x_BLD), seq_idx))

    def init_state(self, batch_size: int) -> Any:
        return self.mixer.init_state(batch_size)

    def step(self, x_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        y_BD, state = self.mixer.step(self._before(x_BD), state)
        return self._after(x_BD, y_BD), state

    def _before(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.norm_first else x

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.dropout(y)
        if self.residual:
            y = x + y
        return y if self.norm_first else self.norm(y)


class Stack(Backbone):
    """Layers one after the other.

    Args:
        mixers: One a layer.
        d_model: D.
        norm: ``post``: LayerNorm after the mixer (and the residual sum), as in FT-Mamba; ``pre``: before it, and once
            more at the end; ``none``.
        residual: Add a layer's input to its mixer's output.
        dropout: On each mixer's output.
    """

    def __init__(
        self,
        mixers: Sequence[Mixer],
        *,
        d_model: int,
        norm: Literal["post", "pre", "none"] = "post",
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in ("post", "pre", "none"):
            raise ValueError(f"norm={norm!r}: expected 'post', 'pre' or 'none'")
        self.d_model = d_model
        self.layers = nn.ModuleList(
            Layer(mixer, d_model, norm=norm, residual=residual, dropout=dropout) for mixer in mixers
        )
        self.final_norm = nn.LayerNorm(d_model) if norm == "pre" else nn.Identity()

    def forward(self, tokens: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, seq_idx)
        return self.final_norm(tokens)

    def _layers(self) -> Iterator[Layer]:
        return iter(cast(Iterable[Layer], self.layers))

    def init_state(self, batch_size: int) -> list[Any]:
        """The state before the first token of ``batch_size`` sequences: each layer's."""
        return [layer.init_state(batch_size) for layer in self._layers()]

    def step(self, token: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """One token further, in time that does not depend on how many came before.

        Args:
            token: (B, D).
            state: From :meth:`init_state` or the step before; it is not changed.

        Returns:
            Output (B, D), equal to :meth:`forward`'s at this position, and the next state.
        """
        states = []
        for layer, layer_state in zip(self._layers(), state, strict=True):
            token, layer_state = layer.step(token, layer_state)
            states.append(layer_state)
        return self.final_norm(token), states
