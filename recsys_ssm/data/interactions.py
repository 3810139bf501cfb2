"""Next-item recommendation from a file of interactions, whatever its format.

    data = Interactions(interactions="ratings.csv", user="user_id", item="item_id")

Every dataset of this kind is a config of this one class. What it does, in order: rows are read
(:mod:`recsys_ssm.data.formats`), those below ``min_rating`` left out; each user's are put in the
order of time, those of equal time in the order of the file; repeated ones are left out as
``duplicates`` says, then users and items with too few events (``k_core``), until none is left;
what remains is split.
The result is kept (:mod:`recsys_ssm.data.cache`) and memory-mapped.

Legend: R rows of the file, E events that are kept, U users and I items, in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from recsys_ssm.data.cache import Prepared, cache_folder, load_or_make
from recsys_ssm.data.download import fetch_member
from recsys_ssm.data.files import collect
from recsys_ssm.data.formats import Format, check_format, format_of, scan, scan_sequences
from recsys_ssm.data.packing import spread
from recsys_ssm.data.sequences import HeldOut, Histories, SequenceData, SequenceSplits
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema, numeric_column, text_column

Duplicates = Literal["identical", "first", "last", "keep"]
Split = Literal["leave_one_out", "time"]

MIN_EVENTS = 3
"""Events of a user that ``leave_one_out`` holds out items of: one to train on, one each to validate and test."""


_BLOCK = 1 << 14
"""Users whose histories are looked at together."""


class Interactions(SequenceData):
    """Histories from one file of interactions; every option is also a config key.

    Args:
        interactions: The file, or several of which the first that is there is read; relative to
            ``root``. Formats: :mod:`recsys_ssm.data.formats`.
        root: Folder of the files; None: where the program is run.
        format: One of ``csv, parquet, recbole, movielens, sequences``; None: as the name says.
        user, item: What the id columns are called. Ids are text, however long.
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
        val_share, test_share: Of the events, the latest, for ``split="time"``.
        val_from, test_from: The two instants themselves, as the column of times has them.
        items: File of item features (CSV, Parquet, ``.item``, ``movies.dat``), relative to ``root``;
            items without an event stay out of the catalogue.
        item_key: Its id column; None: called as in the interactions.
        item_numeric, item_categorical: Its feature columns.
        item_names: Names for its columns, where it has no header line.
        cache_dir: Where prepared data is kept; None: ``$RECSYS_SSM_CACHE`` or the user's cache.
        download: ``{url, md5, member}`` of a public archive that has the file, for when none is
            there; None: nothing is ever fetched.
        source: Where people get the file, told when it is not there.
        name, base: See :class:`~recsys_ssm.data.sequences.SequenceData`.

    Raises:
        UserError: An option is not possible. Files are read, and their mistakes found, at the first
            use of ``splits``.
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
        val_from: float | str | None = None,
        test_from: float | str | None = None,
        items: str | Path | None = None,
        item_key: str | None = None,
        item_numeric: Sequence[str] = (),
        item_categorical: Sequence[str] = (),
        item_names: Sequence[str] = (),
        cache_dir: str | Path | None = None,
        download: Mapping[str, str] | None = None,
        source: str | None = None,
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
        if user == item:
            raise UserError(f"dataset.user, dataset.item: both are {user!r}; name two columns")
        if min_rating is not None and rating is None:
            raise UserError(
                f"dataset.min_rating={min_rating}: name the column of ratings with dataset.rating"
            )
        _check_time_split(split, timestamp, val_share, test_share, val_from, test_from)
        self.item_numeric, self.item_categorical = _listed(item_numeric), _listed(item_categorical)
        if items is None and (self.item_numeric or self.item_categorical):
            raise UserError(
                "dataset.items: not set, but item_numeric and item_categorical name columns; give "
                "the file that has them"
            )
        if items is not None and not (self.item_numeric or self.item_categorical):
            raise UserError(
                f"dataset.items={items}: name its feature columns with dataset.item_numeric and "
                "dataset.item_categorical"
            )
        if download is not None and set(download) != {"url", "md5", "member"}:
            raise UserError(
                f"dataset.download: expected url, md5 and member, got {', '.join(download) or 'none'}"
            )
        self.root = Path(root or "").expanduser()
        paths = [interactions] if isinstance(interactions, str | Path) else list(interactions)
        self.paths = [self.root / Path(path).expanduser() for path in paths]
        self.format, self.names, self.separator = format, _listed(names), separator
        self.user, self.item, self.timestamp, self.rating = user, item, timestamp, rating
        self.min_rating, self.duplicates, self.k_core = min_rating, duplicates, k_core
        self.split, self.val_share, self.test_share = split, val_share, test_share
        self.val_from, self.test_from = val_from, test_from
        self.items = None if items is None else self.root / Path(items).expanduser()
        self.item_key, self.item_names = item_key or item, _listed(item_names)
        self.cache = cache_folder(cache_dir)
        self.download, self.source = download, source

    def build(self) -> SequenceSplits:
        path = self._find()
        settings = {
            option: getattr(self, option)
            for option in (
                *("format", "names", "separator", "user", "item", "timestamp", "rating"),
                *("min_rating", "duplicates", "k_core", "split"),
                *("val_share", "test_share", "val_from", "test_from"),
            )
        }
        prepared = load_or_make(
            self.cache / "interactions", self.name, [path], settings, lambda: self._prepare(path)
        )
        try:
            splits = _splits(prepared)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        _describe(splits)
        if self.items is not None:
            splits.item_schema, splits.items = self._item_features(splits)
        return splits

    def _find(self) -> Path:
        """The file to read, fetched if that is possible and needed."""
        for path in self.paths:
            if path.is_dir():
                raise UserError(f"{path}: is a folder; name the file in it")
            if path.is_file():
                return path
        absent = (
            f"{self.paths[0]}: no such file (looked in {self.paths[0].parent.resolve()}); put "
            + " or ".join(path.name for path in self.paths)
            + " there"
            + (f", from {self.source}," if self.source else "")
            + " or name another folder with dataset.root"
        )
        if self.download is None:
            raise UserError(absent)
        try:
            return fetch_member(**self.download, folder=self.cache / "downloads")
        except UserError as error:
            raise UserError(f"{absent}; {error}") from error

    def read_histories(self, path: str | Path) -> tuple[pl.Series, list[str], Histories]:
        """Histories of another file with the columns of this dataset: people to recommend something to.

        Rows are ordered, rated and counted as in the training, but no user and no item is too rare.

        Returns:
            User ids (U,), the ids that the events are places among, and the histories.

        Raises:
            UserError: The file does not exist, lacks a column, or a cell is wrong.
        """
        user_ids, item_ids, histories = _ragged(self._ordered(Path(path), notes=[]))
        return user_ids, item_ids.to_list(), histories

    # Reading and preparing

    def _ordered(self, path: Path, notes: list[str]) -> _Rows:
        """The rows of a file that count, by user and time."""
        kind = self.format or format_of(path)
        rows = self._sequences(path, notes) if kind == "sequences" else self._table(path, notes)
        return _without_repeats(_by_user_and_time(rows, notes), self.duplicates, notes)

    def _prepare(self, path: Path) -> Prepared:
        """The histories and their split, as they are kept."""
        notes: list[str] = []
        rows = _core(self._ordered(path, notes), self.k_core, notes)
        user_ids, item_ids, (events, offsets) = _ragged(rows)
        if self.split == "leave_one_out":
            train_stop, val, test = _leave_one_out(offsets, notes)
        else:
            assert rows.time is not None
            instants = self._instants(rows.time, rows.is_date)
            train_stop, val, test = _by_instants(offsets, rows.time, instants, notes)
        if again := _n_had_before(Histories(events, offsets), test):
            notes.append(f"{again:,} users are tested on an item they had before")
        return Prepared(
            arrays={
                "events": events,
                "offsets": offsets,
                "train_stop": train_stop,
                "val_user": val.user,
                "val_event": val.event,
                "test_user": test.user,
                "test_event": test.event,
            },
            texts={"user_ids": user_ids, "item_ids": item_ids},
            notes=notes,
        )

    def _table(self, path: Path, notes: list[str]) -> _Rows:
        """Rows of a table with named columns, those below ``min_rating`` left out."""
        where = str(path)
        columns = [self.user, self.item]
        columns += [name for name in (self.timestamp, self.rating) if name is not None]
        scanned = scan(
            path,
            list(dict.fromkeys(columns)),
            format=self.format,
            names=self.names,
            separator=self.separator,
        )
        frame = collect(scanned, path)
        user, item = (_keys(frame, name, where) for name in (self.user, self.item))
        time, is_date = None, False
        if self.timestamp is not None:
            time, is_date = _times(frame, self.timestamp, where)
        user_ids, item_ids = user.unique().sort(), item.unique().sort()
        rows = _Rows(
            _positions(user, user_ids),
            _positions(item, item_ids),
            time,
            is_date,
            user_ids,
            item_ids,
        )
        notes.append(
            f"{where}: {frame.height:,} rows, {user_ids.len():,} users, {item_ids.len():,} items"
        )
        if self.min_rating is None:
            return rows
        assert self.rating is not None
        rating = _numbers(frame, self.rating, where)
        kept = rating >= self.min_rating
        if not kept.any():
            raise UserError(
                f"{where}: no {self.rating} is {self.min_rating:g} or more, the highest is "
                f"{rating.max():g}; lower dataset.min_rating"
            )
        if not kept.all():
            notes.append(
                f"{int((~kept).sum()):,} rows with {self.rating} below {self.min_rating:g} left out"
            )
        return rows.at(kept)

    def _sequences(self, path: Path, notes: list[str]) -> _Rows:
        """Events of a sequence text."""
        if self.split == "time":
            raise UserError(f"{path}: a sequence text has no times; take split=leave_one_out")
        if self.min_rating is not None:
            raise UserError(f"{path}: a sequence text has no ratings; set dataset.min_rating=null")
        frame = collect(scan_sequences(path, separator=self.separator), path)
        alone = ((frame["items"].list.len() == 0) & ~frame["blank"]).to_numpy()
        if alone.any():
            line = int(alone.argmax())
            raise UserError(
                f"{path}, line {line + 1}: one id alone ({frame['user'][line]!r}); a line is a user "
                "and that user's items: user item item …"
            )
        frame = frame.filter(~pl.col("blank")).select("user", "items")
        if not frame.height:
            raise UserError(f"{path}: every line is blank; a line is user item item …")
        if again := frame.height - frame["user"].n_unique():
            notes.append(f"{path}: {again:,} lines go on with the user of an earlier one")
        frame = frame.explode("items")
        user, item = frame["user"], frame["items"]
        user_ids, item_ids = user.unique().sort(), item.unique().sort()
        notes.append(
            f"{path}: {frame.height:,} events, {user_ids.len():,} users, {item_ids.len():,} items"
        )
        return _Rows(
            _positions(user, user_ids), _positions(item, item_ids), None, False, user_ids, item_ids
        )

    def _instants(self, time: np.ndarray, is_date: bool) -> tuple[float, float]:
        """When validation and test begin."""
        if self.val_from is None or self.test_from is None:
            ordered = np.sort(time)
            shares = (1 - self.val_share - self.test_share, 1 - self.test_share)
            val_from, test_from = (ordered[int(share * ordered.size)] for share in shares)
        else:
            val_from, test_from = (
                _instant(value, option, is_date)
                for option, value in (("val_from", self.val_from), ("test_from", self.test_from))
            )
        if not val_from < test_from:
            raise UserError(
                f"dataset.split=time: validation begins at {val_from}, the test at {test_from}; "
                "the test comes later: set val_from and test_from, or other shares"
            )
        return val_from, test_from

    def _item_features(self, splits: SequenceSplits) -> tuple[FeatureSchema, Features]:
        """Features of the catalogue's items, scaled by what training has events of."""
        assert self.items is not None
        where, key = str(self.items), self.item_key
        columns = [key, *self.item_numeric, *self.item_categorical]
        scanned = scan(self.items, columns, names=self.item_names)
        frame = collect(scanned, self.items)
        keys = _keys(frame, key, where)
        again = (~keys.is_first_distinct()).to_numpy()
        _refuse(again, where, key, "this id stands in an earlier row too; each item needs one row")
        # Cells are checked here, where their row number is the file's.
        frame = pl.DataFrame(
            {
                key: keys,
                **{name: numeric_column(frame, name, where) for name in self.item_numeric},
                **{name: text_column(frame, name, where) for name in self.item_categorical},
            }
        ).with_columns(pl.col(self.item_numeric).fill_nan(None))
        catalogue = pl.DataFrame({key: splits.item_ids})
        n_known = catalogue.join(frame, on=key, how="semi").height
        if n_known == 0:
            raise UserError(
                f"{where}: none of the {catalogue.height:,} items of the interactions is in it, for "
                f"example {splits.item_ids[0]!r}; its first is {keys[0]!r}: are ids written alike?"
            )
        if absent := catalogue.height - n_known:
            splits.notes.append(
                f"{where}: {absent:,} items are not in it: their features are missing"
            )
        if idle := frame.height - n_known:
            splits.notes.append(f"{where}: {idle:,} items without an event: not in the catalogue")
        table = catalogue.join(frame, on=key, how="left", maintain_order="left")
        schema = FeatureSchema.fit(
            table.filter(pl.Series(splits.item_counts.numpy() > 0)),
            numeric=self.item_numeric,
            categorical=self.item_categorical,
            where=where,
        )
        return schema, schema.encode(table, where=where)


