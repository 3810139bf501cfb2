"""State space duality: 2Mamba4Rec's shape at two head sizes, beside the algorithm as it was published.

That one is listing 1 of the paper, written anew: chunks, einsums, a stable segment sum, B and C for every
head. It takes lengths that are multiples of its chunk; of those that divide 200 the fastest is used.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import Case, Contender, packed_rows
from recsys_ssm.ops import ssd
from recsys_ssm.ops.ssd import _chunked, ssd_reference

Shape = tuple[int, int, int, int, int]  # batch, length, heads, headdim, states
# Each with the chunk at which the published algorithm is fastest.
SHAPES: tuple[tuple[Shape, int], ...] = (
    ((128, 200, 2, 64, 128), 100),
    ((128, 200, 32, 4, 128), 25),
)
PACKED: tuple[tuple[Shape, int], ...] = (  # batches of next-item training
    ((41, 50, 32, 4, 64), 25),
    ((41, 50, 8, 16, 128), 50),
)


def cases() -> list[Case]:
    return [_case(shape, chunk) for shape, chunk in SHAPES + PACKED]


def _case(shape: Shape, chunk: int) -> Case:
    seq_idx = packed_rows(*shape[:2])
    return Case(
        name=f"ssd {shape}",
        tensors=partial(_tensors, shape),
        contenders=[
            Contender("kernel", _ours),
            Contender("kernel, packed", partial(_ours, seq_idx=seq_idx), exact=False),
            Contender("kernel, AVX2", _ours, environment={"RECSYS_SSM_MAX_ISA": "avx2"}),
            Contender("plain PyTorch", _plain),
            Contender(f"published, chunk {chunk}", partial(_published, chunk)),
        ],
        reference=_reference,
    )


def _tensors(shape: Shape) -> dict[str, Tensor]:
    batch, length, heads, headdim, states = shape
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, length, heads, headdim, generator=g),
        "dt": 0.001 + 0.1 * torch.rand(batch, length, heads, generator=g),
        "A": -(1 + 15 * torch.rand(heads, generator=g)),
        "B": torch.randn(batch, length, 1, states, generator=g),
        "C": torch.randn(batch, length, 1, states, generator=g),
    }


def _ours(**x: Any) -> Tensor:
    y = ssd(**x)
    assert isinstance(y, Tensor)
    return y


def _plain(**x: Tensor) -> Tensor:
    return _chunked(**x, D=None, dt_bias=None, dt_softplus=False, seq_idx=None, initial_state=None,
                    chunk_size=None)[0]  # fmt: skip


def _reference(**x: Tensor) -> Tensor:
    return ssd_reference(**x)[0]


def _segment_sums(a: Tensor) -> Tensor:
    size = a.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool)
    rows = a[..., None].expand(*a.shape, size).masked_fill(~ones.tril(-1), 0)
    return rows.cumsum(-2).masked_fill(~ones.tril(), -torch.inf)


def _published(chunk: int, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    batch, length, heads, headdim = x.shape
    B, C = (group.expand(-1, -1, heads, -1) for group in (B, C))
    u, log_a, B, C = (
        t.reshape(batch, length // chunk, chunk, *t.shape[2:])
        for t in (x * dt[..., None], dt * A, B, C)
    )
    log_a = log_a.permute(0, 3, 1, 2)
    sums = log_a.cumsum(-1)
    decays = _segment_sums(log_a).exp()
    within = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, decays, u)
    to_end = (sums[..., -1:] - sums).exp()
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, to_end, u)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    between = _segment_sums(F.pad(sums[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    before = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, sums.exp())
    return (within + before).reshape(batch, length, heads, headdim)
