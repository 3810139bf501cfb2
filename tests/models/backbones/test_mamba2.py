"""Test Mamba-2: published sizes, packed rows, steps, precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recsys_ssm.models.backbones.mamba2 import GatedRMSNorm, Mamba2, Mamba2Block


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def feed_forward(d: int) -> int:
    return count(nn.Linear(d, 4 * d)) + count(nn.Linear(4 * d, d))


def test_2mamba4rec_layer_has_the_published_size() -> None:
    block = Mamba2Block(d_model=64, d_state=128, headdim=4)
    assert count(block) + feed_forward(64) + 3 * count(nn.LayerNorm(64)) == 78_624


@pytest.mark.parametrize("ngroups", [1, 2])
def test_packed_equals_padded_equals_alone(ngroups: int) -> None:
    torch.manual_seed(0)
    block = Mamba2Block(d_model=8, d_state=5, headdim=4, ngroups=ngroups).double()
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


def test_steps_equal_forward() -> None:
    torch.manual_seed(0)
    backbone = Mamba2(
        d_model=16, n_layers=2, d_state=8, headdim=8, ngroups=2, residual=True
    ).double()
    tokens = torch.randn(3, 11, 16, dtype=torch.float64)
    expected = backbone(tokens)
    state = backbone.init_state(3)
    for t in range(11):
        out, state = backbone.step(tokens[:, t], state)
        torch.testing.assert_close(out, expected[:, t])


def test_a_step_leaves_its_state_alone() -> None:
    block = Mamba2Block(d_model=8, d_state=4, headdim=4)
    state = block.init_state(2)
    before = [tensor.clone() for tensor in state]
    block.step(torch.randn(2, 8), state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_states_are_float32_under_bfloat16() -> None:
    block = Mamba2Block(d_model=8, d_state=4, headdim=4).bfloat16()
    state = block.init_state(2)
    out, state = block.step(torch.randn(2, 8, dtype=torch.bfloat16), state)
    assert state.ssm.dtype == torch.float32 and out.dtype == torch.bfloat16


def test_the_gate_comes_before_the_norm_unless_told() -> None:
    torch.manual_seed(0)
    y, z = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    gated = y * nn.functional.silu(z)
    expected = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(GatedRMSNorm(6).double()(y, z), expected)
    expected = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * nn.functional.silu(z)
    torch.testing.assert_close(GatedRMSNorm(6, norm_before_gate=True).double()(y, z), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"headdim": 5}, "headdim=5"), ({"headdim": 4, "ngroups": 3}, "ngroups=3")],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mamba2Block(d_model=8, **options)