class _Rows(NamedTuple):
    """Rows that count: first in the order of the file, then sorted by user and time."""

    user: np.ndarray
    """(R,) int32, places in ``user_ids``."""
    item: np.ndarray
    """(R,) int32, places in ``item_ids``."""
    time: np.ndarray | None
    """(R,) int64 or float64."""
    is_date: bool
    """``time`` is in microseconds since 1970."""
    user_ids: pl.Series
    item_ids: pl.Series

    def at(self, index: np.ndarray) -> _Rows:
        time = None if self.time is None else self.time[index]
        return self._replace(user=self.user[index], item=self.item[index], time=time)


def _ragged(rows: _Rows) -> tuple[pl.Series, pl.Series, Histories]:
    """Ids of the users and items that rows are left of, and their events."""
    user, user_ids = _renumber(rows.user, rows.user_ids)
    events, item_ids = _renumber(rows.item, rows.item_ids)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64)
    return user_ids, item_ids, Histories(events, offsets)


def _splits(prepared: Prepared) -> SequenceSplits:
    arrays, texts = prepared.arrays, prepared.texts
    return SequenceSplits(
        item_ids=texts["item_ids"].to_list(),
        user_ids=texts["user_ids"],
        histories=Histories(arrays["events"], arrays["offsets"]),
        train_stop=arrays["train_stop"],
        val=HeldOut(arrays["val_user"], arrays["val_event"]),
        test=HeldOut(arrays["test_user"], arrays["test_event"]),
        notes=list(prepared.notes),
    )


