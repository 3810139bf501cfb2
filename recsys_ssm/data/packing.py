"""Cut windows of histories and pack them into rows so that few positions are empty; plain NumPy.

Legend: S samples (a window of a history each), M of them in a batch of B rows of L positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def join_ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Concatenate the ranges ``start[i], start[i] + 1, …`` of ``length[i]`` numbers each; int64."""
    begin = np.cumsum(length) - length
    return np.repeat(start - begin, length) + np.arange(length.sum())


class Windows:
    """Samples: the latest ``max_length`` events of a span (the window), and the event after them (the target).

    A span is ``events[first:stop]`` of one user, with the target at ``stop``. With ``prefixes`` every non-empty prefix
    of a span is a sample: span i has ``stop[i] - first[i]`` samples, which are computed from the sample's number.

    A span with a start token begins one place earlier: ``first`` is then the place of the token, not of an event.

    Args:
        first: (n,) int64, index of the first event of each span.
        stop: (n,) int64, index of its target; greater than ``first``.
        max_length: Most events of a window, a start token included.
        prefixes: Make a sample of every prefix of a span, not of the whole span alone.
        starts: (n,) bool, spans that begin with a start token; None: none.
        skip: (n,) int64, prefixes of each span to leave out, the shortest; fewer than the span has. None: none.
    """

    def __init__(
        self,
        first: np.ndarray,
        stop: np.ndarray,
        max_length: int,
        *,
        prefixes: bool = False,
        starts: np.ndarray | None = None,
        skip: np.ndarray | None = None,
    ) -> None:
        self.first, self.stop, self.max_length = first, stop, max_length
        self.starts = starts
        self.skip = np.zeros_like(first) if skip is None else skip
        size = stop - first
        self.ends = np.cumsum(size - self.skip) if prefixes else None
        if prefixes:
            size = join_ranges(1 + self.skip, size - self.skip)
        kind = np.uint16 if max_length < 1 << 16 else np.int64  # 16 bits sort in linear time
        self.lengths = np.minimum(size, max_length).astype(kind)
        """(S,) events of each sample's window."""

    def __len__(self) -> int:
        return self.lengths.size

    def at(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the first events and of the targets of samples (M,): (M,), (M,) int64."""
        span = self._span(sample)
        first = self.first[span]
        if self.ends is None:
            stop = self.stop[span]
        else:
            stop = self.stop[span] + 1 + sample - self.ends[span]
        return np.maximum(first, stop - self.max_length), stop

    def with_start(self, sample: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """Return which windows of samples (M,) begin with a start token: (M,) bool.

        Args:
            sample: (M,) numbers of samples.
            begin: (M,) their first places, from :meth:`at`.
        """
        if self.starts is None:
            return np.zeros(sample.size, dtype=bool)
        span = self._span(sample)
        return self.starts[span] & (begin == self.first[span])

    def _span(self, sample: np.ndarray) -> np.ndarray:
        """Return the span of each sample."""
        return sample if self.ends is None else np.searchsorted(self.ends, sample, side="right")


def pack(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Assign sequences to rows so that few positions are empty (best-fit decreasing).

    The assignment is computed on the histogram of lengths: all sequences of one length are placed together, into the
    fullest rows with room for them. So the cost grows with the number of different lengths, not of sequences.

    Args:
        lengths: (S,) integers in [1, row_length], longest first.
        row_length: Positions of a row.

    Returns:
        (S,) int32, the row of each sequence, from 0.
    """
    row_of = np.empty(lengths.size, dtype=np.int32)
    free: list[list[np.ndarray]] = [[] for _ in range(row_length + 1)]  # rows by positions left
    n_rows = begin = 0
    different, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(different[::-1].tolist(), counts[::-1].tolist(), strict=True):
        for room in range(length, row_length + 1):
            if left == 0:
                break
            each = room // length
            if room == row_length:  # no row in use has room: new ones
                n_new = -(-left // each)
                free[room] = [np.arange(n_rows, n_rows + n_new, dtype=np.int32)]
                n_rows += n_new
            if not free[room]:
                continue
            rows = np.concatenate(free[room])
            n_filled, rest = min(rows.size, left // each), 0
            row_of[begin : begin + n_filled * each] = np.repeat(rows[:n_filled], each)
            free[room - each * length].append(rows[:n_filled])
            if n_filled < rows.size and n_filled * each < left:
                rest = left - n_filled * each
                row_of[begin + n_filled * each : begin + left] = rows[n_filled]
                free[room - rest * length].append(rows[n_filled : n_filled + 1])
            taken = n_filled + (rest > 0)
            free[room] = [rows[taken:]] if taken < rows.size else []
            begin += n_filled * each + rest
            left -= n_filled * each + rest
    return row_of


class Rows:
    """Sequences of each row, from the assignment of :func:`pack`.

    A slot is a place for a sequence. Slots are numbered longest first; a row has its slots in that order.

    Args:
        lengths: (S,) lengths of the sequences, longest first.
        row_length: Positions of a row.
        alone: Give each sequence a row of its own.
    """

    def __init__(self, lengths: np.ndarray, row_length: int, *, alone: bool = False) -> None:
        row_of = np.arange(lengths.size) if alone else pack(lengths, row_length)
        # Sorted by row, slots in order within each.
        self.slots = np.argsort(row_of, kind="stable").astype(np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int64)

    def __len__(self) -> int:
        return self.offsets.size - 1

    def at(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the slots of some rows, row by row, and the number of slots of each row."""
        counts = self.offsets[rows + 1] - self.offsets[rows]
        return self.slots[join_ranges(self.offsets[rows], counts)], counts


class Layout(NamedTuple):
    """Indices that place the windows of a batch."""

    source: np.ndarray
    """(valid positions,) index into the events."""
    cell: np.ndarray
    """(valid positions,) index into the flattened batch."""
    position: np.ndarray
    """(valid positions,) position within the window."""
    number: np.ndarray
    """(valid positions,) number of the window within its row."""
    first: np.ndarray
    """(M,) index into the flattened batch of each window's first event."""
    last: np.ndarray
    """(M,) index into the flattened batch of each window's last event."""
    shape: tuple[int, int]

    @classmethod
    def of(cls, start: np.ndarray, length: np.ndarray, per_row: np.ndarray) -> Layout:
        """Place windows (M,) of ``length`` events from ``start``, ``per_row`` (B,) of them in each row."""
        begin = np.cumsum(length) - length
        row = np.repeat(np.arange(per_row.size), per_row)
        first_of_row = np.cumsum(per_row) - per_row
        column = begin - begin[first_of_row][row]
        width = int((column + length).max(initial=0))
        position = np.arange(length.sum()) - np.repeat(begin, length)
        cell = row * width + column
        return cls(
            source=np.repeat(start, length) + position,
            cell=np.repeat(cell, length) + position,
            position=position,
            number=np.repeat(np.arange(length.size) - first_of_row[row], length),
            first=cell,
            last=cell + length - 1,
            shape=(per_row.size, width),
        )

    def fill(self, values: np.ndarray, empty: int) -> Tensor:
        """Return a (B, L, …) int64 tensor with a value, or several, at each valid position."""
        full = np.full((self.shape[0] * self.shape[1], *values.shape[1:]), empty, dtype=np.int64)
        full[self.cell] = values
        return torch.from_numpy(full.reshape(*self.shape, *values.shape[1:]))
