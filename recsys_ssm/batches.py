"""Define the batches: the joint between data and models.

Legend: N pairs, B of them in a batch (B rows of a packed batch), L positions of a row; U users to rank for, I items,
K places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recsys_ssm.features import Features

NO_ITEM = -1
"""Index used for padding and for positions without a target."""

MASK = -2
"""Index used for an item that is hidden from the model (``objective="masked"``)."""

START = -3
"""Index of the token before the first item of a history (``start_token=True``)."""


class Ragged(NamedTuple):
    """A list of item rows for each user: ``values[offsets[u]:offsets[u + 1]]``.

    A tuple, as the batches are: Lightning converts batches to a trainer's precision, and cannot convert frozen classes.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def from_pairs(cls, user: Tensor, item: Tensor, n_users: int) -> Ragged:
        """Group ``item`` (N,) by ``user`` (N,) in ``range(n_users)``; a user's keep their order."""
        order = torch.argsort(user, stable=True)
        offsets = torch.zeros(n_users + 1, dtype=torch.long)
        offsets[1:] = torch.bincount(user, minlength=n_users).cumsum(0)
        return cls(item[order], offsets)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Ragged:
        """Make lists from a (U, I) bool matrix."""
        user, item = mask.nonzero(as_tuple=True)
        return cls.from_pairs(user, item, mask.shape[0])

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def rows(self, index: Tensor) -> Ragged:
        """Return the lists at ``index`` (n,)."""
        length, start = self.lengths[index], self.offsets[index]
        offsets = torch.zeros(index.numel() + 1, dtype=torch.long)
        offsets[1:] = length.cumsum(0)
        source = torch.arange(int(offsets[-1])) + (start - offsets[:-1]).repeat_interleave(length)
        return Ragged(self.values[source], offsets)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return the list's number and the item of each entry, (n,) each."""
        owner = torch.arange(self.lengths.numel(), device=self.values.device)
        return owner.repeat_interleave(self.lengths), self.values

    def to(self, device: torch.device | str) -> Ragged:
        return Ragged(self.values.to(device), self.offsets.to(device))

    def pin_memory(self) -> Ragged:
        """Copy to pinned memory; PyTorch's DataLoader calls this."""
        return Ragged(self.values.pin_memory(), self.offsets.pin_memory())

    def mask(self, start: int, stop: int, n_items: int) -> Tensor:
        """Return users ``start`` to ``stop`` as a (stop - start, I) bool matrix."""
        mask = torch.zeros(stop - start, n_items, dtype=torch.bool)
        rows = torch.repeat_interleave(torch.arange(stop - start), self.lengths[start:stop])
        mask[rows, self.values[self.offsets[start] : self.offsets[stop]]] = True
        return mask


class PairBatch(NamedTuple):
    """One training or validation batch of (user, item, target)."""

    user: Features
    item: Features
    target: Tensor
    """(B,) float32."""
    user_index: Tensor
    """(B,) int64, row of the user table."""
    item_index: Tensor
    """(B,) int64, row of the catalogue."""


class RankingBatch(NamedTuple):
    """Users for whom the whole catalogue is ranked."""

    user: Features
    relevant: Tensor
    """(U, I) bool."""
    seen: Tensor | None
    """(U, I) bool, items not to recommend (seen in training); None: every item may be."""
    user_index: Tensor
    """(U,) int64, row of the user table."""


class UserBatch(NamedTuple):
    """Users to recommend to, by their features."""

    user: Features
    seen: Ragged | None
    """Items that each of the U users had; None: they are not known."""
    user_index: Tensor
    """(U,) int64, row of the user table."""


class EventTimes(NamedTuple):
    """Times of the events of packed histories, in seconds; only differences within a history have a meaning."""

    event: Tensor
    """(B, L) int64, when the event happened; 0 at padding. A start token has the time of the first event."""
    next: Tensor
    """(B, L) int64, when the event after it happened, or when recommendations are asked for; 0 at padding."""


class SequenceBatch(NamedTuple):
    """A batch of training, or of the validation loss: several windows packed into each row."""

    item: Tensor
    """(B, L) int64, catalogue index; -1 at padding, :data:`MASK` at a hidden item, :data:`START` before the first."""
    seq_idx: Tensor
    """(B, L) int64, which of its row's windows a position belongs to (0, 1, …); -1 at padding."""
    position: Tensor
    """(B, L) int64, place within its window from 0; 0 at padding."""
    target: Tensor
    """(B, L) int64, the next item; the item itself with ``objective="masked"``; -1 where nothing is predicted."""
    times: EventTimes | None = None
    """Times of the events; None unless the dataset gives them (``dataset.times``)."""
    columns: Tensor | None = None
    """(B, L, C) int64, codes of the events' columns, 0 at padding and before the first item; None without columns."""


class HistoryBatch(NamedTuple):
    """Users for whom the whole catalogue is ranked, their histories packed into rows."""

    item: Tensor
    """(B, L) int64, catalogue index; -1 at padding, :data:`MASK` after a history with ``objective="masked"``,
    :data:`START` before it with ``start_token=True``."""
    seq_idx: Tensor
    """(B, L) int64, which of its row's histories a position belongs to (0, 1, …); -1 at padding."""
    position: Tensor
    """(B, L) int64, place within its history from 0; 0 at padding."""
    last: Tensor
    """(U,) int64, where each user's latest item, or the :data:`MASK` after it, is in the flattened (B·L) batch; -1 for
    a user without an item, in predictions."""
    target: Tensor
    """(U,) int64, the item held out; -1 in predictions."""
    user: Tensor
    """(U,) int64, row of the user table."""
    seen: Ragged
    """Items that each of the U users had before the target: the whole history, however long."""
    times: EventTimes | None = None
    """As in :class:`SequenceBatch`; the time after the latest event is the target's."""
    columns: Tensor | None = None
    """As in :class:`SequenceBatch`."""


class TopItems(NamedTuple):
    """The best items of a batch of users, the result of a model's ``predict_step``."""

    user: Tensor
    """(U,) int64, rows of the user table, on the CPU."""
    item: Tensor
    """(U, K) int64, catalogue indices, the best first; -1 where no item is left. On the CPU."""
    score: Tensor
    """(U, K) float32; NaN where the items are the most popular ones. On the CPU."""


@dataclass(frozen=True)
class Selection:
    """Items that may be recommended.

    Args:
        k: Places for each user.
        filter_seen: Leave out the items that a user had. None: as the model does in its test.
        allowed: (n,) catalogue indices in ascending order, the only items that are recommended; None: all.
        allowed_pairs: The only items that are recommended to each row of the user table; None: all.
        denied_pairs: Items that are not recommended to each row of the user table; None: none.
    """

    k: int = 10
    filter_seen: bool | None = None
    allowed: Tensor | None = None
    allowed_pairs: Ragged | None = None
    denied_pairs: Ragged | None = None
