"""Cases of benchmarks/ops.py: one module for each operator, with a function ``cases() -> list[Case]``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "Contender", "packed_rows"]


def packed_rows(batch: int, length: int) -> Tensor:
    """Make ``seq_idx`` of full rows with sequences of 3 to 20 positions, as next-item training packs them."""
    g = torch.Generator().manual_seed(0)
    rows = [
        torch.repeat_interleave(torch.arange(length), torch.randint(3, 21, (length,), generator=g))
        for _ in range(batch)
    ]
    return torch.stack([row[:length] for row in rows])


@dataclass(frozen=True)
class Contender:
    """Describe one way to compute a case: ``forward`` takes the case's tensors and returns one output tensor."""

    name: str
    forward: Callable[..., Tensor]
    # Converts the case's tensors, for example to another layout.
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    environment: dict[str, str] = field(default_factory=dict)  # variables of ops/_dispatch.py
    slow_to_start: bool = False  # takes minutes; runs only if named
    exact: bool = True  # computes the reference's result, so its error is shown


@dataclass(frozen=True)
class Case:
    """Describe one operator at one shape.

    ``tensors`` makes the inputs, which all get gradients. ``reference`` takes them in float64. ``floor`` returns the
    least seconds for forward and backward on one thread.
    """

    name: str
    tensors: Callable[[], dict[str, Tensor]]
    contenders: Iterable[Contender]
    reference: Callable[..., Tensor]
    floor: Callable[[Any], float] | None = None
