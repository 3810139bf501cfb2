"""What every next-item dataset shares: ragged histories, windows cut on the fly, packed batches.

    histories (E,) + offsets (U+1,) ──► windows (S,) ──pack──► rows ──► batches (B, L)

A dataset is one file: a subclass of :class:`SequenceData` whose ``build`` returns
:class:`SequenceSplits`. Nothing but the histories is held: a sample is a pair of places in them,
worked out when its batch is made, and several samples share a row, so that a user with five items
does not cost as much as one with fifty.

Legend: U users, E events, I items; S samples (a window of a history each), M of them in a batch of
B rows of L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_ssm.batches import NO_ITEM, HistoryBatch, Ragged, SequenceBatch
from recsys_ssm.data.base import RecommenderData, content_hash
from recsys_ssm.data.loaders import ResumableLoader
from recsys_ssm.data.packing import Layout, Rows, Windows, spread
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.metrics import RankingMetrics

Objective = Literal["all", "last"]


class Histories(NamedTuple):
    """Every user's events, earliest first: ``events[offsets[u]:offsets[u + 1]]``; may be memory-mapped."""

    events: np.ndarray
    """(E,) integers, catalogue indices."""
    offsets: np.ndarray
    """(U+1,) int64."""


class HeldOut(NamedTuple):
    """Events to predict, in order of the users; what a user had before the event is the history."""

    user: np.ndarray
    """(n,) int64, rows of the user table."""
    event: np.ndarray
    """(n,) int64, places in ``Histories.events``."""


@dataclass
class SequenceSplits:
    """A dataset, prepared: what ``build`` returns."""

    item_ids: list[str]
    """What a recommendation is called, in catalogue order (the order that resolves ties)."""
    user_ids: pl.Series
    """(U,) text."""
    histories: Histories
    train_stop: np.ndarray
    """(U,) int64: what may be trained on of user u is ``events[offsets[u]:train_stop[u]]``."""
    val: HeldOut
    test: HeldOut
    item_schema: FeatureSchema | None = None
    items: Features | None = None
    """(I,) rows: what is known of the items beside their id; None: nothing."""
    notes: list[str] = field(default_factory=list)
    """What was read, dropped and why, a line each."""
    generated: bool = False
    """Stand-in data: the run's name, logs and results then say so."""
    item_counts: Tensor = field(init=False)
    """(I,) int64, training events of each item."""

    def __post_init__(self) -> None:
        events, offsets = self.histories
        if not (self.train_stop - offsets[:-1] > 1).any():
            raise UserError(
                "no training pair is left: no user has two items to train on; give the dataset "
                "more interactions, or hold out fewer"
            )
        for part, held_out in (("validation", self.val), ("test", self.test)):
            if held_out.user.size == 0:
                raise UserError(
                    f"no {part} user is left: with split=leave_one_out a user needs 3 events, with "
                    f"split=time some before and some in the {part} period; give the dataset more "
                    "data, or its periods other limits"
                )
        # All events but those that are not trained on; in blocks, since bincount copies its input.
        counts = np.zeros(len(self.item_ids), dtype=np.int64)
        held = np.flatnonzero(offsets[1:] > self.train_stop)
        for block in range(0, events.size, _BLOCK):
            counts += np.bincount(events[block : block + _BLOCK], minlength=counts.size)
        for block in range(0, held.size, _BLOCK):
            of = held[block : block + _BLOCK]
            where = spread(self.train_stop[of], offsets[of + 1] - self.train_stop[of])
            counts -= np.bincount(events[where], minlength=counts.size)
        self.item_counts = torch.from_numpy(counts)


_BLOCK = 1 << 20


