"""Prepare datasets of users' histories: windows that are cut when needed, packed batches, and the DataModule.

    histories (E,) + offsets (U+1,) ──► windows (S,) ──pack──► rows ──► batches (B, L)

A next-item dataset is a subclass of :class:`SequenceData` whose ``build`` returns :class:`SequenceSplits`. Only the
histories are in memory: a sample is a pair of indices into them, computed when its batch is made. Several samples share
a row, so that a user with five items costs less than one with fifty.

Legend: U users, E events, I items; S samples (a window of a history each), M of them in a batch of
B rows of L positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_ssm.batches import (
    MASK,
    NO_ITEM,
    START,
    EventTimes,
    HistoryBatch,
    Ragged,
    SequenceBatch,
)
from recsys_ssm.data.base import RecommenderData, content_hash
from recsys_ssm.data.loaders import BlockLoader, ResumableLoader
from recsys_ssm.data.packing import Layout, Rows, Windows, join_ranges
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.metrics import RankingMetrics

Objective = Literal["all", "last", "masked"]

COMMON_REPEATS = 0.1
"""Share of validation targets seen before from which seen items are recommended again by default."""


class Histories(NamedTuple):
    """Events of every user, earliest first: ``events[offsets[u]:offsets[u + 1]]``; may be memory-mapped."""

    events: np.ndarray
    """(E,) integers, catalogue indices."""
    offsets: np.ndarray
    """(U+1,) int64."""


class EventContext(NamedTuple):
    """Times and columns of each event, beside its item; may be memory-mapped."""

    times: np.ndarray | None = None
    """(E,) int64, seconds; None: not given."""
    codes: np.ndarray | None = None
    """(E, C) int32, codes of the events' columns; 0 stands for an empty cell and for values without a code."""

    def at(self, layout: Layout, starts: np.ndarray) -> tuple[EventTimes | None, Tensor | None]:
        """Return times and codes of the packed windows of ``layout``.

        Args:
            layout: Places of the windows.
            starts: Places in the flattened batch of start tokens, whose source is the place before the first event.
        """
        times = codes = None
        if self.times is not None:
            last = self.times.size - 1
            event = layout.fill(self.times[np.minimum(layout.source, last)], 0)
            after = layout.fill(self.times[np.minimum(layout.source + 1, last)], 0)
            where = torch.from_numpy(starts)
            event.view(-1)[where] = after.view(-1)[where]
            times = EventTimes(event, after)
        if self.codes is not None:
            codes = layout.fill(self.codes[np.minimum(layout.source, len(self.codes) - 1)], 0)
            codes.flatten(0, 1)[torch.from_numpy(starts)] = 0
        return times, codes


class HeldOut(NamedTuple):
    """Events to predict, in the order of the users; the user's events before it are the history."""

    user: np.ndarray
    """(n,) int64, rows of the user table."""
    event: np.ndarray
    """(n,) int64, indices into ``Histories.events``."""


