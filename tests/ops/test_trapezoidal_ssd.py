"""Check every path of the trapezoidal recurrence against the formula, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_ssm.ops._dispatch import kernel_library
from recsys_ssm.ops.trapezoidal_ssd import (
    _OPERATOR,
    trapezoidal_ssd,
    trapezoidal_ssd_reference,
)
from tests.ops.conftest import available_isas
from tests.ops.test_ssd import random_sequences, relative_error

needs_kernel = pytest.mark.skipif(
    _OPERATOR.functions is None, reason="the compiled kernel is not there"
)
FLOATS = ("x", "log_decay", "past", "own", "B", "C", "B_bias", "C_bias", "angle", "D")


def random_inputs(
    batch: int,
    length: int,
    rank: int,
    heads: int,
    headdim: int,
    groups: int,
    states: int,
    angles: int,
    dtype: torch.dtype = torch.float64,
    decay: float = 1.0,
) -> dict[str, Any]:
    """Make arguments of the operator; x, B and C are views of one tensor, as they come from the projection."""
    channels, width = rank * heads * headdim, rank * groups * states
    xBC = torch.randn(batch, length, channels + 2 * width).to(dtype)
    x, B, C = xBC.split([channels, width, width], dim=-1)
    inputs: dict[str, Any] = {
        "x": x.unflatten(2, (rank, heads, headdim)),
        "log_decay": -decay * torch.rand(batch, length, heads).to(dtype),
        "past": torch.rand(batch, length, heads).to(dtype),
        "own": torch.rand(batch, length, heads).to(dtype),
        "B": B.unflatten(2, (rank, groups, states)),
        "C": C.unflatten(2, (rank, groups, states)),
        "B_bias": torch.randn(heads, rank, states).to(dtype),
        "C_bias": torch.randn(heads, rank, states).to(dtype),
        "angle": (3 * torch.randn(batch, length, heads, angles)).to(dtype),
        "D": torch.randn(heads).to(dtype),
    }
    return {name: value.requires_grad_() for name, value in inputs.items()}


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_()
        if name in FLOATS and value is not None
        else value
        for name, value in inputs.items()
    }


def gradients(y: Tensor, inputs: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    leaves = {name: x for name, x in inputs.items() if name in FLOATS and x is not None}
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if d is None else d
        for (name, leaf), d in zip(leaves.items(), found, strict=True)
    }


def check_random_shapes(dtype: torch.dtype, bound: float, count: int) -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    for _ in range(count):
        groups = rng.choice([1, 1, 2])
        heads, headdim = groups * rng.randint(1, 3), rng.choice([1, 3, 4, 16, 20])
        batch, length = rng.randint(1, 3), rng.choice([1, 2, 15, 16, 17, 33, 50, 150])
        rank, states = rng.choice([1, 1, 1, 2, 3, 4]), rng.choice([2, 4, 6, 16, 34])
        shape = (batch, length, rank, heads, headdim, groups, states, rng.randint(0, states // 2))
        inputs = random_inputs(*shape, dtype=dtype, decay=rng.choice([0.01, 1.0, 30.0]))
        inputs["halves"] = rng.random() < 0.5
        if rng.random() < 0.3:
            inputs["D"] = None
        if rng.random() < 0.5:
            inputs["seq_idx"] = random_sequences(batch, length, rng)
        y = trapezoidal_ssd(**inputs, chunk_size=rng.choice([None, 1, 7, 16]))
        assert y.dtype == dtype and y.shape == inputs["x"].shape
        doubles = in_double(inputs)
        expected = trapezoidal_ssd_reference(**doubles)
        dy = torch.randn_like(y)
        found_grads = gradients(y, inputs, dy)
        expected_grads = gradients(expected, doubles, dy.double())
        assert relative_error(y, expected) < bound, shape
        # A gradient that is 0 (of the angle of a single step, say) is a sum of terms of size 1.
        for name, d in expected_grads.items():
            if d.numel():
                assert relative_error(found_grads[name], d, scale=1.0) < bound, (name, shape)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)]
)
def test_random_shapes(dtype: torch.dtype, bound: float) -> None:
    check_random_shapes(dtype, bound, 60)


@needs_kernel
@pytest.mark.parametrize("isa", available_isas()[:-1])
def test_every_instruction_set(isa: str, use: Any) -> None:
    use(RECSYS_SSM_MAX_ISA=isa)
    assert kernel_library().isa == isa
    check_random_shapes(torch.float32, 2e-5, 20)
