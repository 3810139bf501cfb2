"""Cut windows of histories and pack them into rows so that few positions are empty; plain NumPy.

Legend: S samples (a window of a history each), M of them in a batch of B rows of L positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def spread(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The ranges ``start[i], start[i] + 1, …`` of ``length[i]`` numbers each, joined; int64."""
    begin = np.cumsum(length) - length
    return np.repeat(start - begin, length) + np.arange(length.sum())


class Windows:
    """The samples of a set: the latest ``max_length`` events of a span, the event after them the target.

    A span is ``events[first:stop]`` of one user, with the target at ``stop``. With ``prefixes`` each
    of a span's events is a target once: span i gives ``stop[i] - first[i]`` samples, found by
    arithmetic from the sample's number.

    Args:
        first: (n,) int64, where each span begins.
        stop: (n,) int64, its target; greater than ``first``.
        max_length: Events of a window, at most.
        prefixes: Every non-empty prefix of a span and its target, not the whole span alone.
    """

    def __init__(
        self, first: np.ndarray, stop: np.ndarray, max_length: int, *, prefixes: bool = False
    ) -> None:
        self.first, self.stop, self.max_length = first, stop, max_length
        self.ends = np.cumsum(stop - first) if prefixes else None
        size = stop - first
        if prefixes:
            size = spread(np.ones_like(size), size)
        kind = np.uint16 if max_length < 1 << 16 else np.int64  # 16 bits sort in linear time
        self.lengths = np.minimum(size, max_length).astype(kind)
        """(S,) events of each sample's window."""

    def __len__(self) -> int:
        return self.lengths.size

    def at(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the windows of samples (M,) begin, and where their targets are: (M,), (M,) int64."""
        if self.ends is None:
            first, stop = self.first[sample], self.stop[sample]
        else:
            span = np.searchsorted(self.ends, sample, side="right")
            first, size = self.first[span], self.stop[span] - self.first[span]
            stop = first + 1 + sample - (self.ends[span] - size)
        return np.maximum(first, stop - self.max_length), stop


def pack(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """Rows for sequences so that few positions are left empty: best-fit decreasing.

    Worked out on the histogram of lengths: all sequences of one length are placed together, each
    into the fullest rows that have room, so the cost grows with the number of different lengths and
    not with that of the sequences.

    Args:
        lengths: (S,) integers in [1, row_length], longest first.
        row_length: Positions of a row.

    Returns:
        (S,) int32, the row of each, from 0.
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
    """Slots for sequences, by row: what :func:`pack` says, turned round.

    Slots are numbered longest first; a row's stand from left to right in that order.
    """

    def __init__(self, lengths: np.ndarray, row_length: int) -> None:
        row_of = pack(lengths, row_length)
        # Sorted by row, slots in order within each.
        self.slots = np.argsort(row_of, kind="stable").astype(np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int64)

    def __len__(self) -> int:
        return self.offsets.size - 1

    def at(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots of some rows, row by row, and how many each row has."""
        counts = self.offsets[rows + 1] - self.offsets[rows]
        return self.slots[spread(self.offsets[rows], counts)], counts


class Layout(NamedTuple):
    """Where the windows of a batch go."""

    source: np.ndarray
    """(valid positions,) places in the events."""
    cell: np.ndarray
    """(valid positions,) places in the flattened batch."""
    position: np.ndarray
    """(valid positions,) place within the window."""
    number: np.ndarray
    """(valid positions,) which of its row's windows it is."""
    last: np.ndarray
    """(M,) cell of each window's last event."""
    shape: tuple[int, int]

    @classmethod
    def of(cls, start: np.ndarray, length: np.ndarray, per_row: np.ndarray) -> Layout:
        """Windows (M,) of ``length`` events from ``start``, ``per_row`` (B,) of them in each row."""
        begin = np.cumsum(length) - length
        row = np.repeat(np.arange(per_row.size), per_row)
        first_of_row = np.cumsum(per_row) - per_row
        column = begin - begin[first_of_row][row]
        width = int((column + length).max())
        position = np.arange(length.sum()) - np.repeat(begin, length)
        cell = row * width + column
        return cls(
            source=np.repeat(start, length) + position,
            cell=np.repeat(cell, length) + position,
            position=position,
            number=np.repeat(np.arange(length.size) - first_of_row[row], length),
            last=cell + length - 1,
            shape=(per_row.size, width),
        )

    def fill(self, values: np.ndarray, empty: int) -> Tensor:
        """A (B, L) int64 tensor of one value a valid position."""
        full = np.full(self.shape[0] * self.shape[1], empty, dtype=np.int64)
        full[self.cell] = values
        return torch.from_numpy(full.reshape(self.shape))