def _by_user_and_time(rows: _Rows, notes: list[str]) -> _Rows:
    """Sorted by user, then time, then place in the file (both sorts are stable)."""
    if rows.time is None:
        return rows.at(np.argsort(rows.user, kind="stable"))
    order = np.lexsort((rows.time, rows.user))
    if (np.diff(order)[np.diff(rows.user[order]) == 0] < 0).any():
        notes.append("rows were not in the order of time: sorted, equal times in file order")
    return rows.at(order)


def _without_repeats(rows: _Rows, duplicates: str, notes: list[str]) -> _Rows:
    """Sorted rows without those that count as another's repetition."""
    if duplicates == "keep" or (duplicates == "identical" and rows.time is None):
        return rows
    keys = [rows.user, rows.item]
    if duplicates == "identical":
        assert rows.time is not None
        if not ((np.diff(rows.user) == 0) & (np.diff(rows.time) == 0)).any():
            return rows
        keys.append(rows.time)
    order = np.lexsort((rows.item, rows.user))  # stable: a pair's rows stay in the order of time
    same = np.logical_and.reduce([np.diff(key[order]) == 0 for key in keys])
    # Of a run of equal rows the first stays, or the last.
    same = np.append(same, False) if duplicates == "last" else np.insert(same, 0, False)
    if dropped := int(same.sum()):
        what = {
            "identical": "repeat user, item and timestamp of another, which counts once",
            "first": "are of an item the user had already: its first counts",
            "last": "are of an item the user has again later: its last counts",
        }[duplicates]
        notes.append(f"{dropped:,} rows {what} (duplicates={duplicates})")
    return rows.at(np.sort(order[~same]))


