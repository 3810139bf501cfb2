"""The intervals cover and the test errs as often as they say; by hand, against SciPy, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from recsys_ssm.reports.statistics import (
    estimate,
    half_widths,
    holm,
    paired_difference,
    paired_p_values,
)

SIMULATIONS = 20_000


@pytest.mark.parametrize("n", [3, 10, 100])
def test_the_interval_covers_the_mean_95_times_in_100(n: int) -> None:
    x = np.random.default_rng(n).normal(0.9, 0.05, (SIMULATIONS, n))
    covered = np.abs(x.mean(axis=1) - 0.9) <= half_widths(x)
    assert abs(covered.mean() - 0.95) < 0.015


@pytest.mark.parametrize("n", [3, 10, 100])
def test_no_difference_is_found_5_times_in_100(n: int) -> None:
    random = np.random.default_rng(n)
    seeds = random.normal(0, 0.05, (SIMULATIONS, n))  # what both models share
    first, second = (seeds + random.normal(0, 0.01, seeds.shape) for _ in range(2))
    p = paired_p_values(first - second)
    assert abs((p < 0.05).mean() - 0.05) < 0.01
    # Together with the correction: one of ten true null hypotheses is rejected in at most 5 of 100.
    families = p.reshape(-1, 10)
    rejected = [min(holm(family)) < 0.05 for family in families.tolist()]
    assert np.mean(rejected) < 0.065


def test_an_estimate_by_hand() -> None:
    result = estimate([1.0, 2.0, 3.0, math.nan])
    assert result.mean == 2 and result.n == 3
    assert result.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))  # t table, 2 df
    assert (result.low, result.high) == (2 - result.half_width, 2 + result.half_width)


def test_too_few_values_have_no_interval() -> None:
    assert math.isnan(estimate([]).mean) and estimate([]).n == 0
    one = estimate([0.5])
    assert one.mean == 0.5 and one.n == 1 and math.isnan(one.half_width)


def test_a_paired_difference_is_scipys_over_the_common_seeds() -> None:
    random = np.random.default_rng(0)
    first = dict(enumerate(random.random(8)))
    second = {seed: random.random() for seed in range(3, 12)}
    result = paired_difference(first, second)
    a, b = ([values[seed] for seed in range(3, 8)] for values in (first, second))
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval()
    assert result.n == 5 and result.p_value == pytest.approx(expected.pvalue)
    assert result.mean - result.half_width == pytest.approx(interval.low)
    assert result.mean + result.half_width == pytest.approx(interval.high)


def test_differences_without_spread() -> None:
    same = dict.fromkeys(range(5), 1.0)
    assert paired_difference(same, same).p_value == 1
    apart = paired_difference(dict.fromkeys(range(5), 2.0), same)
    assert apart.mean == 1 and apart.half_width == 0
    assert math.isnan(apart.p_value), "a t-test needs some spread"
    rounding = paired_difference({0: 0.3, 1: 0.3, 2: 0.3}, {0: 0.1, 1: 0.1 + 1e-17, 2: 0.1})
    assert math.isnan(rounding.p_value)
    two = paired_difference({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5 - 1e-6})
    assert two.n == 2 and two.half_width < 1e-4 and math.isnan(two.p_value), (
        "two seeds are not a test"
    )
    none = paired_difference({0: 1.0}, {0: 0.5, 1: 3.0})
    assert none.mean == 0.5 and none.n == 1 and math.isnan(none.p_value)


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .04, never below an earlier one.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    with_gap = holm([0.01, math.nan, 0.04])
    assert with_gap[0] == pytest.approx(0.02) and math.isnan(with_gap[1])
    assert with_gap[2] == pytest.approx(0.04)
    assert holm([]) == []
