"""Cases of benchmarks/ops.py: one module an operator, each with a function ``cases() -> list[Case]``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "Contender", "packed_rows"]


def packed_rows(batch: int, length: int) -> Tensor:
    """``seq_idx`` of rows full of sequences of 3 to 20 positions, as next-item training packs them."""
    g = torch.Generator().manual_seed(0)
    rows = [
        torch.repeat_interleave(torch.arange(length), torch.randint(3, 21, (length,), generator=g))
        for _ in range(batch)
    ]
    return torch.stack([row[:length] for row in rows])


@dataclass(frozen=True)
class Contender:
    """One way to do a case: ``forward`` takes the case's tensors and returns one output tensor."""

    name: str
    forward: Callable[..., Tensor]
    # Tensors to work on instead of the case's own, in another layout for example.
    prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    environment: dict[str, str] = field(
        default_factory=dict
    )  # of the kernels, see ops/_dispatch.py
    slow_to_start: bool = False  # minutes; left out unless asked for by name
    exact: bool = True  # computes what the reference does: its error is shown


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    ``tensors`` makes the inputs (all of them get gradients), ``reference`` takes them in float64,
    ``floor`` gives the seconds below which forward and backward cannot go on one thread.
    """

    name: str
    tensors: Callable[[], dict[str, Tensor]]
    contenders: Iterable[Contender]
    reference: Callable[..., Tensor]
    floor: Callable[[Any], float] | None = None
