"""Check every path of the causal convolution against the formula written as loops, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops._dispatch import kernel_library
from recsys_ssm.ops.causal_conv1d import (
    _OPERATOR,
    _convolve,
    causal_conv1d,
    causal_conv1d_step,
    same_conv1d,
)
from tests.ops.conftest import available_isas

needs_kernel = pytest.mark.skipif(
    _OPERATOR.functions is None, reason="the compiled kernel is not there"
)


def formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    state: Tensor | None,
    ahead: int,
) -> Tensor:
    """Compute y[t] = bias + sum over taps of weight · x, position by position, over the row's sequences."""
    (B, L), W = x.shape[:2], weight.shape[1]
    rows = []
    for b in range(B):
        row = [torch.zeros_like(x[b, 0]) for _ in range(L)]
        ids = [0] * L if seq_idx is None else seq_idx[b].tolist()
        starts = [t for t in range(L) if ids[t] >= 0 and (t == 0 or ids[t] != ids[t - 1])]
        for start in starts:
            end = start
            while end < L and ids[end] == ids[start]:
                end += 1
            for t in range(start, end):
                total = torch.zeros_like(x[b, 0]) if bias is None else bias
                for k in range(W):
                    source = t + ahead - (W - 1) + k
                    if start <= source < end:
                        total = total + weight[:, k] * x[b, source]
                    elif state is not None and start == starts[0] and source < start:
                        total = total + weight[:, k] * state[b, :, W - 1 + source - start]
                row[t] = F.silu(total) if silu else total
        rows.append(torch.stack(row))
    return torch.stack(rows)


def random_sequences(batch: int, length: int, rng: random.Random) -> Tensor:
    """Make rows of sequences of 1 to 12 positions, with padding before, between and after; some rows are empty."""
    seq_idx = torch.full((batch, length), -1)
    for row in seq_idx:
        t, name = rng.randint(0, 2), 0
        while t < length and rng.random() > 0.05:
            size = rng.randint(1, 12)
            row[t : t + size] = name
            t, name = t + size + rng.choice([0, 0, 0, 2]), name + 1
    return seq_idx


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return max|a - b| / max|b|."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item()
    error = (found.double() - expected).abs().max().item()
    return error / scale if scale else error


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_random_shapes(dtype: torch.dtype, bound: float) -> None:
    check_random_shapes(dtype, bound, 200)


@needs_kernel
@pytest.mark.parametrize("isa", available_isas()[:-1])
def test_every_instruction_set(isa: str, use: Any) -> None:
    use(RECSYS_SSM_MAX_ISA=isa)
    assert kernel_library().isa == isa
    check_random_shapes(torch.float32, 1e-5, 40)
    check_random_shapes(torch.bfloat16, 2e-2, 10)


def check_random_shapes(dtype: torch.dtype, bound: float, count: int) -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(count):
        B, L = rng.randint(1, 3), rng.choice([1, 2, 7, 8, 9, 21])
        E, W = rng.choice([1, 5, 16, 64, 130]), rng.choice([1, 2, 3, 4, 7, 16])
        ahead = rng.choice([0, (W - 1) // 2])
        silu = rng.random() < 0.5
        # A chunk of a wider tensor, as a projection gives it.
        x = torch.randn(B, L, 2 * E + 3, dtype=dtype)[..., 2 : 2 + E].requires_grad_()
        weight = torch.randn(E, W, requires_grad=True)
        bias = torch.randn(E, requires_grad=True) if rng.random() < 0.7 else None
        packed = rng.random() < 0.5
        seq_idx = random_sequences(B, L, rng) if packed else None
        state = None
        if ahead == 0 and rng.random() < 0.5:
            state = torch.randn(B, E, W - 1, dtype=dtype, requires_grad=True)

        inputs = [tensor for tensor in (x, weight, bias, state) if tensor is not None]
        y = _convolve(x, weight, bias, "silu" if silu else None, seq_idx, state, ahead)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, inputs, dy, materialize_grads=True)

        doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
        given = iter(doubles)
        x_, weight_, bias_, state_ = (
            None if tensor is None else next(given) for tensor in (x, weight, bias, state)
        )
        expected_y = formula(x_, weight_, bias_, silu, seq_idx, state_, ahead)
        expected = torch.autograd.grad(
            expected_y + 0 * sum(tensor.sum() for tensor in doubles), doubles, dy.double()
        )
        assert y.dtype == dtype
        results = [(y, expected_y), *zip(found, expected, strict=True)]
        for i, (a, b) in enumerate(results):
            # The taps' gradients are sums over all positions; of few channels all may nearly cancel.
            limit = bound if i < 2 or E > 1 else 3 * bound
            error = relative_error(a, b)
            assert error <= limit, (i, error, (B, L, E, W), ahead, silu, packed)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_equals_conv1d(width: int) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(6, 6, width, groups=6, padding=width - 1)
    x = torch.randn(2, 9, 6)
    expected = conv(x.transpose(1, 2))[..., :9].transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(x, conv.weight[:, 0], conv.bias), expected)


