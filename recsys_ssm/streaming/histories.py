"""Keep the events of users: those of a dataset, which stay in their file, and those that are added.

Legend: U users, I items, n events of a user.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl

from recsys_ssm.data.sequences import Histories, SequenceData


class EventHistories:
    """Events of users, the latest last. An item is a number, also one that a model's catalogue does not have.

    Not safe to call from several threads: :class:`~recsys_ssm.streaming.recommender.StreamingRecommender` has a lock.

    Args:
        item_ids: Names of the items in ``histories``.
        user_ids: (U,) names of the users in ``histories``.
        histories: Events to begin with, as indices into ``item_ids``; may be memory-mapped, and are never copied.
    """

    def __init__(
        self,
        item_ids: Sequence[str] = (),
        user_ids: pl.Series | Sequence[str] = (),
        histories: Histories | None = None,
    ) -> None:
        self.items = list(item_ids)
        self._number_of = {item: number for number, item in enumerate(self.items)}
        names = user_ids.cast(pl.String).to_list() if isinstance(user_ids, pl.Series) else user_ids
        self._row_of = {str(user): row for row, user in enumerate(names)}
        self._first = histories or Histories(np.zeros(0, np.int32), np.zeros(1, np.int64))
        self._added: dict[str, array[int]] = {}
        self.n_added = 0

    @classmethod
    def of(cls, data: SequenceData) -> EventHistories:
        """Begin with all events of a dataset, those that it holds out for the test as well."""
        splits = data.splits
        return cls(splits.item_ids, splits.user_ids, splits.histories)

    def __contains__(self, user: object) -> bool:
        return user in self._row_of or user in self._added

    def __len__(self) -> int:
        return len(self._row_of) + sum(user not in self._row_of for user in self._added)

    def add(self, user: str, items: Iterable[str]) -> None:
        """Append events to the history of a user, who may be new, as the items may be."""
        numbers = [self._number(item) for item in items]
        if numbers:
            self._added.setdefault(user, array("i")).extend(numbers)
            self.n_added += len(numbers)

    def length(self, user: str) -> int:
        """Return the number of a user's events, 0 for an unknown user."""
        added = self._added.get(user)
        start, stop = self._span(user)
        return stop - start + (0 if added is None else len(added))

    def since(self, user: str, place: int) -> np.ndarray:
        """Return a user's events from the one at ``place`` on, as numbers of items (n,) int32."""
        start, stop = self._span(user)
        n_first = stop - start
        first = np.asarray(self._first.events[start + min(place, n_first) : stop])
        added = self._added.get(user)
        if added is None:
            return first
        later = np.frombuffer(added[max(place - n_first, 0) :], dtype=np.int32)
        return np.concatenate([first, later]) if first.size else later

    def names(self, user: str, latest: int | None = None) -> list[str]:
        """Return the names of a user's items, of the ``latest`` events alone where that is a number."""
        begin = 0 if latest is None else max(self.length(user) - latest, 0)
        return [self.items[number] for number in self.since(user, begin).tolist()]

    def _number(self, item: str) -> int:
        number = self._number_of.setdefault(item, len(self.items))
        if number == len(self.items):
            self.items.append(item)
        return number

    def _span(self, user: str) -> tuple[int, int]:
        row = self._row_of.get(user)
        if row is None:
            return 0, 0
        return int(self._first.offsets[row]), int(self._first.offsets[row + 1])
