"""Check that ``seq_idx`` means the same to every operator: equal neighbours are one sequence, -1 ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops import (
    causal_conv1d,
    each_sequence,
    same_conv1d,
    selective_scan,
    seq_idx_of,
    sequences_of,
    ssd,
)

B, L, E, N = 2, 50, 8, 4
ROWS = torch.full((B, L), -1)
# A gap inside what carries one number, a number used again, sequences of one position, padding on the left.
for row, pieces in enumerate((((0, 7, 0), (9, 30, 0), (30, 31, 5), (31, 50, 0)),
                              ((4, 20, 3), (21, 22, 3), (22, 45, 1)))):  # fmt: skip
    for start, end, name in pieces:
        ROWS[row, start:end] = name
PIECES = [(0, 0, 7), (0, 9, 30), (0, 30, 31), (0, 31, 50), (1, 4, 20), (1, 21, 22), (1, 22, 45)]

g = torch.Generator().manual_seed(0)
WEIGHT, A, HEADS = (
    torch.randn(E, 4, generator=g),
    -torch.rand(E, N, generator=g),
    -torch.rand(2, generator=g),
)

Operator = Callable[[Tensor, Tensor | None], Tensor]


def scan(x: Tensor, seq_idx: Tensor | None) -> Tensor:
    u, dt, BC = x.split([E, E, 2 * N], -1)
    return selective_scan(u, dt, A.to(x), *BC.chunk(2, -1), dt_softplus=True, seq_idx=seq_idx)


def dual(x: Tensor, seq_idx: Tensor | None) -> Tensor:
    u, dt, _, BC = x.split([E, 2, E - 2, 2 * N], -1)
    grouped = (half.unsqueeze(2) for half in BC.chunk(2, -1))
    return ssd(
        u.unflatten(-1, (2, E // 2)), dt, HEADS.to(x), *grouped, dt_softplus=True, seq_idx=seq_idx
    ).flatten(2)


def causal(x: Tensor, seq_idx: Tensor | None) -> Tensor:
    return causal_conv1d(x[..., :E], WEIGHT.to(x), activation="silu", seq_idx=seq_idx)


def centred(x: Tensor, seq_idx: Tensor | None) -> Tensor:
    return same_conv1d(x[..., :E], WEIGHT.to(x), activation="silu", seq_idx=seq_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "plain"])
@pytest.mark.parametrize("operator", [scan, dual, causal, centred])
def test_a_row_is_its_sequences_one_at_a_time(operator: Operator, dtype: torch.dtype) -> None:
    x = torch.randn(B, L, 2 * E + 2 * N, dtype=dtype, generator=g, requires_grad=True)
    y = operator(x, ROWS)
    dy = torch.randn(y.shape, dtype=dtype, generator=g)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert (y[ROWS < 0] == 0).all()
    assert (dx[ROWS < 0] == 0).all()
    for row, start, end in PIECES:
        alone = x[row : row + 1, start:end].detach().requires_grad_()
        expected = operator(alone, None)
        (dalone,) = torch.autograd.grad(expected, alone, dy[row : row + 1, start:end])
        torch.testing.assert_close(y[row, start:end], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dx[row, start:end], dalone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "plain"])
def test_the_initial_state_is_the_first_sequences_alone(dtype: torch.dtype) -> None:
    def inputs(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=g)

    ids = torch.tensor([[-1, -1, 2, 2, -1, 2, 2]])
    u, dt, b, c = inputs(1, 7, E), inputs(1, 7, E).abs(), inputs(1, 7, N), inputs(1, 7, N)
    calls: list[tuple[Any, Tensor]] = [
        (lambda s: selective_scan(u, dt, A.to(dtype), b, c, seq_idx=ids, initial_state=s),
         inputs(1, E, N)),
        (lambda s: ssd(u.unflatten(-1, (2, 4)), dt[..., :2], HEADS.to(dtype), b.unsqueeze(2),
                       c.unsqueeze(2), seq_idx=ids, initial_state=s).flatten(2),
         inputs(1, 2, 4, N)),
        (lambda s: causal_conv1d(u, WEIGHT.to(dtype), seq_idx=ids, initial_state=s),
         inputs(1, E, 3)),
    ]  # fmt: skip
    for call, state in calls:
        moved = (call(state) - call(torch.zeros_like(state))).abs().sum(-1)[0]
        assert (moved[2:4] > 0).all()
        assert (moved[[0, 1, 4, 5, 6]] == 0).all()


# each_sequence: the arguments of an operator (B, L, …), the others, and the shape of a state


def operands(dtype: torch.dtype) -> list[tuple[Any, dict[str, Tensor], dict[str, Any], list[int]]]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(B, L, *shape, dtype=dtype, generator=g, requires_grad=True)

    return [
        (
            selective_scan,
            {"u": draw(E), "dt": draw(E), "B": draw(N), "C": draw(N), "z": draw(E)},
            {"A": A.to(dtype), "dt_softplus": True},
            [E, N],
        ),
        (
            ssd,
            {"x": draw(2, E // 2), "dt": draw(2), "B": draw(1, N), "C": draw(1, N)},
            {"A": HEADS.to(dtype), "dt_softplus": True},
            [2, E // 2, N],
        ),
        (causal_conv1d, {"x": draw(E)}, {"weight": WEIGHT.to(dtype), "activation": "silu"}, [E, 3]),
    ]


def test_where_the_sequences_are() -> None:
    assert list(zip(*(x.tolist() for x in sequences_of(ROWS)), strict=True)) == [
        (row, start, end - start) for row, start, end in PIECES
    ]
    for nothing in (torch.full((2, 3), -1), torch.zeros(0, 3).long(), torch.zeros(2, 0).long()):
        assert all(x.numel() == 0 for x in sequences_of(nothing))


def test_lengths_end_to_end() -> None:
    assert seq_idx_of(torch.tensor([0, 2, 2, 5])).tolist() == [[0, 0, 2, 2, 2]]
    assert seq_idx_of(torch.tensor([0])).shape == (1, 0)
    for wrong in ([1, 2], [0, 3, 2], []):
        with pytest.raises(UserError, match="rise from 0"):
            seq_idx_of(torch.tensor(wrong, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "plain"])
@pytest.mark.parametrize("which", range(3), ids=["selective_scan", "ssd", "causal_conv1d"])
def test_each_sequence_has_states_of_its_own(which: int, dtype: torch.dtype) -> None:
    operator, over_time, others, size = operands(dtype)[which]
    states = torch.randn(len(PIECES), *size, dtype=dtype, generator=g, requires_grad=True)
    y, final = each_sequence(operator, over_time, ROWS, initial_state=states, **others)
    leaves = [*over_time.values(), states]
    dy, dfinal = (torch.randn(x.shape, dtype=x.dtype, generator=g) for x in (y, final))
    found = torch.autograd.grad((y, final), leaves, (dy, dfinal))
    assert (y[ROWS < 0] == 0).all()
    expected = [torch.zeros_like(x) for x in leaves]
    for i, (row, start, end) in enumerate(PIECES):
        alone = {name: x[row : row + 1, start:end] for name, x in over_time.items()}
        y_i, final_i = operator(
            **alone, **others, initial_state=states[i : i + 1], return_final_state=True
        )
        torch.testing.assert_close(y[row, start:end], y_i[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(final[i], final_i[0], rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(
            (y_i, final_i), leaves, (dy[row : row + 1, start:end], dfinal[i : i + 1])
        )
        expected = [a + b for a, b in zip(expected, gradients, strict=True)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    # Without states of its own, the output is that of the packed rows.
    alike = operator(**over_time, **others, seq_idx=ROWS)
    torch.testing.assert_close(
        each_sequence(operator, over_time, ROWS, **others)[0], alike, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("which", range(3), ids=["selective_scan", "ssd", "causal_conv1d"])
def test_rows_without_a_sequence(which: int) -> None:
    operator, over_time, others, size = operands(torch.float32)[which]
    y, final = each_sequence(operator, over_time, torch.full((B, L), -1), **others)
    assert y.shape[:2] == (B, L) and not y.any()
    assert final.shape == (0, *size)


def test_what_does_not_fit_is_told() -> None:
    operator, over_time, others, size = operands(torch.float32)[0]
    with pytest.raises(UserError, match=r"u is \(2, 50, 8\): expected \(2, 49, …\)"):
        each_sequence(operator, over_time, ROWS[:, 1:], **others)
    with pytest.raises(UserError, match="initial_state has 2 states for 7 sequences"):
        each_sequence(operator, over_time, ROWS, initial_state=torch.zeros(2, *size), **others)
