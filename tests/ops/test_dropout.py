"""Check the share of dropped elements and the scale of the others."""

from __future__ import annotations

import pytest
import torch

from recsys_ssm.errors import UserError
from recsys_ssm.ops.dropout import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.9])
def test_share_scale_and_gradient(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    n = x.numel()
    assert (y == 0).sum().item() == pytest.approx(p * n, abs=5 * (n * p * (1 - p)) ** 0.5)
    assert y.dtype == dtype
    assert set(y.unique().tolist()) == {
        0.0,
        torch.tensor(1 / (1 - round(p * 65536) / 65536), dtype=dtype).item(),
    }
    y.backward(torch.full_like(y, 2))
    torch.testing.assert_close(x.grad, 2 * y.detach(), rtol=0, atol=0)


def test_neighbours_and_rows_are_dropped_independently() -> None:
    """Check that the four elements of one 64-bit draw are independent of each other."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(250_000, 8), 0.3) > 0).double()
    correlation = torch.corrcoef(kept.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / 250_000**0.5


def test_a_seed_decides() -> None:
    x = torch.randn(7, 13)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append((dropout(x, 0.4), torch.rand(())))
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert not torch.equal(draws[0][0], draws[2][0])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 0, 2), (2, 3, 5)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert dropout(x, 0.5).shape == x.shape


def test_of_a_view_that_is_not_contiguous() -> None:
    torch.manual_seed(0)
    x = torch.arange(1.0, 13).view(3, 4).T
    y = dropout(x, 0.5)
    assert ((y == 0) | (y == 2 * x)).all() and (y == 0).any() and (y != 0).any()


def test_none_all_and_not_in_training() -> None:
    x = torch.randn(50)
    assert torch.equal(dropout(x, 0.0), x)
    assert not dropout(x, 1.0).any()
    assert torch.equal(dropout(x, 0.5, training=False), x)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert not torch.equal(Dropout(0.5)(x), x)
    with pytest.raises(UserError, match="between 0 and 1"):
        dropout(x, 1.5)
