"""No mixing at all: what the tokenizer and the head do without a backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from recsys_ssm.models.backbones.base import Backbone, pick


class Identity(Backbone):
    """Tokens as they are; a row is then represented by their mean, since the last one has seen no other."""

    causal = True
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "no backbone", "next_item": "no backbone"}
    style: ClassVar[Mapping[str, str]] = {"color": "#000000", "linestyle": ":", "marker": "x"}
    pooling: ClassVar[Literal["last", "mean"]] = "mean"

    def __init__(self, *, d_model: int = 128) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(
        self, tokens: Tensor, seq_idx: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        return pick(tokens, at)

    def init_state(self, batch_size: int) -> None:
        """Nothing is remembered."""

    def step(self, token: Tensor, state: None) -> tuple[Tensor, None]:
        """As :meth:`Stack.step`."""
        return token, state
