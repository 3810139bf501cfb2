"""Next-item recommendation from a file of interactions, whatever its format.

    data = Interactions(interactions="ratings.csv", user="user_id", item="item_id")

Every dataset of this kind is a config of this one class. What it does, in order: rows are read
(:mod:`recsys_ssm.data.formats`), those below ``min_rating`` left out, repeated ones too as
``duplicates`` says, then users and items with too few events (``k_core``, until none is left);
what remains is sorted by user and time, rows of equal time in the order of the file; then split.

Legend: R rows of the file, E events that are kept, U users and I items, in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from recsys_ssm.data.files import collect
from recsys_ssm.data.formats import Format, check_format, format_of, scan, scan_sequences
from recsys_ssm.data.sequences import HeldOut, Histories, SequenceData, SequenceSets
from recsys_ssm.errors import UserError
from recsys_ssm.features import numeric_column, text_column

Duplicates = Literal["identical", "first", "last", "keep"]
Split = Literal["leave_one_out", "time"]

MIN_EVENTS = 3
"""Events of a user that ``leave_one_out`` holds out items of: one to train on, one each to validate and test."""


class Interactions(SequenceData):
    """Histories from one file of interactions.

    Args:
        interactions: The file, or several of which the first that is there is read; relative to
            ``root``. Format and layout: :mod:`recsys_ssm.data.formats`.
        root: Folder of the files; None: where the program is run.
        format: One of ``csv, parquet, recbole, movielens, sequences``; None: as the name says.
        user, item: What the id columns are called.
        timestamp: Column that orders a user's events (numbers, dates, or ISO text); None: rows are
            in the order of time already.
        rating: Column of ratings, for ``min_rating``.
        min_rating: Rows rated below it are left out; None: every row is an event.
        names: Names for the columns of a file without a header line.
        separator: Between the cells of a line; None: the format's own.
        duplicates: What counts once: ``identical``, rows of one user, item and timestamp; ``first``
            or ``last``, all a user's rows of an item, at its first or last time; ``keep``: nothing.
        k_core: Users and items with fewer events are left out, again and again until none is left;
            0 keeps all.
        split: ``leave_one_out``: a user's last event is the test, the one before it the validation,
            all others training; ``time``: one instant for all parts the training from the
            validation, another that from the test, and a user's first event after it is predicted.
        val_share, test_share: Of the events, for ``split="time"``.
        name, base: See :class:`~recsys_ssm.data.sequences.SequenceData`.

    Raises:
        UserError: An option is not possible. Files are read, and their mistakes found, at the first
            use of ``sets``.
    """

    def __init__(
        self,
        *,
        interactions: str | Path | Sequence[str] | None = None,
        root: str | Path | None = None,
        format: Format | None = None,  # noqa: A002 (what everyone calls it)
        user: str = "user_id",
        item: str = "item_id",
        timestamp: str | None = "timestamp",
        rating: str | None = None,
        min_rating: float | None = None,
        names: Sequence[str] = (),
        separator: str | None = None,
        duplicates: Duplicates = "identical",
        k_core: int = 0,
        split: Split = "leave_one_out",
        val_share: float = 0.1,
        test_share: float = 0.1,
        name: str = "interactions",
        **base: Any,
    ) -> None:
        super().__init__(name=name, **base)
        if not interactions:
            raise UserError("dataset.interactions: not set; name the file of interactions")
        check_format(format)
        for option, known, word in (
            ("duplicates", ("identical", "first", "last", "keep"), duplicates),
            ("split", ("leave_one_out", "time"), split),
        ):
            if word not in known:
                raise UserError(f"dataset.{option}={word}: expected one of {', '.join(known)}")
        if k_core < 0:
            raise UserError(f"dataset.k_core={k_core}: give 0 (all are kept) or more")
        for option, share in (("val_share", val_share), ("test_share", test_share)):
            if not 0 < share < 1:
                raise UserError(f"dataset.{option}={share}: give a share between 0 and 1")
        if min_rating is not None and rating is None:
            raise UserError(
                f"dataset.min_rating={min_rating}: name the column of ratings with dataset.rating"
            )
        if split == "time" and timestamp is None:
            raise UserError("dataset.split=time: name the column of times with dataset.timestamp")
        paths = [interactions] if isinstance(interactions, str | Path) else list(interactions)
        self.paths = [Path(root or "").expanduser() / Path(path).expanduser() for path in paths]
        self.format, self.names, self.separator = format, tuple(names), separator
        self.user, self.item, self.timestamp, self.rating = user, item, timestamp, rating
        self.min_rating, self.duplicates, self.k_core = min_rating, duplicates, k_core
        self.split, self.val_share, self.test_share = split, val_share, test_share

    def build(self) -> SequenceSets:
        notes: list[str] = []
        events = self._read(self._find(), notes)
        events = self._without_duplicates(events, notes)
        events = self._core(events, notes)
        user, item = events.user, events.item
        order = _by_user_and_time(events)
        n_sorted = int((order[:-1] > order[1:])[user[order][:-1] == user[order][1:]].sum())
        if n_sorted:
            notes.append("rows were not in the order of time: sorted, equal times in file order")
        kept_users, user = np.unique(user[order], return_inverse=True)
        kept_items, item = np.unique(item[order], return_inverse=True)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64)
        histories = Histories(item.astype(np.int32), offsets)
        time = None if events.time is None else events.time[order]
        if self.split == "leave_one_out":
            train_stop, val, test = _leave_one_out(offsets, notes)
        else:
            assert time is not None
            train_stop, val, test = self._by_time(offsets, time, notes)
        sets = SequenceSets(
            item_ids=events.item_ids.gather(kept_items).to_list(),
            user_ids=events.user_ids.gather(kept_users),
            histories=histories,
            train_stop=train_stop,
            val=val,
            test=test,
            notes=notes,
        )
        _describe(sets)
        return sets

    def _find(self) -> Path:
        for path in self.paths:
            if path.is_file():
                return path
        raise UserError(
            f"{self.paths[0]}: no such file; put it there"
            + "".join(f", or {path.name}" for path in self.paths[1:])
            + f" (looked in {self.paths[0].parent.resolve()}), or set dataset.root"
        )

    def _read(self, path: Path, notes: list[str]) -> _Events:
        where = str(path)
        if (self.format or format_of(path)) == "sequences":
            return self._read_sequences(path, notes)
        columns = [self.user, self.item]
        columns += [name for name in (self.timestamp, self.rating) if name is not None]
        frame = collect(
            scan(
                path,
                list(dict.fromkeys(columns)),
                format=self.format,
                names=self.names,
                separator=self.separator,
            ),
            path,
        )
        n_rows = frame.height
        user, item = (_keys(frame, name, where) for name in (self.user, self.item))
        time = None if self.timestamp is None else _instants(frame, self.timestamp, where)
        kept = np.ones(n_rows, dtype=bool)
        if self.min_rating is not None:
            assert self.rating is not None
            rating = numeric_column(frame, self.rating, where)
            _refuse(np.isnan(rating), where, self.rating, "the rating is missing")
            kept = rating >= self.min_rating
            if not kept.any():
                raise UserError(
                    f"{where}: no rating is {self.min_rating:g} or more; the highest is "
                    f"{rating.max():g}: lower dataset.min_rating"
                )
        user_ids, item_ids = user.unique().sort(), item.unique().sort()
        notes.append(
            f"{where}: {n_rows:,} rows, {user_ids.len():,} users, {item_ids.len():,} items"
        )
        if not kept.all():
            notes.append(
                f"{int((~kept).sum()):,} rows rated below min_rating={self.min_rating:g} left out"
            )
        events = _Events(
            _positions(user, user_ids), _positions(item, item_ids), time, user_ids, item_ids
        )
        return events.at(kept)

    def _read_sequences(self, path: Path, notes: list[str]) -> _Events:
        if self.split == "time":
            raise UserError(f"{path}: a sequence text has no times; take split=leave_one_out")
        frame = collect(scan_sequences(path, separator=self.separator), path)
        without = (frame["items"].list.len() == 0) & ~frame["blank"]
        if without.any():
            line = int(without.to_numpy().argmax())
            raise UserError(
                f"{path}, line {line + 1}: one id alone ({frame['user'][line]!r}); "
                "a line is a user and the items, user item item …"
            )
        frame = frame.filter(~pl.col("blank")).select("user", "items").explode("items")
        user_ids, item_ids = frame["user"].unique().sort(), frame["items"].unique().sort()
        notes.append(
            f"{path}: {frame.height:,} events, {user_ids.len():,} users, {item_ids.len():,} items"
        )
        return _Events(
            _positions(frame["user"], user_ids),
            _positions(frame["items"], item_ids),
            None,
            user_ids,
            item_ids,
        )

    def _without_duplicates(self, events: _Events, notes: list[str]) -> _Events:
        if self.duplicates == "keep" or (self.duplicates == "identical" and events.time is None):
            return events
        order = _by_user_and_time(events)
        if self.duplicates == "last":
            order = order[::-1]
        pair = events.user[order].astype(np.int64) * events.item_ids.len() + events.item[order]
        if self.duplicates == "identical":
            assert events.time is not None
            keys = np.unique(events.time[order], return_inverse=True)[1]
            _, pair = np.unique(pair, return_inverse=True)
            pair = pair * (keys.max() + 1) + keys
        _, first = np.unique(pair, return_index=True)
        kept = np.sort(order[first])
        if dropped := events.user.size - kept.size:
            what = {
                "identical": "rows repeat user, item and timestamp of another: counted once",
                "first": "rows repeat a (user, item) pair: its first counts",
                "last": "rows repeat a (user, item) pair: its last counts",
            }[self.duplicates]
            notes.append(f"{dropped:,} {what} (duplicates={self.duplicates})")
        return events.at(kept)

    def _core(self, events: _Events, notes: list[str]) -> _Events:
        """Users and items with ``k_core`` events or more, all counted among themselves."""
        if self.k_core < 2:
            return events
        before = events.user.size
        rounds = 0
        while events.user.size:
            enough = np.ones(events.user.size, dtype=bool)
            for side in (events.user, events.item):
                enough &= np.bincount(side)[side] >= self.k_core
            if enough.all():
                break
            events, rounds = events.at(enough), rounds + 1
        if not events.user.size:
            raise UserError(
                f"dataset.k_core={self.k_core} leaves none of {before:,} events: no set of users "
                f"and items has {self.k_core} events each among themselves; lower it"
            )
        if dropped := before - events.user.size:
            notes.append(
                f"k_core={self.k_core}: {dropped:,} events of users or items with fewer left out, "
                f"in {rounds} rounds"
            )
        return events

    def _by_time(
        self, offsets: np.ndarray, time: np.ndarray, notes: list[str]
    ) -> tuple[np.ndarray, HeldOut, HeldOut]:
        """Training before one instant, validation up to another, the test from then on."""
        ordered = np.sort(time)
        at = [1 - self.val_share - self.test_share, 1 - self.test_share]
        val_from, test_from = (ordered[int(share * ordered.size)] for share in at)
        stops = [
            offsets[:-1]
            + np.add.reduceat(np.append(time < instant, False).astype(np.int64), offsets[:-1])
            for instant in (val_from, test_from)
        ]
        n_users = offsets.size - 1
        parts = []
        for name, begin, end in (
            ("validation", stops[0], stops[1]),
            ("test", stops[1], offsets[1:]),
        ):
            has_event, has_history = end > begin, begin > offsets[:-1]
            user = np.flatnonzero(has_event & has_history)
            notes.append(
                f"{name}: {user.size:,} of {n_users:,} users, their first event of the period; "
                f"{int((has_event & ~has_history).sum()):,} users without an earlier one left out"
            )
            parts.append(HeldOut(user, begin[user]))
        return stops[0], parts[0], parts[1]


class _Events(NamedTuple):
    """Rows that count, in the order of the file."""

    user: np.ndarray
    """(E,) rows of ``user_ids``."""
    item: np.ndarray
    """(E,) rows of ``item_ids``."""
    time: np.ndarray | None
    """(E,) int64 or float64."""
    user_ids: pl.Series
    item_ids: pl.Series

    def at(self, rows: np.ndarray) -> _Events:
        time = None if self.time is None else self.time[rows]
        return _Events(self.user[rows], self.item[rows], time, self.user_ids, self.item_ids)


def _by_user_and_time(events: _Events) -> np.ndarray:
    """Order of the rows by user, then time, then place in the file."""
    if events.time is None:
        return np.argsort(events.user, kind="stable")
    return np.lexsort((events.time, events.user))  # stable


def _leave_one_out(offsets: np.ndarray, notes: list[str]) -> tuple[np.ndarray, HeldOut, HeldOut]:
    lengths = np.diff(offsets)
    user = np.flatnonzero(lengths >= MIN_EVENTS)
    train_stop = offsets[1:].copy()
    train_stop[user] -= 2
    if few := lengths.size - user.size:
        notes.append(
            f"{few:,} users with fewer than {MIN_EVENTS} events: trained on, not evaluated"
        )
    return train_stop, HeldOut(user, offsets[user + 1] - 2), HeldOut(user, offsets[user + 1] - 1)


def _describe(sets: SequenceSets) -> None:
    events, offsets = sets.histories
    n_trained = int(sets.item_counts.sum())
    sets.notes.append(
        f"{events.size:,} events of {offsets.size - 1:,} users and {len(sets.item_ids):,} items; "
        f"{n_trained:,} trained on, {sets.val.user.size:,} users validated, "
        f"{sets.test.user.size:,} tested"
    )
    if untrained := int((sets.item_counts == 0).sum()):
        sets.notes.append(
            f"{untrained:,} items are in no training event: in the catalogue, ranked like the others"
        )


def _keys(frame: pl.DataFrame, column: str, where: str) -> pl.Series:
    keys = text_column(frame, column, where)
    _refuse(keys.is_null().to_numpy(), where, column, "empty; every row needs its id")
    return keys


def _refuse(wrong: np.ndarray, where: str, column: str, what: str) -> None:
    if wrong.any():
        raise UserError(f"{where}, row {int(wrong.argmax()) + 1}, column {column!r}: {what}")


def _positions(keys: pl.Series, ids: pl.Series) -> np.ndarray:
    """Where each of ``keys`` stands among ``ids``, int32."""
    return keys.cast(pl.Enum(ids)).to_physical().cast(pl.Int32).to_numpy()


def _instants(frame: pl.DataFrame, column: str, where: str) -> np.ndarray:
    """Times as numbers that order them, int64 where they are whole (float64 holds 53 bits only).

    Raises:
        UserError: A cell is empty, or neither a number nor a date.
    """
    times = frame[column]
    if times.dtype == pl.String:
        text = times.str.strip_chars()
        for kind in (pl.Int64, pl.Float64):
            times = text.cast(kind, strict=False)
            if not times.null_count():
                break
        if times.null_count() > times.len() / 2:
            times = text.str.to_datetime(strict=False, time_unit="us", time_zone="UTC")
    if times.dtype.is_temporal():
        times = times.cast(pl.Datetime("us")).cast(pl.Int64)
    if times.dtype.is_float():
        times = times.set(~times.is_finite().fill_null(value=False), None)
    wrong = times.is_null().to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{where}, row {row + 1}, column {column!r}: {frame[column][row]!r} is no time; "
            "give numbers, or dates as YYYY-MM-DD hh:mm:ss, in every row"
        )
    return times.to_numpy()