def _core(rows: _Rows, k_core: int, notes: list[str]) -> _Rows:
    """Rows of users and items that have ``k_core`` each among what is left."""
    before, rounds = rows.user.size, 0
    while k_core > 1 and rows.user.size:
        enough = np.ones(rows.user.size, dtype=bool)
        for side in (rows.user, rows.item):
            enough &= np.bincount(side)[side] >= k_core
        if enough.all():
            break
        rows, rounds = rows.at(enough), rounds + 1
    if not rows.user.size:
        raise UserError(
            f"dataset.k_core={k_core} leaves none of {before:,} events: no users and items have "
            f"{k_core} or more each among themselves; lower it"
        )
    if dropped := before - rows.user.size:
        notes.append(
            f"k_core={k_core}: {dropped:,} events of users or items with fewer left out, in "
            f"{rounds} rounds"
        )
    return rows


def _leave_one_out(offsets: np.ndarray, notes: list[str]) -> tuple[np.ndarray, HeldOut, HeldOut]:
    """The last event to the test, the one before it to the validation."""
    lengths = np.diff(offsets)
    user = np.flatnonzero(lengths >= MIN_EVENTS)
    train_stop = offsets[1:].copy()
    train_stop[user] -= 2
    if few := lengths.size - user.size:
        notes.append(
            f"{few:,} users with fewer than {MIN_EVENTS} events: trained on, not evaluated"
        )
    return train_stop, HeldOut(user, offsets[user + 1] - 2), HeldOut(user, offsets[user + 1] - 1)


