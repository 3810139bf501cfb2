"""Test Hydra: published sizes, packed rows, both directions, even convolution widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recsys_ssm.models.backbones.hydra import HydraBlock
from recsys_ssm.ops.causal_conv1d import same_conv1d


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("d_conv", "norms"), [(4, 3), (5, 1)])
def test_hydra4rec_layer_has_the_published_size(d_conv: int, norms: int) -> None:
    block = HydraBlock(d_model=64, d_state=32, headdim=64, d_conv=d_conv)
    feed_forward = count(nn.Linear(64, 256)) + count(nn.Linear(256, 64))
    assert count(block) + feed_forward + norms * count(nn.LayerNorm(64)) == 68_166


@pytest.mark.parametrize("d_conv", [1, 4, 5])
@pytest.mark.parametrize("ngroups", [1, 2])
def test_packed_equals_padded_equals_alone(d_conv: int, ngroups: int) -> None:
    torch.manual_seed(0)
    block = HydraBlock(d_model=8, d_state=5, headdim=4, d_conv=d_conv, ngroups=ngroups).double()
    lengths = [3, 1, 6, 2]
    alone = [torch.randn(1, length, 8, dtype=torch.float64) for length in lengths]
    expected = [block(x) for x in alone]

    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    packed = block(torch.cat(alone, 1), ids[None])
    torch.testing.assert_close(packed, torch.cat(expected, 1))
    for left in (False, True):
        rows, seq_idx = torch.randn(4, 7, 8, dtype=torch.float64), torch.full((4, 7), -1)
        places = [slice(7 - n, 7) if left else slice(0, n) for n in lengths]
        for row, (place, x) in enumerate(zip(places, alone, strict=True)):
            rows[row, place], seq_idx[row, place] = x[0], 0
        out = block(rows, seq_idx)
        for row, (place, y) in enumerate(zip(places, expected, strict=True)):
            torch.testing.assert_close(out[row, place], y[0])


def test_every_position_sees_every_other() -> None:
    torch.manual_seed(0)
    block = HydraBlock(d_model=8, d_state=4, headdim=4, d_conv=3).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    for t in range(9):
        (grad,) = torch.autograd.grad(block(x)[0, t].sum(), x)
        assert (grad[0].abs().amax(-1) > 1e-12).all()


def test_an_even_width_looks_further_back_than_ahead() -> None:
    """Of the L+1 outputs of ``Conv1d(padding=2)`` at width 4, the first L are kept."""
    torch.manual_seed(0)
    block = HydraBlock(d_model=8, d_state=4, headdim=4, d_conv=4).double()
    x = torch.randn(2, 6, block.d_conved, dtype=torch.float64)
    expected = block.conv1d(x.transpose(1, 2))[..., :6].transpose(1, 2)
    found = same_conv1d(x, block.conv1d.weight.squeeze(1), block.conv1d.bias)
    torch.testing.assert_close(found, expected)


def test_it_cannot_go_step_by_step() -> None:
    block = HydraBlock(d_model=8, d_state=4, headdim=4)
    with pytest.raises(NotImplementedError):
        block.init_state(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"headdim": 5}, "headdim=5"), ({"headdim": 4, "ngroups": 3}, "ngroups=3")],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HydraBlock(d_model=8, **options)
