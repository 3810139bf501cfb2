"""Selective scan: the shapes of FT-Mamba, Mamba4Rec (50 and 200) and a long one.

A is drawn around its initial -(1 ... N), as in a trained model: at the initial values all decays are
powers of one, which some machines' exponentials would notice.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import Case, Contender, packed_rows
from recsys_ssm.ops import selective_scan, selective_scan_reference
from recsys_ssm.ops.selective_scan import _scan_loop

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((32, 21, 256, 16), (128, 50, 128, 32), (128, 200, 128, 32),
                             (8, 1000, 128, 16))  # fmt: skip
PACKED: Shape = (41, 50, 128, 32)  # a batch of next-item training
LONG: tuple[Shape, ...] = ((8, 4000, 128, 16), (8, 4000, 256, 16))


def cases() -> list[Case]:
    return [_case(s, long=False) for s in (*SHAPES, PACKED)] + [_case(s, long=True) for s in LONG]


def _case(shape: Shape, *, long: bool) -> Case:
    batch, length, channels, states = shape
    exponentials = 2 * batch * length * channels * states
    contenders = [Contender("kernel", _ours)]
    if shape == PACKED:
        seq_idx = packed_rows(batch, length)
        contenders.append(Contender("kernel, packed", partial(_ours, seq_idx=seq_idx), exact=False))
    if not long:
        contenders.append(
            Contender("kernel, AVX2", _ours, environment={"RECSYS_SSM_MAX_ISA": "avx2"})
        )
        contenders.append(Contender("unbind loop", _loop))
        contenders.append(Contender("unbind loop, plain", _plain_loop))
        if _mambapy() is not None:
            contenders.append(Contender("mambapy", _pscan))
        contenders.append(Contender("torch.compile", _Compiled(), slow_to_start=True))
        contenders.append(Contender("attention", _attention, exact=False))
    return Case(
        name=f"selective_scan {shape}",
        tensors=partial(_tensors, shape),
        contenders=contenders,
        reference=_reference,
        floor=lambda floors: exponentials / floors.exponentials,
    )


def _tensors(shape: Shape) -> dict[str, Tensor]:
    batch, length, channels, states = shape
    g = torch.Generator().manual_seed(0)
    spread = 1 + 0.1 * torch.randn(channels, states, generator=g)
    return {
        "u": torch.randn(batch, length, channels, generator=g),
        "dt": 0.001 + 0.1 * torch.rand(batch, length, channels, generator=g),
        "A": -torch.arange(1.0, states + 1) * spread.abs(),
        "B": torch.randn(batch, length, states, generator=g),
        "C": torch.randn(batch, length, states, generator=g),
        "D": torch.randn(channels, generator=g),
    }


def _ours(**x: Any) -> Tensor:
    y = selective_scan(**x)
    assert isinstance(y, Tensor)
    return y


def _loop(**x: Tensor) -> Tensor:
    return _scan_loop(**x, z=None, dt_bias=None, dt_softplus=False, seq_idx=None,
                      initial_state=None)[0]  # fmt: skip


def _plain_loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Compute the formula step by step, without the care of our fallback: multiply, add, sum."""
    h = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    steps = zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True)
    for u_BE, dt_BE, B_BN, C_BN in steps:
        decay = torch.exp(dt_BE.unsqueeze(-1) * A)
        h = decay * h + dt_BE.unsqueeze(-1) * B_BN.unsqueeze(1) * u_BE.unsqueeze(-1)
        outputs.append((h * C_BN.unsqueeze(1)).sum(-1))
    return torch.stack(outputs, 1) + D * u


def _reference(**x: Tensor) -> Tensor:
    return selective_scan_reference(**x)[0]


def _mambapy() -> Any:
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return None
    return pscan


def _pscan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Compute as mambapy's MambaBlock.selective_scan does."""
    decay = torch.exp(dt.unsqueeze(-1) * A)
    h = _mambapy()(decay, dt.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1))
    return (h @ C.unsqueeze(-1)).squeeze(3) + D * u


class _Compiled:
    """Reference under torch.compile, compiled when first called."""

    function: Any = None

    def __call__(self, **x: Tensor) -> Tensor:
        if self.function is None:
            self.function = torch.compile(_reference, dynamic=False)
        return self.function(**x)


def _attention(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Compute causal attention of the same width, 64 channels a head, for scale. Other inputs are only added."""
    heads = u.unflatten(-1, (-1, min(64, u.shape[-1]))).transpose(1, 2)
    out = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    rest = sum(x.sum() for x in (dt, A, B, C, D))
    return out.transpose(1, 2).flatten(2) + 0 * rest
