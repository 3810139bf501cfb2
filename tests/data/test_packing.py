"""Windows of histories and their packing into rows; tests of whole batches are in test_sequences.py."""

from __future__ import annotations

import numpy as np
import pytest

from recsys_ssm.data.packing import Windows, join_ranges, pack


def test_windows_by_arithmetic_equal_those_one_by_one():
    first, stop = np.array([0, 10, 30]), np.array([1, 17, 32])
    windows = Windows(first, stop, 4, prefixes=True)
    one_by_one = [
        (max(f, t - 4), t) for f, s in zip(first, stop, strict=True) for t in range(f + 1, s + 1)
    ]
    assert len(windows) == len(one_by_one) == 10
    assert list(zip(*windows.at(np.arange(10)), strict=True)) == one_by_one
    assert windows.lengths.tolist() == [stop - start for start, stop in one_by_one]


def test_ranges_are_joined():
    assert join_ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert join_ranges(np.array([], dtype=int), np.array([], dtype=int)).size == 0


def first_fit_decreasing(lengths, row_length) -> int:
    left: list[int] = []
    for length in lengths:
        for row, room in enumerate(left):
            if room >= length:
                left[row] -= length
                break
        else:
            left.append(row_length - length)
    return len(left)


@pytest.mark.parametrize("seed", range(20))
def test_packing_overfills_no_row_and_is_as_tight_as_first_fit_decreasing(seed):
    generator = np.random.default_rng(seed)
    row_length = int(generator.integers(1, 60))
    n = int(generator.integers(1, 400))
    if seed % 2:
        lengths = generator.integers(1, row_length + 1, n)
    else:
        lengths = np.minimum(generator.geometric(0.2, n), row_length)
    lengths = np.sort(lengths)[::-1]
    rows = pack(lengths, row_length)
    filled = np.bincount(rows, weights=lengths)
    assert rows.shape == (n,) and filled.max() <= row_length and filled.min() > 0
    bound = max(-(-int(lengths.sum()) // row_length), int((2 * lengths > row_length).sum()))
    assert bound <= filled.size <= first_fit_decreasing(lengths, row_length) * 1.02 + 1
