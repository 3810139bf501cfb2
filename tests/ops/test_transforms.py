"""Check the operators under torch.func: derivatives of the kernels against float64, or one clear error."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from recsys_ssm.ops import causal_conv1d, same_conv1d, selective_scan, ssd, trapezoidal_ssd
from recsys_ssm.ops.cross_entropy import linear_cross_entropy
from recsys_ssm.ops.dropout import dropout

B, L, E, N = 2, 7, 4, 3
Function = Callable[[Tensor], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Return the same numbers for a seed, also inside vmap, which refuses to draw."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def convolution(x: Tensor) -> Tensor:
    return causal_conv1d(x, randn(E, 3).to(x), activation="silu").sin().sum()


def centred_convolution(x: Tensor) -> Tensor:
    return same_conv1d(x, randn(E, 3).to(x), seq_idx=torch.arange(L).expand(B, L) // 4).sin().sum()


def scan(x: Tensor) -> Tensor:
    dt, A, BC = randn(B, L, E).exp().to(x), -randn(E, N).exp().to(x), randn(2, B, L, N).to(x)
    y, state = selective_scan(x, dt * x.exp(), A, *BC, z=x, return_final_state=True)
    return y.sin().sum() + state.sin().sum()


def duality(x: Tensor) -> Tensor:
    BC = randn(2, B, L, 1, N).to(x)
    y = ssd(x.unflatten(2, (2, 2)), x[..., :2].exp(), -randn(2).exp().to(x), *BC)
    return y.sin().sum()


def trapezoid(x: Tensor) -> Tensor:
    BC, bias = randn(2, B, L, 1, 1, 4).to(x), randn(2, 2, 1, 4).to(x)
    decay, past, own = (x[..., i : i + 2].exp() for i in range(3))
    y = trapezoidal_ssd(x.view(B, L, 1, 2, 2), -decay, past, own, *BC, *bias, x.view(B, L, 2, 2))
    return y.sin().sum()


def cross_entropy(x: Tensor) -> Tensor:
    target = torch.arange(B * L) % N
    return linear_cross_entropy(x.flatten(0, 1), randn(N, E).to(x), target, chunk=4)


FUNCTIONS = [convolution, centred_convolution, scan, duality, trapezoid, cross_entropy]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def x() -> Tensor:
    return randn(B, L, E, seed=1)


@pytest.fixture(params=FUNCTIONS)
def f(request: pytest.FixtureRequest) -> Function:
    return request.param


def gradient(f: Function, x: Tensor) -> Tensor:
    """Return the gradient by plain PyTorch in float64."""
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_first_derivatives(f: Function, x: Tensor, transform: Callable) -> None:
    close(transform(f)(x), gradient(f, x))
    close(transform(f)(x.requires_grad_()), gradient(f, x))


def test_forward_mode(f: Function, x: Tensor) -> None:
    tangent = randn(B, L, E, seed=2)
    expected = (gradient(f, x) * tangent).sum()
    assert expected.abs() > 0.01
    close(torch.func.jvp(f, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent
    assert found is not None
    close(found, expected)


def test_gradients_of_many(f: Function, x: Tensor) -> None:
    xs = torch.stack([x, 0.5 * x, -x])
    found = torch.vmap(torch.func.grad(f))(xs)
    for one, each in zip(found, xs, strict=True):
        close(one, gradient(f, each))


def test_gradients_through_a_layer_of_outputs(x: Tensor) -> None:
    """Batch the gradients of the outputs alone: jacrev of a tensor."""

    def f(x: Tensor) -> Tensor:
        return causal_conv1d(x, randn(E, 3).to(x), activation="silu").sum((0, 1))

    close(torch.func.jacrev(f)(x), torch.func.jacrev(f)(x.double()))


def test_second_derivatives_in_torch_func(f: Function, x: Tensor) -> None:
    expected = torch.func.hessian(f)(x.double())
    for transform in (
        torch.func.hessian,
        lambda f: torch.func.jacrev(torch.func.jacrev(f)),
        lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    ):
        close(transform(f)(x), expected)


def test_second_derivatives_of_kernels_are_an_error(f: Function, x: Tensor, kernel: None) -> None:
    x.requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"only first derivatives; (pass float64|call linear)"):
        first.sum().backward()


def test_an_operator_without_a_rule_does_not_drop_tangents(x: Tensor, kernel: None) -> None:
    operator = torch.ops.recsys_ssm.causal_conv1d.default
    with (
        forward_ad.dual_level(),
        pytest.raises(
            RuntimeError, match="causal_conv1d: no forward-mode derivative; pass float64"
        ),
    ):
        operator(forward_ad.make_dual(x, x), randn(E, 3), None, None, None, False, 0)


def test_dropout_differs_from_call_to_call_under_a_gradient() -> None:
    xs = torch.ones(2, 4000)
    found = torch.vmap(torch.func.grad(lambda x: dropout(x, 0.5).sum()), randomness="different")(xs)
    assert not torch.equal(found[0], found[1])
    assert found.unique().tolist() == [0, 2]
