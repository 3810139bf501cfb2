"""Check the Triton convolution against the formula written as loops, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_ssm.ops.causal_conv1d import _OPERATOR, _convolve, _reference, causal_conv1d
from tests.ops.test_causal_conv1d import formula, random_sequences
from tests.ops.triton.conftest import DEVICE, relative


def make(seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Draw the arguments of a call: odd sizes, a strided view, packed rows, states."""
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    B, L = rng.randint(1, 3), rng.choice([1, 2, 7, 15, 16, 17, 33])
    E, W = rng.choice([1, 3, 16, 63, 65]), rng.choice([1, 2, 3, 4, 4, 5, 7, 16])
    ahead = rng.choice([0, 0, (W - 1) // 2])
    return {
        "x": normal(B, L, 2 * E + 3).to(dtype)[..., 2 : 2 + E],
        "weight": normal(E, W),
        "bias": normal(E) if rng.random() < 0.7 else None,
        "silu": rng.random() < 0.6,
        "seq_idx": random_sequences(B, L, rng) if rng.random() < 0.5 else None,
        "state": normal(B, E, W - 1).to(dtype) if ahead == 0 and rng.random() < 0.5 else None,
        "ahead": ahead,
    }


FLOATS = ("x", "weight", "bias", "state")


def worst_error(seed: int, dtype: torch.dtype) -> float:
    """Return the largest error of the output and each gradient."""
    given = make(seed, dtype)

    def prepare(device: Any, wide: torch.dtype | None) -> dict[str, Any]:
        return {
            name: x if not isinstance(x, Tensor) else x.to(device) if name == "seq_idx"
            else x.detach().to(device, wide or x.dtype).requires_grad_()
            for name, x in given.items()
        }  # fmt: skip

    ours, exact = prepare(DEVICE, None), prepare("cpu", torch.float64)
    y = _convolve(
        ours["x"], ours["weight"], ours["bias"], "silu" if ours["silu"] else None, ours["seq_idx"],
        ours["state"], ours["ahead"],
    )  # fmt: skip
    assert y.dtype == dtype
    expected = formula(**exact)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaves = [[x[name] for name in FLOATS if x[name] is not None] for x in (ours, exact)]
    found = torch.autograd.grad(y, leaves[0], dy.to(DEVICE), materialize_grads=True)
    zero = 0 * sum(x.sum() for x in leaves[1])
    gradients = torch.autograd.grad(expected + zero, leaves[1], dy.double())
    return max(
        map(relative, (y, *found), (expected, *gradients)),
    )


@pytest.mark.parametrize("seed", range(12))
def test_float32(seed: int) -> None:
    assert worst_error(seed, torch.float32) <= 1e-5


@pytest.mark.parametrize("seed", range(100, 104))
def test_bfloat16(seed: int) -> None:
    assert worst_error(seed, torch.bfloat16) <= 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_shapes(block: int) -> None:
    seeds = range(1000 + 12 * block, 1012 + 12 * block)
    errors = {seed: worst_error(seed, torch.float32) for seed in seeds}
    assert max(errors.values()) <= 3e-5, errors
    print(f"float32: worst of {len(errors)} shapes {max(errors.values()):.1e}")
    errors = {seed: worst_error(seed, torch.bfloat16) for seed in seeds}
    assert max(errors.values()) <= 2e-2, errors
    print(f"bfloat16: worst of {len(errors)} shapes {max(errors.values()):.1e}")


def test_the_kernel_runs_and_adds_in_a_fixed_order() -> None:
    x = torch.randn(3, 40, 70, device=DEVICE)
    assert _OPERATOR.gpu_paths(x) == ("triton",) and not _OPERATOR.takes(x)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_(), torch.ones(70, 4, device=DEVICE, requires_grad=True)]
        y = causal_conv1d(*leaves, None, "silu")
        runs.append([y, *torch.autograd.grad(y.sum(), leaves)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("packed", [False, True])
def test_registered_with_torch_library(packed: bool) -> None:
    x = torch.randn(2, 6, 5, requires_grad=True, device=DEVICE)
    weight = torch.randn(5, 4, requires_grad=True, device=DEVICE)
    bias = torch.randn(5, requires_grad=True, device=DEVICE)
    state = torch.randn(2, 5, 3, requires_grad=True, device=DEVICE)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, -1]] * 2, device=DEVICE) if packed else None
    causal_conv1d(x, weight)  # registers
    torch.library.opcheck(
        torch.ops.recsys_ssm.triton_causal_conv1d.default,
        (x, weight, bias, seq_idx, state, True, 0),
    )


def test_compiled_and_under_autocast() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 5, device=DEVICE), torch.randn(5, 4, device=DEVICE)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor, weight: Tensor) -> Tensor:
        return causal_conv1d(2 * x, weight, None, "silu") + 1

    weight.requires_grad_()
    y = step(x, weight)
    (found,) = torch.autograd.grad(y.sum(), weight)
    expected = _reference(2 * x, weight, None, "silu", None, None, 0) + 1
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), weight)[0])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        half = causal_conv1d(x.bfloat16(), weight)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), causal_conv1d(x, weight), rtol=2e-2, atol=5e-2)


def test_batched_over_seeds() -> None:
    x, weight = torch.randn(3, 2, 6, 5, device=DEVICE), torch.randn(3, 5, 4, device=DEVICE)
    found = torch.vmap(lambda x, w: causal_conv1d(x, w, None, "silu"))(x, weight)
    each = [_reference(a, w, None, "silu", None, None, 0) for a, w in zip(x, weight, strict=True)]
    torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    x = torch.zeros(shape, requires_grad=True, device=DEVICE)
    weight = torch.ones(shape[2], 3, requires_grad=True, device=DEVICE)
    y, final = causal_conv1d(x, weight, None, "silu", return_final_state=True)
    assert y.shape == shape and final.shape == (shape[0], shape[2], 2)
    y.sum().backward()
    assert weight.grad is not None and (weight.grad == 0).all()


def test_padding_reaches_nothing() -> None:
    x = torch.randn(1, 6, 3, device=DEVICE)
    x[:, [0, 3]] = torch.nan
    x.requires_grad_()
    weight = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    y = causal_conv1d(x, weight, None, "silu", torch.tensor([[-1, 0, 0, -1, 1, 1]], device=DEVICE))
    assert (y[:, [0, 3]] == 0).all()
    for gradient in torch.autograd.grad(y.sum(), (x, weight)):
        assert gradient.isfinite().all()