@dataclass
class SequenceSplits:
    """Prepared data of a next-item dataset."""

    item_ids: list[str]
    """Ids of the catalogue in its order, which also resolves ties."""
    user_ids: pl.Series
    """(U,) text."""
    histories: Histories
    train_stop: np.ndarray
    """(U,) int64: the training events of user u are ``events[offsets[u]:train_stop[u]]``."""
    val: HeldOut
    test: HeldOut
    item_schema: FeatureSchema | None = None
    items: Features | None = None
    """(I,) rows, features of the items beside their id; None: there are none."""
    train_start: np.ndarray | None = None
    """(U,) int64: events of user u before it are read as history, and are not targets; None: all are."""
    notes: list[str] = field(default_factory=list)
    """Lines on what was read, what was dropped and why."""
    generated: bool = False
    """True for generated data in place of real files; the run's name, logs and results then say so."""
    sources: dict[str, str] = field(default_factory=dict)
    """The sha256 of each input: by its path, by its argument (data frames), or of the generator's arguments."""
    context: EventContext = field(default_factory=EventContext)
    """Times and columns of the events, where the dataset gives them."""
    event_columns: dict[str, list[str]] = field(default_factory=dict)
    """Values of each column of the events, in the order of their codes, which begin at 1."""
    item_counts: Tensor = field(init=False)
    """(I,) int64, training events of each item."""

    def __post_init__(self) -> None:
        events, offsets = self.histories
        if not (self.train_stop - offsets[:-1] > 1).any():
            raise UserError(
                "no training pair is left: no user has two items to train on; give the dataset "
                "more interactions, or hold out fewer of them"
            )
        for part, held_out in (("validation", self.val), ("test", self.test)):
            if held_out.user.size == 0:
                raise UserError(
                    f"no {part} user is left: split=leave_one_out needs users with 3 events, "
                    f"split=time needs users with events before and in the {part} period; give the "
                    "dataset more data, or its periods other limits"
                )
        # Count all events, less those that are held out; in blocks, since bincount copies its input.
        counts = np.zeros(len(self.item_ids), dtype=np.int64)
        held = np.flatnonzero(offsets[1:] > self.train_stop)
        for block in range(0, events.size, _BLOCK):
            counts += np.bincount(events[block : block + _BLOCK], minlength=counts.size)
        for block in range(0, held.size, _BLOCK):
            user = held[block : block + _BLOCK]
            where = join_ranges(self.train_stop[user], offsets[user + 1] - self.train_stop[user])
            counts -= np.bincount(events[where], minlength=counts.size)
        self.item_counts = torch.from_numpy(counts)

    @functools.cached_property
    def typical_gap(self) -> float | None:
        """Median seconds between training events of a user that differ in time; None without times."""
        times, offsets = self.context.times, self.histories.offsets
        if times is None:
            return None
        gaps = np.diff(times)
        inside = np.ones(gaps.size, dtype=bool)
        inside[offsets[1:-1] - 1] = False  # from one user to the next
        for user in np.flatnonzero(offsets[1:] > self.train_stop):
            inside[self.train_stop[user] - 1 : offsets[user + 1] - 1] = False
        gaps = gaps[inside & (gaps > 0)]
        return float(np.median(gaps)) if gaps.size else 1.0

    @functools.cached_property
    def repeat_share(self) -> float:
        """Share of the validation targets that are in their user's history."""
        return count_repeats(self.histories, self.val) / self.val.user.size


def count_repeats(histories: Histories, held_out: HeldOut) -> int:
    """Count the held-out events of items that are in the user's history."""
    n, (events, offsets) = 0, histories
    for block in range(0, held_out.user.size, _USERS):
        user, event = (array[block : block + _USERS] for array in held_out)
        length = event - offsets[user]
        same = events[join_ranges(offsets[user], length)] == np.repeat(events[event], length)
        n += np.unique(np.repeat(user, length)[same]).size
    return n


_BLOCK = 1 << 20
"""Events or users to count together."""

_USERS = 1 << 14
"""Users whose histories are compared together."""