def _by_instants(
    offsets: np.ndarray, time: np.ndarray, instants: tuple[float, float], notes: list[str]
) -> tuple[np.ndarray, HeldOut, HeldOut]:
    """Each user's first event of a period is predicted from all before the period."""
    val_begin, test_begin = (
        offsets[:-1] + np.add.reduceat(time < instant, offsets[:-1], dtype=np.int64)
        for instant in instants
    )
    held_out = []
    for period, begin, end in (
        ("validation", val_begin, test_begin),
        ("test", test_begin, offsets[1:]),
    ):
        active, known = end > begin, begin > offsets[:-1]
        user = np.flatnonzero(active & known)
        notes.append(
            f"{period}: {user.size:,} users, their first event of the period; "
            f"{int((active & ~known).sum()):,} without an earlier event are left out"
        )
        held_out.append(HeldOut(user, begin[user]))
    return val_begin, held_out[0], held_out[1]


def _n_had_before(histories: Histories, held_out: HeldOut) -> int:
    """How many held-out events are of an item in the user's history."""
    n, (events, offsets) = 0, histories
    for block in range(0, held_out.user.size, _BLOCK):
        user, event = (array[block : block + _BLOCK] for array in held_out)
        length = event - offsets[user]
        same = events[spread(offsets[user], length)] == np.repeat(events[event], length)
        n += np.unique(np.repeat(user, length)[same]).size
    return n


def _describe(splits: SequenceSplits) -> None:
    events, offsets = splits.histories
    splits.notes.append(
        f"{events.size:,} events of {offsets.size - 1:,} users and {len(splits.item_ids):,} items; "
        f"{int(splits.item_counts.sum()):,} trained on, {splits.val.user.size:,} users validated on, "
        f"{splits.test.user.size:,} tested"
    )
    if untrained := int((splits.item_counts == 0).sum()):
        splits.notes.append(
            f"{untrained:,} items are in no training event: in the catalogue, ranked like the others"
        )


