"""Means over seeds with their uncertainty, and differences between models that shared the seeds.

What varies from seed to seed is the training *and* the test users, so two models that saw the same
seeds are compared seed by seed: what makes a seed easy or hard for both drops out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


class Estimate(NamedTuple):
    """A mean over ``n`` seeds and its confidence interval, ``mean ± half_width``."""

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
    """A mean difference over the ``n`` seeds both have, and the paired t-test's two-sided p-value."""

    mean: float
    half_width: float
    p_value: float
    n: int


def estimate(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean and Student's t interval of one value a seed.

    Args:
        values: ``(n,)``; those that are not finite (a run without that metric) are left out.
        confidence: coverage of the interval.

    Returns:
        ``mean`` is NaN without values; ``half_width`` is NaN with fewer than two.
    """
    x = _finite(values)
    return Estimate(
        float(x.mean()) if x.size else np.nan, float(half_widths(x, confidence)), x.size
    )


def half_widths(x: NDArray[np.float64], confidence: float = 0.95) -> NDArray[np.float64]:
    """Half the width of the t interval of the mean over the last axis; NaN for fewer than two values."""
    n = x.shape[-1]
    if n < 2:
        return np.full(x.shape[:-1], np.nan)
    quantile = stats.t.ppf((1 + confidence) / 2, n - 1)
    result: NDArray[np.float64] = quantile * x.std(axis=-1, ddof=1) / np.sqrt(n)
    return result


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95
) -> Difference:
    """``first - second`` over the seeds that both have.

    Args:
        first, second: one value a seed, by seed.
        confidence: coverage of the interval of the mean difference.

    Returns:
        ``p_value`` is NaN with fewer than two common seeds, and 1 where the two never differ.
    """
    seeds = sorted(first.keys() & second.keys())
    differences = _finite([first[seed] - second[seed] for seed in seeds])
    mean, half_width, n = estimate(differences, confidence)
    return Difference(mean, half_width, float(paired_p_values(differences)), n)


def paired_p_values(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two-sided p-values of the paired t-test over the last axis; NaN for fewer than two differences."""
    n = differences.shape[-1]
    if n < 2:
        return np.full(differences.shape[:-1], np.nan)
    error = differences.std(axis=-1, ddof=1) / np.sqrt(n)
    mean = differences.mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p: NDArray[np.float64] = 2 * stats.t.sf(np.abs(mean / error), n - 1)
    return np.where((mean == 0) & (error == 0), 1.0, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for the number of comparisons (Holm, 1979): compare them with the level itself.

    NaN is no comparison: it stays NaN and is not counted.
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
