"""Test the long filter beside Mamba-2 against its equation, its size, and what each option does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recsys_ssm.models.backbones.filter_mamba2 import (
    FilterMamba2,
    FilterMamba2Block,
    window_averages,
)


def block(**options: object) -> FilterMamba2Block:
    torch.manual_seed(0)
    made = FilterMamba2Block(d_model=8, d_state=4, headdim=4, **options).double().eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def plain(b: FilterMamba2Block, x: Tensor) -> Tensor:
    """Return the outputs (L, D) of one history, one token and one distance at a time."""
    K = b.filter.shape[1]
    y = b.mamba2(x[None])[0]
    share = torch.sigmoid(b.share)
    out = []
    for t in range(x.shape[0]):
        f = sum(b.filter[:, K - 1 - k] * x[t - k] for k in range(min(K, t + 1)))
        if b.adapt is not None:
            f = f * (1 + b.adapt.weight @ x[t])
        out.append((1 - share) * y[t] + share * f)
    return torch.stack(out)


@pytest.mark.parametrize("filter_length", [1, 3, 50])
@pytest.mark.parametrize("adaptive", [True, False])
def test_outputs_and_gradients_are_those_of_the_equations(
    filter_length: int, adaptive: bool
) -> None:
    b = block(filter_length=filter_length, adaptive=adaptive)
    x = torch.randn(1, 11, 8, dtype=torch.float64, requires_grad=True)
    seq_idx = torch.tensor([[0] * 6 + [1] * 4 + [-1]])
    expected = torch.cat((plain(b, x[0, :6]), plain(b, x[0, 6:10])))
    found = b(x, seq_idx)[0, :10]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    leaves = [x, *b.parameters()]
    have, want = (torch.autograd.grad(out.sin().sum(), leaves) for out in (found, expected))
    torch.testing.assert_close(have, want, rtol=0, atol=1e-9)


def test_filters_begin_as_averages_over_windows_of_all_lengths() -> None:
    w = window_averages(16, 50)
    torch.testing.assert_close(w.sum(1), torch.ones(16))
    assert (w.diff(dim=1) > 0).all() and (w >= 0).all()
    mean = (w * torch.arange(49, -1, -1)).sum(1)
    assert (mean.diff() > 0).all() and mean[0] < 1 < 15 < mean[-1]


def test_parameter_count_at_the_default_size() -> None:
    """A layer is a Mamba-2 block, 50 weights a channel, a share a channel, the scaling and a feed-forward network."""
    D, E, X, H, K = 64, 128, 128 + 2 * 64, 4, 50
    mamba2 = D * (E + X + H) + 5 * X + 3 * H + E + E * D
    layer = mamba2 + D * K + D + D * D + 2 * 4 * D * D + 4 * D + D + 2 * 2 * D
    assert sum(p.numel() for p in FilterMamba2().parameters()) == 2 * layer


@pytest.mark.parametrize(
    ("options", "message"),
    [({"filter_length": 0}, "filter_length=0: give at least 1"), ({"share": 1.0}, "share=1.0")],
)
def test_impossible_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FilterMamba2(**options)
