"""Mamba-3's recurrence at two head sizes, with one rank (SISO) and with four (MIMO)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from op_cases import Case, Contender, packed_rows
from recsys_ssm.ops import trapezoidal_ssd
from recsys_ssm.ops.trapezoidal_ssd import _chunked, trapezoidal_ssd_reference

Shape = tuple[int, int, int, int, int, int]  # batch, length, ranks, heads, headdim, states
SHAPES: tuple[Shape, ...] = (
    (64, 200, 1, 4, 32, 64),
    (64, 200, 1, 2, 64, 128),
    (64, 50, 4, 4, 32, 64),
)


def cases() -> list[Case]:
    return [_case(shape) for shape in SHAPES]


def _case(shape: Shape) -> Case:
    seq_idx = packed_rows(*shape[:2])
    return Case(
        name=f"trapezoidal_ssd {shape}",
        tensors=partial(_tensors, shape),
        contenders=[
            Contender("kernel", trapezoidal_ssd),
            Contender("kernel, packed", partial(trapezoidal_ssd, seq_idx=seq_idx), exact=False),
            Contender("kernel, AVX2", trapezoidal_ssd, environment={"RECSYS_SSM_MAX_ISA": "avx2"}),
            Contender("plain PyTorch", _plain),
        ],
        reference=trapezoidal_ssd_reference,
    )


def _tensors(shape: Shape) -> dict[str, Tensor]:
    batch, length, ranks, heads, headdim, states = shape
    g = torch.Generator().manual_seed(0)
    steps, matrix, bias = (
        (batch, length, heads),
        (batch, length, ranks, 1, states),
        (heads, ranks, states),
    )
    return {
        "x": torch.randn(batch, length, ranks, heads, headdim, generator=g),
        "log_decay": -0.1 * torch.rand(*steps, generator=g),
        "past": 0.1 * torch.rand(*steps, generator=g),
        "own": 0.1 * torch.rand(*steps, generator=g),
        "B": torch.randn(*matrix, generator=g),
        "C": torch.randn(*matrix, generator=g),
        "B_bias": torch.ones(*bias),
        "C_bias": torch.ones(*bias),
        "angle": torch.randn(*steps, states // 4, generator=g),
        "D": torch.ones(heads),
    }


def _plain(**x: Any) -> Tensor:
    return _chunked(**x, halves=False, seq_idx=None, chunk_size=None)
