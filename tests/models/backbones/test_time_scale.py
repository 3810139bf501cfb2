"""Test steps that are scaled by the time since the event before: Mamba, Mamba-2 and its long filter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from recsys_ssm.models.backbones.base import Backbone, Clock, TimeScale
from recsys_ssm.models.backbones.filter_mamba2 import FilterMamba2
from recsys_ssm.models.backbones.mamba import Mamba
from recsys_ssm.models.backbones.mamba2 import Mamba2

SIZES: list[tuple[type[Backbone], dict[str, Any]]] = [
    (Mamba, {"d_state": 4, "d_conv": 4}),
    (Mamba2, {"d_state": 4, "headdim": 4}),
    (FilterMamba2, {"d_state": 4, "headdim": 4}),
]


def built(kind: type[Backbone], sizes: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(d_model=8, n_layers=2, **sizes, **options).double().eval()


def clock_of(gap: torch.Tensor) -> Clock:
    zeros = torch.zeros(gap.shape, dtype=torch.long)
    return Clock(zeros, zeros, gap)


def scales_of(model: torch.nn.Module) -> list[TimeScale]:
    return [part for part in model.modules() if isinstance(part, TimeScale)]


@pytest.mark.parametrize(("kind", "sizes"), SIZES)
@pytest.mark.parametrize("init", ["own", "normal"])
def test_in_the_beginning_times_change_nothing(
    kind: type[Backbone], sizes: dict[str, Any], init: str
) -> None:
    model = built(kind, sizes, scale_by_time=True, init=init)
    x, gap = torch.randn(2, 6, 8).double(), torch.rand(2, 6).double()
    assert model.uses_times
    torch.testing.assert_close(model(x, None, None, clock_of(gap)), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "sizes"), SIZES)
def test_steps_are_scaled_and_no_earlier_output_changes(
    kind: type[Backbone], sizes: dict[str, Any]
) -> None:
    model = built(kind, sizes, scale_by_time=True)
    for scale in scales_of(model):
        scale.weight.data.normal_()
    x, gap = torch.randn(1, 7, 8).double(), torch.rand(1, 7).double()
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    before = model(x, seq_idx, None, clock_of(gap))
    longer = gap.clone()
    longer[:, 2] += 3
    moved = (model(x, seq_idx, None, clock_of(longer)) - before).abs().amax(-1)[0]
    assert moved[[0, 1, 4, 5, 6]].max() == 0 and moved[2:4].min() > 1e-8
    before.sin().sum().backward()
    for scale in scales_of(model):
        assert scale.weight.grad is not None and scale.weight.grad.abs().max() > 0
        assert scale.linear.weight.grad is not None


def test_a_scaled_step_of_mamba2_is_that_of_its_operator() -> None:
    """With one factor for all tokens the block is one whose steps are that much longer."""
    model = built(Mamba2, SIZES[1][1], scale_by_time=True)
    (first, *_) = model.layers
    block = first.mixer
    x = torch.randn(2, 5, 8).double()
    for factor in (-0.4, 0.7):
        block.time_scale.bias.data.fill_(factor)
        scaled = block(x, type(model).context(model, x, None, clock_of(torch.zeros(2, 5))))
        # softplus(dt + bias) · 2^tanh(factor), from a block without scaling whose dt is so by its bias.
        z, xBC, dt = block._split(x)
        steps = F.softplus(dt + block.dt_bias) * 2 ** torch.tanh(torch.tensor(factor)).double()
        want = steps + torch.log(-torch.expm1(-steps))  # its inverse softplus
        other = built(Mamba2, SIZES[1][1]).layers[0].mixer
        other.load_state_dict(
            {k: v for k, v in block.state_dict().items() if "time_scale" not in k}
        )
        other.dt_bias.data.zero_()
        other._split = lambda _, z=z, xBC=xBC, want=want: (z, xBC, want)
        torch.testing.assert_close(scaled, other(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "sizes"), SIZES)
def test_a_step_without_a_time_is_refused(kind: type[Backbone], sizes: dict[str, Any]) -> None:
    model = built(kind, sizes, scale_by_time=True)
    with pytest.raises(NotImplementedError, match="needs the time of each event"):
        model.step(torch.randn(1, 8).double(), model.init_state(1))