def _check_time_split(
    split: str,
    timestamp: str | None,
    val_share: float,
    test_share: float,
    val_from: float | str | None,
    test_from: float | str | None,
) -> None:
    for option, share in (("val_share", val_share), ("test_share", test_share)):
        if not 0 < share < 1:
            raise UserError(f"dataset.{option}={share}: give a share between 0 and 1")
    if val_share + test_share >= 1:
        raise UserError(
            f"dataset.val_share={val_share}, dataset.test_share={test_share}: leave some to train on"
        )
    if (val_from is None) != (test_from is None):
        raise UserError("dataset.val_from, dataset.test_from: give both instants, or neither")
    if split == "time" and timestamp is None:
        raise UserError("dataset.split=time: name the column of times with dataset.timestamp")
    if split != "time" and val_from is not None:
        raise UserError("dataset.val_from: only split=time has instants; set that, or leave it out")


def _listed(names: Sequence[str] | None) -> tuple[str, ...]:
    """One name written without the brackets of a list is that one column."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _renumber(codes: np.ndarray, ids: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Codes and ids without those that no row has."""
    used = np.bincount(codes, minlength=ids.len()) > 0
    return (np.cumsum(used, dtype=np.int32) - 1)[codes], ids.filter(pl.Series(used))


def _keys(frame: pl.DataFrame, column: str, where: str) -> pl.Series:
    """An id column as text, all there."""
    keys = text_column(frame, column, where)
    _refuse(keys.is_null().to_numpy(), where, column, "empty; every row needs its id")
    return keys


def _refuse(wrong: np.ndarray, where: str, column: str, what: str) -> None:
    if wrong.any():
        raise UserError(f"{where}, row {int(wrong.argmax()) + 1}, column {column!r}: {what}")


def _positions(keys: pl.Series, ids: pl.Series) -> np.ndarray:
    """Where each of ``keys`` stands among ``ids``, int32."""
    return keys.cast(pl.Enum(ids)).to_physical().cast(pl.Int32).to_numpy()


def _times(frame: pl.DataFrame, column: str, where: str) -> tuple[np.ndarray, bool]:
    """Times as numbers, int64 where they are whole (float64 has 53 bits), and whether they are dates.

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
        if times.null_count() > times.len() / 2:  # else the few that are no numbers are mistakes
            times = _dates(text)
    is_date = times.dtype.is_temporal()
    if is_date:
        times = times.cast(pl.Datetime("us")).cast(pl.Int64)
    elif times.dtype.is_float():
        times = times.set(~times.is_finite().fill_null(value=False), None)
    elif not times.dtype.is_integer():
        raise UserError(f"{where}: column {column!r} holds {times.dtype}, no times")
    wrong = times.is_null().to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{where}, row {row + 1}, column {column!r}: {frame[column][row]!r} is no time; "
            "give numbers, or dates as YYYY-MM-DD hh:mm:ss, in every row"
        )
    return times.to_numpy(), is_date


def _numbers(frame: pl.DataFrame, column: str, where: str) -> np.ndarray:
    """A column of finite numbers, none missing, as float64."""
    numbers = frame[column]
    if numbers.dtype == pl.String:
        numbers = numbers.str.strip_chars()
    numbers = numbers.cast(pl.Float64, strict=False)
    wrong = ~numbers.is_finite().fill_null(value=False).to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{where}, row {row + 1}, column {column!r}: {frame[column][row]!r} is no number; every "
            "row needs one (dataset.min_rating)"
        )
    return numbers.to_numpy()


def _dates(text: pl.Series) -> pl.Series:
    """ISO dates, with or without a time of day; null what is none."""
    for form in ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M"):
        dates = text.str.strip_suffix("Z").str.to_datetime(form, strict=False, time_unit="us")
        if dates.null_count() <= dates.len() / 2:
            return dates
    return text.str.to_date("%Y-%m-%d", strict=False)


def _instant(value: float | str, option: str, is_date: bool) -> float:
    """``value`` as the column of times has it."""
    if is_date:
        date = _dates(pl.Series([str(value)])).cast(pl.Datetime("us")).cast(pl.Int64)[0]
        if date is None:
            raise UserError(
                f"dataset.{option}={value}: the times are dates; give one as YYYY-MM-DD hh:mm:ss"
            )
        return int(date)
    try:
        return float(value)
    except ValueError:
        raise UserError(f"dataset.{option}={value}: the times are numbers; give one") from None