class SequenceLoader(ResumableLoader[SequenceBatch]):
    """Windows packed into rows, a set number of rows a batch.

    How rows are made up of lengths is settled once; an epoch assigns its windows to the places of
    their length at random and shuffles the rows. So every epoch has the same number of batches, with
    as little padding as the lengths allow, and holds every window once.

    Args:
        events: (E,) catalogue indices.
        windows: The samples.
        every_position: Targets at every position of a window; else at its last one alone.
        batch_positions: Events a batch, about.
        row_length: Positions of a row, at least the longest window.
        shuffle, seed, rank, world_size: See :class:`~recsys_ssm.data.loaders.ResumableLoader`; what
            several processes share out are rows.
    """

    def __init__(
        self,
        events: np.ndarray,
        windows: Windows,
        *,
        every_position: bool,
        batch_positions: int,
        row_length: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        self.events, self.windows, self.every_position = events, windows, every_position
        self.row_length = row_length
        self.rows = Rows(np.sort(windows.lengths)[::-1], row_length)
        valid = int(windows.lengths.sum(dtype=np.int64))
        self.padding_share = 1 - valid / (max(len(self.rows), 1) * row_length)
        """Of the positions of an epoch, those that are empty."""
        # A batch has about batch_positions events, so a few rows more where they are not full.
        n_batches = max(
            1,
            round(
                self._share_size(len(self.rows)) * valid / max(len(self.rows), 1) / batch_positions
            ),
        )
        self._n_batches = min(n_batches, self._share_size(len(self.rows)))

    def __len__(self) -> int:
        return self._n_batches

    def _begin(self, generator: np.random.Generator | None) -> Callable[[int], SequenceBatch]:
        windows, n_rows = self.windows, len(self.rows)
        if generator is None:
            sample_of = np.argsort(~windows.lengths, kind="stable")
            rows = self._share(np.arange(n_rows))
        else:
            order = generator.permutation(len(windows))
            sample_of = order[np.argsort(~windows.lengths[order], kind="stable")]
            rows = self._share(generator.permutation(n_rows))

        def batch_at(position: int) -> SequenceBatch:
            # Rows are spread evenly over the batches: no small one at the end.
            begin, end = (rows.size * (position + i) // self._n_batches for i in (0, 1))
            slots, per_row = self.rows.at(rows[begin:end])
            return self._gather(sample_of[slots], per_row)

        return batch_at

    def _gather(self, sample: np.ndarray, per_row: np.ndarray) -> SequenceBatch:
        start, stop = self.windows.at(sample)
        layout = Layout.of(start, stop - start, per_row)
        if self.every_position:
            target = layout.fill(self.events[layout.source + 1], NO_ITEM)
        else:
            target = torch.full(layout.shape, NO_ITEM)
            target.view(-1)[torch.from_numpy(layout.last)] = torch.from_numpy(
                self.events[stop].astype(np.int64)
            )
        return SequenceBatch(
            item=layout.fill(self.events[layout.source], NO_ITEM),
            seq_idx=layout.fill(layout.number, NO_ITEM),
            position=layout.fill(layout.position, 0),
            target=target,
        )


class HistoryLoader:
    """Blocks of users to rank for, in their order, each block's histories packed into rows.

    Each process takes a contiguous share; no user is padded, left out or counted twice.
    """

    def __init__(
        self,
        histories: Histories,
        held_out: HeldOut,
        *,
        max_length: int,
        row_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.histories, self.held_out = histories, held_out
        self.max_length, self.row_length, self.batch_size = max_length, row_length, batch_size
        n = held_out.user.size
        self._start, self._stop = n * rank // world_size, n * (rank + 1) // world_size

    def __len__(self) -> int:
        return -(-(self._stop - self._start) // self.batch_size)

    def __iter__(self) -> Iterator[HistoryBatch]:
        for begin in range(self._start, self._stop, self.batch_size):
            yield self._block(slice(begin, min(begin + self.batch_size, self._stop)))

    def _block(self, block: slice) -> HistoryBatch:
        events, offsets = self.histories
        user, target = self.held_out.user[block], self.held_out.event[block]
        first = offsets[user]
        start = np.maximum(first, target - self.max_length)
        order = np.argsort(start - target, kind="stable")  # longest first
        rows = Rows((target - start)[order], self.row_length)
        slots, per_row = rows.at(np.arange(len(rows)))
        placed = order[slots]
        layout = Layout.of(start[placed], (target - start)[placed], per_row)
        last = np.empty(user.size, dtype=np.int64)
        last[placed] = layout.last
        seen = events[spread(first, target - first)].astype(np.int64)
        return HistoryBatch(
            item=layout.fill(events[layout.source], NO_ITEM),
            seq_idx=layout.fill(layout.number, NO_ITEM),
            position=layout.fill(layout.position, 0),
            last=torch.from_numpy(last),
            target=torch.from_numpy(events[target].astype(np.int64)),
            user=torch.from_numpy(user.astype(np.int64)),  # a copy: maps are read-only
            seen=Ragged(
                torch.from_numpy(seen),
                torch.from_numpy(np.concatenate([[0], np.cumsum(target - first)])),
            ),
        )


class SequenceData(RecommenderData[SequenceSplits]):
    """DataModule of users' histories; a dataset implements :meth:`build`.

    Args:
        name: What runs and results are called after.
        seed: Of the order, and of which users the validation loss is on.
        objective: ``all``: a user is one sample, with a target at every position (a causal model
            only); ``last``: every prefix is a sample, its target at the last position alone.
        max_length: Items of a history, the latest, that a model sees.
        windows: With ``objective="all"``, what of a longer history is trained on: the ``latest``
            window, or ``all``, one after another, so that each item is a target.
        batch_positions: Items a training batch (on each process), about.
        row_length: Positions of a row that sequences are packed into; None: ``max_length``. A
            multiple of it leaves less empty where histories are nearly as long.
        eval_batch_size: Users ranked at once.
        n_val_loss: Users the validation loss is on, at most; None: all.
        shuffle: A new order each epoch; off to see the same batches again (``debug=overfit``).
    """

    def __init__(
        self,
        *,
        name: str,
        seed: int = 0,
        objective: Objective = "all",
        max_length: int = 50,
        windows: Literal["latest", "all"] = "latest",
        batch_positions: int = 2048,
        row_length: int | None = None,
        eval_batch_size: int = 512,
        n_val_loss: int | None = 2048,
        shuffle: bool = True,
    ) -> None:
        super().__init__(name, seed)
        if objective not in ("all", "last"):
            raise UserError(f"dataset.objective={objective}: expected all or last")
        if windows not in ("latest", "all"):
            raise UserError(f"dataset.windows={windows}: expected latest or all")
        if max_length < 1:
            raise UserError(f"dataset.max_length={max_length}: give at least 1")
        if row_length is None:
            row_length = max_length
        if row_length < max_length:
            raise UserError(
                f"dataset.row_length={row_length}: a row holds at least one sequence of "
                f"dataset.max_length={max_length}"
            )
        if batch_positions < row_length:
            raise UserError(
                f"dataset.batch_positions={batch_positions}: a batch has at least one row of "
                f"{row_length} positions (dataset.max_length={max_length}); give that many or more"
            )
        for option, value in (("eval_batch_size", eval_batch_size), ("n_val_loss", n_val_loss)):
            if value is not None and value < 1:
                raise UserError(f"dataset.{option}={value}: give at least 1")
        self.objective, self.windows = objective, windows
        self.max_length, self.batch_positions = max_length, batch_positions
        self.row_length, self.eval_batch_size = row_length, eval_batch_size
        self.n_val_loss, self.shuffle = n_val_loss, shuffle

    def train_dataloader(self) -> SequenceLoader:
        first, stop = self.splits.histories.offsets[:-1], self.splits.train_stop - 1
        first, stop = first[stop > first], stop[stop > first]
        if self.windows == "all" and self.objective == "all":
            first, stop = _cut(first, stop, self.max_length)
        windows = Windows(first, stop, self.max_length, prefixes=self.objective == "last")
        return self._windows(windows, self.objective == "all", self.shuffle)

    def val_dataloader(self) -> list[Any]:
        """Two loaders: held-out items (for the loss) and users (for the ranking metrics)."""
        user, event = self.splits.val
        if self.n_val_loss is not None and user.size > self.n_val_loss:
            generator = np.random.default_rng(self.seed)
            some = np.sort(generator.permutation(user.size)[: self.n_val_loss])
            user, event = user[some], event[some]
        windows = Windows(self.splits.histories.offsets[user], event, self.max_length)
        return [self._windows(windows, False, False), self._users(self.splits.val)]

    def test_dataloader(self) -> HistoryLoader:
        return self._users(self.splits.test)

    def item_counts(self) -> Tensor:
        """(I,) int64, training events of each item."""
        return self.splits.item_counts

    def identity(self) -> dict[str, str]:
        """Return hashes of the items, of the users, and of the events with their split."""
        splits = self.splits
        return {
            "items": content_hash(splits.item_ids),
            "users": content_hash(splits.user_ids),
            "split": content_hash(
                splits.histories.events, splits.train_stop, *splits.val, *splits.test
            ),
        }

    def baseline_metrics(self, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
        """Test metrics of the most popular items, and of a user's own, the latest first.

        ``_unfiltered``: what a user has had already may be recommended once more.
        """
        splits = self.splits
        n_items = len(splits.item_ids)
        by_count = torch.argsort(splits.item_counts, descending=True, stable=True)
        results = {}
        for name, recommend in (
            ("popularity", lambda batch, k: _first_unseen(by_count, batch, k)),
            ("popularity_unfiltered", lambda batch, k: by_count[:k].expand(len(batch.user), -1)),
            ("repeat_last_unfiltered", lambda batch, k: _latest(batch.seen, k)),
        ):
            # Every process sees all users here: there is nothing to add up.
            ranking = RankingMetrics(
                metrics, n_items=n_items, item_counts=splits.item_counts, sync_on_compute=False
            )
            for batch in self._users(splits.test, shard=False):
                top = recommend(batch, ranking.max_k)
                filled = torch.nn.functional.pad(top, (0, ranking.max_k - top.shape[1]), value=-1)
                ranking.update_from_top(filled, batch.target)
            results[name] = {metric: float(value) for metric, value in ranking.compute().items()}
        return results

    def _windows(self, windows: Windows, every_position: bool, shuffle: bool) -> SequenceLoader:
        return SequenceLoader(
            self.splits.histories.events,
            windows,
            every_position=every_position,
            batch_positions=self.batch_positions,
            row_length=self.row_length,
            shuffle=shuffle,
            seed=self.seed,
            **self._shard(),
        )

    def _users(self, held_out: HeldOut, *, shard: bool = True) -> HistoryLoader:
        return HistoryLoader(
            self.splits.histories,
            held_out,
            max_length=self.max_length,
            row_length=self.row_length,
            batch_size=self.eval_batch_size,
            **(self._shard() if shard else {}),
        )


def _cut(first: np.ndarray, stop: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Spans in pieces of at most ``length``, the shorter piece at the beginning."""
    n_pieces = -(-(stop - first) // length)
    back = spread(np.zeros_like(n_pieces), n_pieces) * length
    first, stop = np.repeat(first, n_pieces), np.repeat(stop, n_pieces) - back
    return np.maximum(first, stop - length), stop


def _first_unseen(ranked: Tensor, batch: HistoryBatch, k: int) -> Tensor:
    """The first ``k`` of ``ranked`` (I,) that are new to each user; (U, k) int64, -1 where none is left.

    The target is not left out, should the user have had it before.
    """
    n_users, lengths = batch.user.numel(), batch.seen.lengths
    n = min(ranked.numel(), k + int(lengths.max()))  # so many have k that are new among them
    place = torch.empty_like(ranked)
    place[ranked] = torch.arange(ranked.numel())
    seen, target = place[batch.seen.values], place[batch.target]
    user = torch.arange(n_users)
    taken = torch.zeros(n_users, n + 1, dtype=torch.bool)  # in the last column all that comes later
    taken[user.repeat_interleave(lengths), seen.clamp(max=n)] = True
    taken[user, target.clamp(max=n)] = False
    return _left_aligned(ranked[:n].expand(n_users, -1), taken[:, :n])[:, :k]


def _latest(seen: Ragged, k: int) -> Tensor:
    """The ``k`` items each user had last, the latest first, none twice; (U, k) int64, -1 where there are fewer."""
    back = torch.arange(1, k + 1)
    items = seen.values[(seen.offsets[1:, None] - back).clamp(min=0)]
    again = (items[:, :, None] == items[:, None, :]).tril(-1).any(2)
    return _left_aligned(items, again | (back > seen.lengths[:, None]))


def _left_aligned(items: Tensor, without: Tensor) -> Tensor:
    """Each row's items in their order but for those ``without``, the places at the end -1."""
    order = torch.argsort(without.to(torch.uint8), dim=1, stable=True)
    return items.masked_fill(without, NO_ITEM).gather(1, order)
