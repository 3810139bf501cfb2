"""Test HSTU against its equations with dense rows, its size, its biases and what each event sees."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.models.backbones.base import Clock, gaps_before, time_buckets
from recsys_ssm.models.backbones.hstu import HSTU, HSTUBlock


def model(**options: object) -> HSTU:
    torch.manual_seed(0)
    made = HSTU(**{"d_model": 8, "n_layers": 2, "max_length": 7, **options}).double().eval()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def clock_of(event: Tensor, asked: Tensor) -> Clock:
    return Clock(event, asked, torch.zeros(event.shape, dtype=torch.float64))


def plain_layer(
    b: HSTUBlock, norm: torch.nn.Module, x: Tensor, event: list[int], asked: list[int]
) -> Tensor:
    """Return the outputs (L, D) of one history, one pair of events at a time."""
    L, D = x.shape
    P = D // b.nhead
    u, v, q, k = F.silu(norm(x) @ b.in_proj.weight.T).split(D, dim=1)
    out = torch.zeros(L, D, dtype=x.dtype)
    for i in range(L):
        for h in range(b.nhead):
            own = slice(h * P, (h + 1) * P)
            for j in range(i + 1):
                score = q[i, own] @ k[j, own]
                distance = min(i - j, b.max_length - 1)
                score = score + b.position_bias[b.max_length - 1 + distance]
                if b.time_bias is not None:
                    bucket = int(math.log(max(1, asked[i] - event[j])) / 0.301)
                    score = score + b.time_bias[min(bucket, b.time_bias.numel() - 1)]
                out[i, own] += F.silu(score) / b.max_length * v[j, own]
    return x + b.out_proj(b.norm(out) * u)


def plain(m: HSTU, x: Tensor, event: list[int], asked: list[int]) -> Tensor:
    for layer in m.layers:
        x = plain_layer(layer.mixer, layer.norm, x, event, asked)
    return m.final_norm(x)


@pytest.mark.parametrize("n_buckets", [4, 128])
@pytest.mark.parametrize("time_bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_equations(n_buckets: int, time_bias: bool) -> None:
    """Two packed histories; times are far apart, equal, and in the wrong order."""
    m = model(time_bias=time_bias, n_buckets=n_buckets)
    x = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    seq_idx = torch.tensor([[0] * 9 + [1] * 2 + [-1]])
    event = [5, 9, 9, 40, 90_000, 90_001, 90_500, 10**7, 10**9, 3, 2, 0]
    asked = [*event[1:9], 2 * 10**9, 2, 80, 0]
    clock = clock_of(torch.tensor([event]), torch.tensor([asked]))
    found = m(x, seq_idx, None, clock if time_bias else None)[0, :11]
    expected = torch.cat(
        (plain(m, x[0, :9], event[:9], asked[:9]), plain(m, x[0, 9:11], event[9:], asked[9:]))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    leaves = [x, *m.parameters()]
    have, want = (torch.autograd.grad(out.sin().sum(), leaves) for out in (found, expected))
    torch.testing.assert_close(have, want, rtol=0, atol=1e-10)


def test_published_parameter_count() -> None:
    """21,028 a layer at d_model 64, two heads, length 50; without the time bias 129 fewer. The last norm has 128."""
    for time_bias, size in ((True, 21_028), (False, 21_028 - 129)):
        made = HSTU(n_layers=3, time_bias=time_bias)
        assert sum(p.numel() for p in made.parameters()) == 3 * size + 128


def test_no_output_depends_on_the_times_of_later_events() -> None:
    """Where the moment is that of the event itself, as without ``model.query_time``."""
    m = model(time_bias=True)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    event = torch.tensor([[10, 20, 40, 80, 160, 320]])
    later = event.clone()
    later[:, 4:] *= 50
    before, after = (m(x, None, None, clock_of(times, times)) for times in (event, later))
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(-1).min() > 1e-4
    told = m(x, None, None, clock_of(event, F.pad(later[:, 1:], (0, 1), value=9999)))
    assert (told[:, 3] - before[:, 3]).abs().max() > 1e-4


def test_buckets_and_gaps() -> None:
    spans = torch.tensor([-5, 0, 1, 2, 3, 60, 3600, 10**9, 10**18])
    expected = [int(math.log(max(1, s)) / 0.301) for s in spans.tolist()]
    assert time_buckets(spans, 128).tolist() == [min(b, 128) for b in expected]
    assert time_buckets(spans, 10).max() == 10
    event = torch.tensor([[5, 9, 9, 100, 90, 7, 0]])
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, -1]])
    assert gaps_before(event, seq_idx).tolist() == [[0, 4, 0, 0, 0, 0, 0]]
    assert gaps_before(event, None).tolist() == [[0, 4, 0, 91, 0, 0, 0]]


def test_a_step_without_times_is_refused_where_they_are_used() -> None:
    m = model(time_bias=True)
    with pytest.raises(NotImplementedError, match="needs the times of all events"):
        m.step(torch.randn(1, 8, dtype=torch.float64), m.init_state(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nhead": 3}, "nhead=3; change one of them"),
        ({"max_length": 0}, "max_length=0"),
        ({"n_buckets": 0}, "n_buckets=0"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HSTU(**{"d_model": 8, **options})
