"""Measure what tokenizer and head do without a backbone: tokens are not mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from recsys_ssm.models.backbones.base import Backbone, pick


class Identity(Backbone):
    """Tokens as they are. A row is represented by their mean, since the last token has not seen the others.

    Example:
        >>> import torch
        >>> from recsys_ssm import Identity
        >>> Identity(d_model=8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

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
        """Return None: there is nothing to remember."""

    def step(self, token: Tensor, state: None) -> tuple[Tensor, None]:
        """Return the token unchanged, as :meth:`Backbone.step` describes."""
        return token, state
