"""Estimate means over seeds with intervals, and test differences between models on the same seeds.

The training *and* the test users vary from seed to seed. Two models with the same seeds are compared seed by seed, so
that the effect of a seed on both models cancels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

MIN_PAIRS = 3
"""Fewest common seeds that a test is made on: the spread of two differences says next to nothing."""


class Estimate(NamedTuple):
    """Hold a mean over ``n`` seeds with its confidence interval, ``mean ± half_width``."""

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


class Difference(NamedTuple):
    """Hold a mean difference over the ``n`` common seeds, and the two-sided p-value of the paired t-test."""

    mean: float
    half_width: float
    p_value: float
    n: int


def estimate(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the mean of one value for each seed, with Student's t interval.

    Args:
        values: ``(n,)``; values that are not finite (a run without that metric) are left out.
        confidence: coverage of the interval.

    Returns:
        ``mean`` is NaN without values; ``half_width`` is NaN with fewer than two.
    """
    x = _finite(values)
    return Estimate(
        float(x.mean()) if x.size else np.nan, float(half_widths(x, confidence)), x.size
    )


def half_widths(x: NDArray[np.float64], confidence: float = 0.95) -> NDArray[np.float64]:
    """Return half the width of the t interval of the mean over the last axis; NaN for fewer than two values."""
    n = x.shape[-1]
    if n < 2:
        return np.full(x.shape[:-1], np.nan)
    result: NDArray[np.float64] = stats.t.ppf((1 + confidence) / 2, n - 1) * stats.sem(x, axis=-1)
    return result


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95
) -> Difference:
    """Return ``first - second`` over the common seeds.

    Args:
        first, second: one value for each seed, by seed.
        confidence: coverage of the interval of the mean difference.

    Returns:
        ``p_value`` is that of :func:`paired_p_values`.
    """
    seeds = sorted(first.keys() & second.keys())
    differences = _finite([first[seed] - second[seed] for seed in seeds])
    mean, half_width, n = estimate(differences, confidence)
    return Difference(mean, half_width, float(paired_p_values(differences)), n)


def paired_p_values(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return two-sided p-values of the paired t-test over the last axis.

    A value is 1 where all differences are zero. It is NaN, no test, for fewer than ``MIN_PAIRS`` differences and where
    the differences are equal up to rounding: without spread the t-test is undefined.
    """
    if differences.shape[-1] < MIN_PAIRS:
        return np.full(differences.shape[:-1], np.nan)
    largest = np.abs(differences).max(axis=-1)
    spread = np.ptp(differences, axis=-1)
    with (
        warnings.catch_warnings()
    ):  # SciPy warns of differences without spread, which are answered below
        warnings.simplefilter("ignore", RuntimeWarning)
        p = np.asarray(stats.ttest_1samp(differences, 0.0, axis=-1).pvalue)
    p = np.where(spread <= 1e-9 * largest, np.nan, p)
    return np.where(largest == 0, 1.0, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the number of comparisons (Holm, 1979), to be compared with the level itself.

    NaN is not a comparison: it stays NaN and is not counted.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    valid = np.flatnonzero(~np.isnan(p))
    order = valid[np.argsort(p[valid], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate((p[order] * factors).clip(max=1.0))
    return adjusted.tolist()


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    return x[np.isfinite(x)]
