"""Check the Triton scan against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_ssm.ops import selective_scan
from recsys_ssm.ops.selective_scan import _OPERATOR, selective_scan_reference
from tests.ops.test_selective_scan import FLOATS, Inputs, make, random_case
from tests.ops.triton.conftest import DEVICE, relative


def outputs(function: Any, inputs: Inputs, weights: list[Tensor]) -> list[Tensor]:
    """Return y, the state, and every gradient of their weighted sum."""
    found = function(inputs)
    given = [inputs[name] for name in FLOATS if inputs[name] is not None]
    cotangents = [w.to(x) for w, x in zip(weights, found, strict=True)]
    return [*found, *torch.autograd.grad(found, given, cotangents)]


def worst_error(inputs: Inputs) -> float:
    """Return the largest error of y, the state and each gradient."""
    g = torch.Generator().manual_seed(0)
    batch, _, channels = inputs["u"].shape
    weights = [
        torch.randn(inputs["u"].shape, generator=g).to(inputs["u"].dtype),
        torch.randn(batch, channels, inputs["A"].shape[1], generator=g),
    ]

    def prepare(device: Any, dtype: torch.dtype | None) -> Inputs:
        return {
            name: x if not isinstance(x, Tensor) else x.to(device) if name == "seq_idx"
            else x.detach().to(device, dtype or x.dtype).requires_grad_()
            for name, x in inputs.items()
        }  # fmt: skip

    def ours(x: Inputs) -> Any:
        return selective_scan(**x, return_final_state=True)

    found = outputs(ours, prepare(DEVICE, None), weights)
    exact = outputs(lambda x: selective_scan_reference(**x), prepare("cpu", torch.float64), weights)
    assert found[0].dtype == inputs["u"].dtype and found[1].dtype == torch.float32
    return max(map(relative, found, exact))


@pytest.mark.parametrize("seed", range(6))
def test_float32(seed: int) -> None:
    assert worst_error(random_case(seed, torch.float32)) <= 1e-4


@pytest.mark.parametrize("seed", range(1000, 1003))
def test_bfloat16(seed: int) -> None:
    assert worst_error(random_case(seed, torch.bfloat16)) <= 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("block", range(12))
def test_many_shapes(block: int) -> None:
    seeds = range(5000 + 10 * block, 5010 + 10 * block)
    errors = {seed: worst_error(random_case(seed, torch.float32)) for seed in seeds}
    assert max(errors.values()) <= 1e-4, errors
    print(f"float32: worst of {len(errors)} shapes {max(errors.values()):.1e}")
    errors = {seed: worst_error(random_case(seed, torch.bfloat16)) for seed in seeds}
    assert max(errors.values()) <= 2e-2, errors
    print(f"bfloat16: worst of {len(errors)} shapes {max(errors.values()):.1e}")


def test_large_and_small_steps() -> None:
    """Use decays that underflow, and steps whose softplus is below float32's spacing at 1."""
    x = make(9, 1, 40, 5, 4)
    x["dt"][:, ::3] += 60
    x["dt"][:, 1::3] -= 20
    assert worst_error(x) <= 1e-4


def test_only_one_output_has_a_gradient() -> None:
    x = make(4, 2, 20, 5, 3, packed=True)
    x = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in x.items()}
    for which in (0, 1):
        u = x["u"].clone().requires_grad_()
        found = selective_scan(**{**x, "u": u}, return_final_state=True)[which]
        exact_u = x["u"].double().cpu().requires_grad_()
        wide = {k: v.double().cpu() if isinstance(v, Tensor) and v.is_floating_point()
                else v.cpu() if isinstance(v, Tensor) else v for k, v in x.items()}  # fmt: skip
        exact = selective_scan_reference(**{**wide, "u": exact_u})[which]
        (gradient,) = torch.autograd.grad(found.sum(), u)
        assert relative(gradient, torch.autograd.grad(exact.sum(), exact_u)[0]) <= 1e-4


def test_the_kernel_runs_and_adds_in_a_fixed_order() -> None:
    x = make(2, 5, 20, 70, 3)
    x = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in x.items()}
    assert _OPERATOR.gpu_paths(x["u"]) == ("triton",) and not _OPERATOR.takes(x["u"])
    runs = []
    for _ in range(2):
        leaves = [x[name].clone().requires_grad_() for name in ("A", "B", "C", "D")]
        y = selective_scan(**{**x, **dict(zip("ABCD", leaves, strict=True))})
        runs.append([y, *torch.autograd.grad(y.sum(), leaves)])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("packed", [False, True])
def test_registered_with_torch_library(packed: bool) -> None:
    x = make(0, 2, 18, 5, 3, packed=packed)
    x = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in x.items()}
    selective_scan(**x)  # registers
    for name in FLOATS:
        x[name].requires_grad_()
    order = (*FLOATS[:8], "dt_softplus", "seq_idx", "initial_state")
    torch.library.opcheck(
        torch.ops.recsys_ssm.triton_selective_scan.default,
        (*(x[name] for name in order), True, False),
    )


def test_compiled_and_under_autocast() -> None:
    x = make(0, 2, 18, 5, 3)
    x = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in x.items()}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(u: Tensor) -> Tensor:
        return selective_scan(**{**x, "u": 2 * u}) + 1

    u = x["u"].clone().requires_grad_()
    y = step(u)
    expected = selective_scan(**{**x, "u": 2 * u}) + 1
    torch.testing.assert_close(y, expected)
    gradients = [torch.autograd.grad(t.sum(), u)[0] for t in (y, expected)]
    torch.testing.assert_close(*gradients)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        half = selective_scan(**{**x, "u": u.bfloat16()})
    assert half.dtype == torch.bfloat16
    assert relative(half, selective_scan(**{**x, "u": u}).cpu().double()) <= 2e-2


def test_batched_over_seeds() -> None:
    parts = [make(seed, 1, 5, 4, 3) for seed in range(2)]
    u, A = (torch.stack([p[name] for p in parts]).to(DEVICE) for name in ("u", "A"))
    x = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in parts[0].items()}
    found = torch.vmap(lambda u, A: selective_scan(**{**x, "u": u, "A": A}))(u, A)
    each = [selective_scan(**{**x, "u": a, "A": b}) for a, b in zip(u, A, strict=True)]
    torch.testing.assert_close(found, torch.stack(each))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    x = make(0, *shape, 4)
    x = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in x.items()}
    x["A"].requires_grad_()
    y, state = selective_scan(**x, return_final_state=True)
    assert y.shape == shape and torch.equal(state, x["initial_state"])
    y.sum().backward()
    assert (x["A"].grad == 0).all()


def test_padding_reaches_nothing() -> None:
    x = make(0, 1, 6, 3, 2)
    x["seq_idx"] = torch.tensor([[-1, 0, 0, -1, 1, 1]])
    x = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in x.items()}
    leaves = {name: x[name].clone() for name in ("u", "dt", "B", "C", "z")}
    for t in leaves.values():
        t[:, [0, 3]] = torch.nan
        t.requires_grad_()
    A = x["A"].requires_grad_()
    y = selective_scan(**{**x, **leaves, "A": A})
    assert (y[:, [0, 3]] == 0).all()
    for gradient in torch.autograd.grad(y.sum(), (A, *leaves.values())):
        assert gradient.isfinite().all()