class SequenceLoader(ResumableLoader[SequenceBatch]):
    """Batches of windows that are packed into rows, with a set number of rows in a batch.

    The assignment of lengths to rows is computed once. An epoch assigns its windows at random to the slots of their
    length and shuffles the rows. So every epoch has the same number of batches, as little padding as the lengths allow,
    and every window once.

    Args:
        events: (E,) catalogue indices.
        windows: The samples.
        every_position: Targets at every position of a window, not at its last position alone.
        masked: A target is the item of its position, not the next one. Without ``every_position`` the last item of a
            window is hidden.
        targets: (E,) the events as targets, :data:`~recsys_ssm.batches.NO_ITEM` where one is not; None: all are.
        batch_positions: Approximate number of events in a batch.
        row_length: Positions of a row, at least the length of the longest window.
        context: Times and columns of the events.
        batch_samples: Windows of a batch, each in a row of its own, in place of ``batch_positions``. None: several
            windows share a row.
        loading: See :class:`~recsys_ssm.data.loaders.ResumableLoader`; the processes share the rows.
    """

    def __init__(
        self,
        events: np.ndarray,
        windows: Windows,
        *,
        every_position: bool,
        batch_positions: int,
        row_length: int,
        masked: bool = False,
        batch_samples: int | None = None,
        targets: np.ndarray | None = None,
        context: EventContext = EventContext(),  # noqa: B008 (a tuple)
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.context = context
        self.targets = events if targets is None else targets
        self.events, self.windows, self.every_position = events, windows, every_position
        self.row_length, self.masked = row_length, masked
        lengths = np.sort(windows.lengths)[::-1]
        self.rows = Rows(lengths, row_length, alone=batch_samples is not None)
        valid = int(windows.lengths.sum(dtype=np.int64))
        self.padding_share = 1 - valid / (max(len(self.rows), 1) * row_length)
        """Share of an epoch's positions that are empty."""
        if batch_samples is not None:
            self._n_batches = -(-self._share_size(len(self.rows)) // batch_samples)
            return
        # A batch has about batch_positions events, so more rows where they are not full.
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

        return functools.partial(self._batch, sample_of, rows)

    def _batch(self, sample_of: np.ndarray, rows: np.ndarray, position: int) -> SequenceBatch:
        # Batches have equal numbers of rows (give or take one), so the last is not small.
        begin, end = (rows.size * (position + i) // self._n_batches for i in (0, 1))
        slots, per_row = self.rows.at(rows[begin:end])
        return self._gather(sample_of[slots], per_row)

    def _gather(self, sample: np.ndarray, per_row: np.ndarray) -> SequenceBatch:
        start, stop = self.windows.at(sample)
        layout = Layout.of(start, stop - start, per_row)
        item = layout.fill(self.events[layout.source], NO_ITEM)
        begins = layout.first[self.windows.with_start(sample, start)]
        item.view(-1)[torch.from_numpy(begins)] = START
        ahead = 0 if self.masked else 1
        if self.every_position:
            target = layout.fill(self.targets[layout.source + ahead], NO_ITEM)
        else:
            last = torch.from_numpy(layout.last)
            target = torch.full(layout.shape, NO_ITEM)
            target.view(-1)[last] = torch.from_numpy(self.events[stop - 1 + ahead].astype(np.int64))
            if self.masked:
                item.view(-1)[last] = MASK
        times, columns = self.context.at(layout, begins)
        return SequenceBatch(
            item=item,
            seq_idx=layout.fill(layout.number, NO_ITEM),
            position=layout.fill(layout.position, 0),
            target=target,
            times=times,
            columns=columns,
        )


class HistoryLoader(BlockLoader[HistoryBatch]):
    """Blocks of users to rank for, in their order, the histories of each block packed into rows.

    Args:
        histories: Histories of all users.
        held_out: The users to rank for, and their targets. In predictions, the end of a user's history is the target;
            a user without an item has no history in the batch.
        max_length: Most positions of a history, its latest events.
        row_length: Positions of a row, at least ``max_length``.
        batch_size: Users of a batch.
        masked: Put :data:`~recsys_ssm.batches.MASK` after each history, within ``max_length``.
        start_token: Put :data:`~recsys_ssm.batches.START` before each history, within ``max_length``.
        context: Times and columns of the events.
        loading: See :class:`~recsys_ssm.data.loaders.BlockLoader`.
    """

    def __init__(
        self,
        histories: Histories,
        held_out: HeldOut,
        *,
        max_length: int,
        row_length: int,
        batch_size: int,
        masked: bool = False,
        start_token: bool = False,
        context: EventContext = EventContext(),  # noqa: B008 (a tuple)
        **loading: Any,
    ) -> None:
        super().__init__(held_out.user.size, batch_size=batch_size, **loading)
        self.histories, self.held_out, self.masked = histories, held_out, masked
        self.start_token, self.context = start_token, context
        self.max_length, self.row_length = max_length, row_length

    def _block(self, start: int, stop: int) -> HistoryBatch:
        events, offsets = self.histories
        user, target = self.held_out.user[start:stop], self.held_out.event[start:stop]
        first = offsets[user]
        # The place of a mask is that of the target, which MASK then replaces.
        end = target + 1 if self.masked else target
        begin = np.maximum(first - self.start_token, end - self.max_length)
        warm = np.flatnonzero((target > first) | self.start_token)
        order = warm[np.argsort((begin - end)[warm], kind="stable")]  # longest first
        rows = Rows((end - begin)[order], self.row_length)
        slots, per_row = rows.at(np.arange(len(rows)))
        placed = order[slots]
        layout = Layout.of(begin[placed], (end - begin)[placed], per_row)
        last = np.full(user.size, -1)
        last[placed] = layout.last
        seen = events[join_ranges(first, target - first)].astype(np.int64)
        # In predictions nothing follows the last event.
        source = np.minimum(layout.source, events.size - 1)
        item = layout.fill(events[source], NO_ITEM)
        if self.masked:
            item.view(-1)[torch.from_numpy(last[placed])] = MASK
        starts = layout.first[begin[placed] < first[placed]]
        item.view(-1)[torch.from_numpy(starts)] = START
        held = target < offsets[user + 1]
        next_item = np.full(user.size, NO_ITEM, dtype=np.int64)
        next_item[held] = events[target[held]]
        times, columns = self.context.at(layout, starts)
        return HistoryBatch(
            item=item,
            seq_idx=layout.fill(layout.number, NO_ITEM),
            position=layout.fill(layout.position, 0),
            last=torch.from_numpy(last),
            target=torch.from_numpy(next_item),
            user=torch.from_numpy(user.astype(np.int64)),  # a copy: memory maps are read-only
            seen=Ragged(
                torch.from_numpy(seen),
                torch.from_numpy(np.concatenate([[0], np.cumsum(target - first)])),
            ),
            times=times,
            columns=columns,
        )


class SequenceData(RecommenderData[SequenceSplits]):
    """DataModule of users' histories; a dataset implements :meth:`build`.

    Args:
        name: Name of the dataset in runs and results.
        seed: Seed of the order, and of the sample of users for the validation loss.
        objective: ``all``: a user is one sample with a target at every position (causal models only); ``last``: every
            prefix of a history is a sample with a target at its last position; ``masked``: a user is one sample, in
            which items are hidden at random and predicted from those on both sides (BERT4Rec); a mask after the history
            stands for the next item. For models that are not causal.
        max_length: Most items of a history that a model sees, the latest; a mask after the history counts as one, and
            so does a start token.
        windows: Windows of a longer history to train on: the ``latest``, or ``all``, one after another, so that each
            item is a target. Where every prefix is a sample, both take all prefixes of the history; ``recent`` takes
            those of its latest ``max_length`` training items alone, as if the history began there.
        start_token: Put a token before the first item, so that the first item is a target, too.
        batch_positions: Approximate number of items in a training batch (on each process). Lightning's
            ``Tuner.scale_batch_size`` finds it with ``batch_arg_name="batch_positions"``.
        batch_samples: Samples of a training batch in place of ``batch_positions``, each in a row of its own. None:
            several samples share a row.
        row_length: Positions of a row that sequences are packed into; None: ``max_length``. A multiple of it leaves
            fewer positions empty if histories are nearly as long as ``max_length``.
        eval_batch_size: Users to rank for at once.
        n_val_loss: Most users for the validation loss; None: all.
        shuffle: Use a new order in each epoch. False gives the same batches again (``debug=overfit``).
        num_workers: Processes that make batches ahead; 0: batches are made in the training process.
    """

    def __init__(
        self,
        *,
        name: str,
        seed: int = 0,
        objective: Objective = "all",
        max_length: int = 50,
        windows: Literal["latest", "all", "recent"] = "latest",
        start_token: bool = False,
        batch_positions: int = 2048,
        batch_samples: int | None = None,
        row_length: int | None = None,
        eval_batch_size: int = 512,
        n_val_loss: int | None = 2048,
        shuffle: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(name, seed, num_workers)
        if objective not in get_args(Objective):
            raise UserError(f"dataset.objective={objective}: expected all, last or masked")
        if objective == "masked" and max_length < 2:
            raise UserError(
                f"dataset.max_length={max_length}: with dataset.objective=masked a mask takes one position; give at "
                "least 2"
            )
        if windows not in ("latest", "all", "recent"):
            raise UserError(f"dataset.windows={windows}: expected latest, all or recent")
        if windows == "recent" and objective != "last":
            raise UserError(
                f"dataset.windows=recent: prefixes are samples with dataset.objective=last, not with {objective}; "
                "give dataset.windows=latest or all"
            )
        if start_token and objective == "masked":
            raise UserError(
                "dataset.start_token=true: with dataset.objective=masked each item is a target already; leave it out, "
                "or give dataset.objective=all or last"
            )
        if max_length < 1:
            raise UserError(f"dataset.max_length={max_length}: give at least 1")
        if row_length is None:
            row_length = max_length
        if row_length < max_length:
            raise UserError(
                f"dataset.row_length={row_length}: a row must have room for a sequence of "
                f"dataset.max_length={max_length}; give at least that many"
            )
        if batch_positions < row_length:
            raise UserError(
                f"dataset.batch_positions={batch_positions}: a batch must have room for a row of "
                f"{row_length} positions (dataset.max_length={max_length}); give at least that many"
            )
        for option, value in (
            ("eval_batch_size", eval_batch_size),
            ("n_val_loss", n_val_loss),
            ("batch_samples", batch_samples),
        ):
            if value is not None and value < 1:
                raise UserError(f"dataset.{option}={value}: give at least 1")
        self.objective, self.windows = objective, windows
        self.max_length, self.batch_positions = max_length, batch_positions
        self.row_length, self.eval_batch_size = row_length, eval_batch_size
        self.n_val_loss, self.shuffle = n_val_loss, shuffle
        self.start_token, self.batch_samples = start_token, batch_samples

    def train_dataloader(self) -> SequenceLoader:
        first, stop = self.splits.histories.offsets[:-1], self.splits.train_stop - 1
        if self.windows == "recent":
            first = np.maximum(first, stop + 1 - self.max_length)
        first = first - self.start_token
        since = self.splits.train_start
        kept = stop > first if since is None else stop >= np.maximum(since, first + 1)
        first, stop = first[kept], stop[kept]
        starts = np.full(first.size, True) if self.start_token else None
        if self.objective == "masked":
            stop = stop + 1  # the last training event is a token, too
        if self.windows == "all" and self.objective != "last":
            begin = first
            first, stop = _cut(first, stop, self.max_length)
            starts = np.isin(first, begin) if self.start_token else None
        skip = targets = None
        if since is not None:
            targets = _new_targets(self.splits.histories, since)
            if self.objective == "last":
                skip = np.maximum(since[kept] - first - 1, 0)
            else:  # pieces of a history without a target
                some = _targets_between(targets, first + 1, stop + 1) > 0
                first, stop = first[some], stop[some]
                starts = None if starts is None else starts[some]
        windows = Windows(
            first,
            stop,
            self.max_length,
            prefixes=self.objective == "last",
            starts=starts,
            skip=skip,
        )
        return self._windows(
            windows, self.objective != "last", self.shuffle, self.batch_samples, targets
        )

    def val_dataloader(self) -> list[Any]:
        """Return two loaders: held-out items (for the loss) and users (for the ranking metrics)."""
        user, event = self.splits.val
        if self.n_val_loss is not None and user.size > self.n_val_loss:
            generator = np.random.default_rng(self.seed)
            some = np.sort(generator.permutation(user.size)[: self.n_val_loss])
            user, event = user[some], event[some]
        end = event + 1 if self.objective == "masked" else event
        first = self.splits.histories.offsets[user] - self.start_token
        starts = np.full(first.size, True) if self.start_token else None
        windows = Windows(first, end, self.max_length, starts=starts)
        return [self._windows(windows, False, False), self._users(self.splits.val)]

    def test_dataloader(self) -> HistoryLoader:
        return self._users(self.splits.test)

    def test_batches(self) -> HistoryLoader:
        """Return a loader of all test users, on every process."""
        return self._users(self.splits.test, shard=False)

    def predict_dataloader(self) -> HistoryLoader:
        """Return a loader of all users with their whole histories, for recommendations."""
        offsets = self.splits.histories.offsets
        return self._users(HeldOut(np.arange(offsets.size - 1), offsets[1:]))

    def item_titles(self) -> list[str]:
        """Return the titles of the catalogue's items, in its order.

        Raises:
            UserError: The dataset has none.
        """
        raise UserError(f"dataset {self.name}: its items have no titles; choose another dataset")

    def item_counts(self) -> Tensor:
        """Return the number of training events of each item, (I,) int64."""
        return self.splits.item_counts

    def identity(self) -> dict[str, str]:
        """Return hashes of the items, of the users, and of the events with their split."""
        splits = self.splits
        return {
            "items": content_hash(splits.item_ids),
            "users": content_hash(splits.user_ids),
            "split": content_hash(
                splits.histories.events,
                splits.train_stop,
                *([] if splits.train_start is None else [splits.train_start]),
                *splits.val,
                *splits.test,
            ),
            **{
                name: content_hash(array)
                for name, array in zip(("times", "columns"), splits.context, strict=True)
                if array is not None
            },
        }

    def baseline_metrics(self, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return test metrics of the most popular items, and of the user's own items, the latest first.

        ``_unfiltered``: items of the user's history may be recommended again. In ``popularity`` they are left out, a
        target that was seen before as well: the rule of :class:`~recsys_ssm.models.next_item.NextItem`.
        """
        splits = self.splits
        n_items = len(splits.item_ids)
        by_count = torch.argsort(splits.item_counts, descending=True, stable=True)
        results = {}
        for name in ("popularity", "popularity_unfiltered", "repeat_last_unfiltered"):
            # Every process ranks for all users here, so there is nothing to sum over processes.
            ranking = RankingMetrics(
                metrics, n_items=n_items, item_counts=splits.item_counts, sync_on_compute=False
            )
            for batch in self.test_batches():
                k = ranking.max_k
                if name == "popularity":
                    top = first_unseen(by_count, batch.seen, k)
                elif name == "popularity_unfiltered":
                    top = by_count[:k].expand(len(batch.user), -1)
                else:
                    top = _latest(batch.seen, k)
                filled = torch.nn.functional.pad(top, (0, ranking.max_k - top.shape[1]), value=-1)
                ranking.update_from_top(filled, batch.target)
            results[name] = {metric: float(value) for metric, value in ranking.compute().items()}
        return results

    def _windows(
        self,
        windows: Windows,
        every_position: bool,
        shuffle: bool,
        batch_samples: int | None = None,
        targets: np.ndarray | None = None,
    ) -> SequenceLoader:
        return SequenceLoader(
            self.splits.histories.events,
            windows,
            targets=targets,
            every_position=every_position,
            masked=self.objective == "masked",
            batch_positions=self.batch_positions,
            batch_samples=batch_samples,
            context=self.splits.context,
            row_length=self.row_length,
            shuffle=shuffle,
            seed=self.seed,
            **self._shard(),
            **self._loading(),
        )

    def _users(self, held_out: HeldOut, *, shard: bool = True) -> HistoryLoader:
        return HistoryLoader(
            self.splits.histories,
            held_out,
            max_length=self.max_length,
            row_length=self.row_length,
            batch_size=self.eval_batch_size,
            masked=self.objective == "masked",
            start_token=self.start_token,
            context=self.splits.context,
            **(self._shard() | self._loading() if shard else {}),
        )


def _new_targets(histories: Histories, since: np.ndarray) -> np.ndarray:
    """Return the events (E,), :data:`~recsys_ssm.batches.NO_ITEM` at those of user u before ``since[u]``."""
    targets, first = histories.events.astype(np.int32), histories.offsets[:-1]
    targets[join_ranges(first, np.maximum(since - first, 0))] = NO_ITEM
    return targets


def _targets_between(targets: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return the number of targets in each span ``targets[first:stop]``; (n,) int64."""
    before = np.concatenate([[0], np.cumsum(targets >= 0)])
    return before[stop] - before[first]


def _cut(first: np.ndarray, stop: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut spans into pieces of at most ``length``, the shorter piece at the beginning."""
    n_pieces = -(-(stop - first) // length)
    back = join_ranges(np.zeros_like(n_pieces), n_pieces) * length
    first, stop = np.repeat(first, n_pieces), np.repeat(stop, n_pieces) - back
    return np.maximum(first, stop - length), stop


def first_unseen(ranked: Tensor, seen: Ragged, k: int) -> Tensor:
    """Return the first ``k`` of ``ranked`` (I,) that are not in the history; (U, k) int64, -1 if there are fewer."""
    n_users, lengths = seen.lengths.numel(), seen.lengths
    n = min(ranked.numel(), k + int(lengths.max()))  # among these, k are not in the history
    place = torch.empty_like(ranked)
    place[ranked] = torch.arange(ranked.numel())
    # The last column stands for all later items.
    taken = torch.zeros(n_users, n + 1, dtype=torch.bool)
    user = torch.arange(n_users).repeat_interleave(lengths)
    taken[user, place[seen.values].clamp(max=n)] = True
    return _left_aligned(ranked[:n].expand(n_users, -1), taken[:, :n])[:, :k]


def _latest(seen: Ragged, k: int) -> Tensor:
    """Return each user's latest ``k`` different items, the latest first; (U, k) int64, -1 if there are fewer."""
    lengths = seen.lengths
    user = torch.arange(lengths.numel()).repeat_interleave(lengths)
    # Sorted by user and item (stable), the last of equal neighbours is an item's latest event.
    by_item = torch.argsort(seen.values, stable=True)
    order = by_item[torch.argsort(user[by_item], stable=True)]
    again = (user[order][1:] == user[order][:-1]) & (
        seen.values[order][1:] == seen.values[order][:-1]
    )
    kept = order[torch.nn.functional.pad(~again, (0, 1), value=True)].sort().values
    n_kept = torch.bincount(user[kept], minlength=lengths.numel())
    place = n_kept.cumsum(0)[user[kept]] - 1 - torch.arange(kept.numel())  # 0: the latest
    top = torch.full((lengths.numel(), k), NO_ITEM)
    near = place < k
    top[user[kept][near], place[near]] = seen.values[kept][near]
    return top


def _left_aligned(items: Tensor, without: Tensor) -> Tensor:
    """Remove the items that ``without`` marks from each row; fill up with -1 at its end."""
    order = torch.argsort(without.to(torch.uint8), dim=1, stable=True)
    return items.masked_fill(without, NO_ITEM).gather(1, order)
