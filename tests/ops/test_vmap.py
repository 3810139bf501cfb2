"""Check the operators under torch.vmap: the results of one call after the other, by one call to the dispatcher."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recsys_ssm.batched_seeds.attention import register_attention_rule
from recsys_ssm.ops import causal_conv1d, same_conv1d, selective_scan, ssd, trapezoidal_ssd
from recsys_ssm.ops.dropout import dropout

CALLS, B, L, E, N, W = 3, 2, 9, 8, 4, 3


@pytest.fixture(autouse=True)
def _no_fallback() -> Iterator[None]:
    """Make PyTorch's warning about a missing vmap rule an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Calls(TorchDispatchMode):
    """Count the calls that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def randn(*shape: int, calls: int = CALLS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(calls, *shape, dtype=dtype)


def sequences(calls: int = CALLS) -> Tensor:
    """Make packed rows with padding, different for each call."""
    rows = torch.tensor([[0, 0, 0, 1, 1, -1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, -1, -1]])
    return torch.stack([rows.roll(i, 0) for i in range(calls)])


def convolution(dtype: torch.dtype, packed: bool, calls: int = CALLS) -> tuple[Callable, dict]:
    inputs = {
        "x": randn(B, L, E, calls=calls, dtype=dtype),
        "weight": randn(E, W, calls=calls, dtype=dtype),
        "bias": randn(E, calls=calls, dtype=dtype),
    }
    if packed:
        inputs["seq_idx"] = sequences(calls)
        inputs["initial_state"] = randn(B, E, W - 1, calls=calls, dtype=dtype)
    return lambda **given: causal_conv1d(**given, activation="silu"), inputs


def centred_convolution(
    dtype: torch.dtype, packed: bool, calls: int = CALLS
) -> tuple[Callable, dict]:
    inputs = convolution(dtype, packed, calls)[1]
    inputs.pop("initial_state", None)
    return same_conv1d, inputs


def scan(dtype: torch.dtype, packed: bool, calls: int = CALLS) -> tuple[Callable, dict]:
    inputs = {
        "u": randn(B, L, E, calls=calls, dtype=dtype),
        "dt": randn(B, L, E, calls=calls, dtype=dtype),
        "A": -randn(E, N, calls=calls, dtype=dtype).exp(),
        "B": randn(B, L, N, calls=calls, dtype=dtype),
        "C": randn(B, L, N, calls=calls, dtype=dtype),
        "D": randn(E, calls=calls, dtype=dtype),
        "z": randn(B, L, E, calls=calls, dtype=dtype),
        "dt_bias": randn(E, calls=calls, dtype=dtype),
    }
    if packed:
        inputs["seq_idx"] = sequences(calls)
        inputs["initial_state"] = randn(B, E, N, calls=calls, dtype=dtype)
    return lambda **given: selective_scan(
        **given, dt_softplus=True, return_final_state=True
    ), inputs


def duality(dtype: torch.dtype, packed: bool, calls: int = CALLS) -> tuple[Callable, dict]:
    heads, headdim, groups = 4, 2, 2
    inputs = {
        "x": randn(B, L, heads, headdim, calls=calls, dtype=dtype),
        "dt": randn(B, L, heads, calls=calls, dtype=dtype),
        "A": -randn(heads, calls=calls, dtype=dtype).exp(),
        "B": randn(B, L, groups, N, calls=calls, dtype=dtype),
        "C": randn(B, L, groups, N, calls=calls, dtype=dtype),
        "D": randn(heads, calls=calls, dtype=dtype),
        "dt_bias": randn(heads, calls=calls, dtype=dtype),
    }
    if packed:
        inputs["seq_idx"] = sequences(calls)
        inputs["initial_state"] = randn(B, heads, headdim, N, calls=calls, dtype=dtype)
    return lambda **given: ssd(**given, dt_softplus=True, return_final_state=True), inputs


def trapezoid(dtype: torch.dtype, packed: bool, calls: int = CALLS) -> tuple[Callable, dict]:
    rank, heads, headdim, groups, states = 2, 4, 2, 2, 4
    steps, matrix, bias = (B, L, heads), (B, L, rank, groups, states), (heads, rank, states)
    inputs = {
        "x": randn(B, L, rank, heads, headdim, calls=calls, dtype=dtype),
        "log_decay": -randn(*steps, calls=calls, dtype=dtype).abs(),
        "past": randn(*steps, calls=calls, dtype=dtype),
        "own": randn(*steps, calls=calls, dtype=dtype),
        "B": randn(*matrix, calls=calls, dtype=dtype),
        "C": randn(*matrix, calls=calls, dtype=dtype),
        "B_bias": randn(*bias, calls=calls, dtype=dtype),
        "C_bias": randn(*bias, calls=calls, dtype=dtype),
        "angle": randn(*steps, 1, calls=calls, dtype=dtype),
        "D": randn(heads, calls=calls, dtype=dtype),
    }
    if packed:
        inputs["seq_idx"] = sequences(calls)
    return trapezoidal_ssd, inputs


def attention(dtype: torch.dtype, packed: bool, calls: int = CALLS) -> tuple[Callable, dict]:
    register_attention_rule()
    inputs = {name: randn(B, 2, L, 4, calls=calls, dtype=dtype) for name in "qkv"}
    if packed:
        rows = sequences(calls)
        apart = (rows.unsqueeze(-1) != rows.unsqueeze(-2)).unsqueeze(-3)
        inputs["mask"] = torch.zeros(apart.shape, dtype=dtype).masked_fill(apart, -torch.inf)
    return lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, mask), inputs


OPERATORS = [convolution, centred_convolution, scan, duality, trapezoid, attention]


def gradients(call: Callable, inputs: dict[str, Tensor], batched: bool) -> tuple[list, list]:
    """Return outputs and gradients of all floating-point inputs, for all calls at once or one after the other."""
    leaves = {
        name: x.clone().requires_grad_() if x.is_floating_point() and name != "mask" else x
        for name, x in inputs.items()
    }
    names = list(leaves)

    def positional(*given: Tensor) -> Any:
        return call(**dict(zip(names, given, strict=True)))

    if batched:
        found = torch.vmap(positional)(*leaves.values())
    else:
        each = [positional(*(x[i] for x in leaves.values())) for i in range(CALLS)]
        found = (
            torch.stack(each)
            if isinstance(each[0], Tensor)
            else tuple(torch.stack(x) for x in zip(*each, strict=True))
        )
    outputs = [found] if isinstance(found, Tensor) else list(found)
    wanted = [x for x in leaves.values() if x.requires_grad]
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outputs)
    return outputs, list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", OPERATORS)
def test_all_at_once_is_one_after_the_other(
    operator: Callable, dtype: torch.dtype, packed: bool
) -> None:
    torch.manual_seed(0)
    call, inputs = operator(dtype, packed)
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-12}
    batched, alone = gradients(call, inputs, True), gradients(call, inputs, False)
    for found, wanted in zip(batched[0] + batched[1], alone[0] + alone[1], strict=True):
        torch.testing.assert_close(found, wanted, **close)


@pytest.mark.parametrize("operator", [convolution, scan, duality, attention])
def test_operands_that_all_calls_share(operator: Callable) -> None:
    """Share one operand after the other between the calls: its gradient is the sum over the calls."""
    torch.manual_seed(1)
    call, inputs = operator(torch.float64 if operator is attention else torch.float32, True)
    names = list(inputs)
    for shared in names:
        leaves = {
            name: (x[0] if name == shared else x)
            .clone()
            .requires_grad_(x.is_floating_point() and name != "mask")
            for name, x in inputs.items()
        }
        in_dims = tuple(None if name == shared else 0 for name in names)

        def positional(*given: Tensor) -> Tensor:
            found = call(**dict(zip(names, given, strict=True)))
            return found if isinstance(found, Tensor) else found[0]

        def alone(i: int, leaves: dict = leaves, shared: str = shared) -> Tensor:
            return positional(*(x if name == shared else x[i] for name, x in leaves.items()))

        wanted = [x for x in leaves.values() if x.requires_grad]
        found = torch.vmap(positional, in_dims)(*leaves.values())
        each = torch.stack([alone(i) for i in range(CALLS)])
        torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)
        for a, b in zip(
            torch.autograd.grad(found.sin().sum(), wanted),
            torch.autograd.grad(each.sin().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=shared)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_number_of_calls_does_not_depend_on_how_many(operator: Callable) -> None:
    def counted(calls: int) -> Counter[str]:
        call, inputs = operator(torch.float32, True, calls)
        names = list(inputs)
        leaves = [
            x.requires_grad_(x.is_floating_point() and name != "mask") for name, x in inputs.items()
        ]
        with Calls() as mode:
            found = torch.vmap(lambda *given: call(**dict(zip(names, given, strict=True))))(*leaves)
            (found if isinstance(found, Tensor) else found[0]).sum().backward()
        return mode.counts

    assert counted(2) == counted(5)


def test_other_batched_dimension_and_vmap_in_vmap() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(B, L, CALLS, E), torch.randn(E, W, CALLS)
    found = torch.vmap(causal_conv1d, (2, 2))(x, weight)
    for i in range(CALLS):
        torch.testing.assert_close(found[i], causal_conv1d(x[:, :, i], weight[..., i]))
    x, weight = torch.randn(2, CALLS, B, L, E), torch.randn(CALLS, E, W)
    found = torch.vmap(torch.vmap(causal_conv1d), (0, None))(x, weight)
    for i in range(2):
        torch.testing.assert_close(found[i], torch.vmap(causal_conv1d)(x[i], weight))


def test_dropout_differs_from_call_to_call() -> None:
    torch.manual_seed(0)
    x = torch.ones(CALLS, 4000)
    found = torch.vmap(lambda x: dropout(x, 0.25), randomness="different")(x)
    assert not torch.equal(found[0], found[1])
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert found.mean() == pytest.approx(1, abs=0.03)