@pytest.mark.parametrize("width", [1, 2, 4, 5, 7])
def test_same_equals_conv1d_with_padding(width: int) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(6, 6, width, groups=6, padding=width // 2)
    x = torch.randn(2, 9, 6)
    expected = conv(x.transpose(1, 2))[..., :9].transpose(1, 2)
    torch.testing.assert_close(same_conv1d(x, conv.weight[:, 0], conv.bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_steps_and_halves_equal_the_whole(dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, length, 5, dtype=dtype)
    weight, bias = torch.randn(5, 4, dtype=dtype), torch.randn(5, dtype=dtype)
    state = torch.randn(2, 5, 3, dtype=dtype)
    y, final = causal_conv1d(x, weight, bias, "silu", None, state, return_final_state=True)
    stepped, at = [], state
    for t in range(length):
        out, at = causal_conv1d_step(x[:, t], at, weight, bias, "silu")
        stepped.append(out)
    torch.testing.assert_close(torch.stack(stepped, 1), y)
    torch.testing.assert_close(at, final)
    half = length // 2
    first, middle = causal_conv1d(x[:, :half], weight, bias, "silu", None, state, True)
    second = causal_conv1d(x[:, half:], weight, bias, "silu", None, middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y)


def test_final_state_is_the_last_sequences() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6, 3), torch.randn(3, 4)
    state = torch.randn(4, 3, 3)
    seq_idx = torch.tensor(
        [[0, 0, 0, 1, 1, -1], [-1, 5, 5, 5, 5, 5], [-1] * 6, [0, 0, -1, -1, -1, -1]]
    )
    _, final = causal_conv1d(x, weight, None, None, seq_idx, state, True)
    expected = torch.zeros(4, 3, 3)
    expected[0, :, 1:] = x[0, 3:5].T  # a new sequence of two: the state given is not its own
    expected[1] = x[1, 3:6].T
    expected[2] = state[2]  # nothing but padding
    expected[3] = torch.cat([state[3, :, 2:], x[3, :2].T], 1)
    torch.testing.assert_close(final, expected)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    for seq_idx in (None, torch.tensor([[0, 0, 1, 1, 1], [-1, 0, 0, -1, -1]])):
        assert torch.autograd.gradcheck(
            lambda *inputs, ids=seq_idx: causal_conv1d(
                *inputs[:3], "silu", ids, inputs[3], return_final_state=True
            ),
            (x, weight, bias, state),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stands_at_padding_reaches_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 3, dtype=dtype)
    x[:, [0, 3]] = torch.nan
    x.requires_grad_()
    weight = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    y = causal_conv1d(x, weight, None, "silu", torch.tensor([[-1, 0, 0, -1, 1, 1]]))
    assert (y[:, [0, 3]] == 0).all()
    for gradient in torch.autograd.grad(y.sum(), (x, weight)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_every_time(threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    x = torch.randn(40, 50, 200, requires_grad=True)
    weight, bias = torch.randn(200, 4, requires_grad=True), torch.randn(200, requires_grad=True)
    runs = []
    for _ in range(3):
        y = causal_conv1d(x, weight, bias, "silu")
        runs.append([y, *torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@needs_kernel
@pytest.mark.parametrize("packed", [False, True])
def test_registered_with_torch_library(packed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, requires_grad=True)
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    state = torch.randn(2, 5, 3, requires_grad=True)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, -1]] * 2, dtype=torch.int32) if packed else None
    arguments = (x, weight, bias, seq_idx, state, True, 0)
    torch.library.opcheck(torch.ops.recsys_ssm.causal_conv1d.default, arguments)


def test_export() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv1d(5, 5, 4, groups=5)

        def forward(self, x: Tensor) -> Tensor:
            return causal_conv1d(x, self.conv.weight.squeeze(1), self.conv.bias, "silu")

    model, x = Model(), torch.randn(2, 6, 5)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: length}})
    longer = torch.randn(2, 9, 5)
    torch.testing.assert_close(program.module()(longer), model(longer))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 6)}, r"x must be \(B, L, E\)"),
        ({"weight": torch.zeros(5, 0)}, "W at least 1"),
        ({"weight": torch.zeros(4, 3)}, "weight must have shape"),
        ({"bias": torch.zeros(4)}, "bias must have shape"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.long)}, "seq_idx must have shape"),
        ({"seq_idx": torch.zeros(2, 6)}, "seq_idx must be an integer"),
        ({"initial_state": torch.zeros(2, 5, 3)}, "initial_state must have shape"),
        ({"x": torch.zeros(2, 6, 5, dtype=torch.long)}, "x must be floating point"),
        ({"activation": "relu"}, "activation must be None or 'silu'"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], words: str) -> None:
    arguments = {"x": torch.zeros(2, 6, 5), "weight": torch.zeros(5, 3), **changes}
    with pytest.raises(UserError, match=words):
        causal_conv1d(**arguments)


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_to_do(shape: tuple[int, int, int], packed: bool) -> None:
    x = torch.zeros(shape, requires_grad=True)
    weight = torch.zeros(shape[2], 3, requires_grad=True)
    seq_idx = torch.zeros(shape[:2], dtype=torch.long) if packed else None
    y, final = causal_conv1d(x, weight, None, "silu", seq_idx, return_final_state=True)
    assert y.shape == shape and final.shape == (shape[0], shape[2], 2)
    y.sum().backward()
    assert weight.grad is not None and (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base, weight = torch.randn(4, 3, 5, dtype=dtype), torch.randn(5, 3)
    layouts = [
        base.transpose(0, 1),
        base.transpose(1, 2).contiguous().transpose(1, 2),
        base[:1].expand(4, 3, 5),
        base[::2, ::2],
        base.flip(1)[:, :, ::2].repeat_interleave(2, 2)[..., :5],
    ]
    for x in layouts:
        torch.testing.assert_close(causal_conv1d(x, weight), causal_conv1d(x.clone(), weight))
    # A gradient that is one number seen everywhere.
    x = base.clone().requires_grad_()
    causal_conv1d(x, weight).sum().backward()
    expected = base.clone().requires_grad_()
    causal_conv1d(expected, weight).backward(torch.ones_like(base))
    torch.testing.assert_close(x.grad, expected.grad)


def test_autocast() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 5), torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_conv1d(x.bfloat16(), weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), causal_conv1d(x, weight), rtol=2e-2, atol=5e-2)
