"""Load interactions for next-item recommendation from a file in any of several formats, or from a data frame.

    data = Interactions(interactions="ratings.csv", user="user_id", item="item_id")

Every next-item dataset is a config of this one class. It reads the rows (:mod:`recsys_ssm.data.formats`), drops those
rated below ``min_rating``, orders each user's by time (rows of equal time stay in the order of the file), drops
repeated ones as ``duplicates`` says, repeatedly drops users and items with too few events (``k_core``), and splits the
rest. The result is kept (:mod:`recsys_ssm.data.cache`) and memory-mapped.

Legend: R rows of the table, E events that are kept, U users and I items, in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl

from recsys_ssm.data.cache import Prepared, cache_folder, hash_frame, hash_path, load_or_make
from recsys_ssm.data.columns import (
    MISSING_IDS,
    FeatureTable,
    Table,
    Times,
    at_rows,
    coded_keys,
    exploded,
    instant,
    is_frame,
    numbers,
    one_or_more,
    open_table,
    positions,
    times,
)
from recsys_ssm.data.download import fetch_member
from recsys_ssm.data.files import Compact, shown
from recsys_ssm.data.formats import (
    Format,
    check_format,
    format_of,
    is_folder_of_parts,
    is_sequences,
    scan_sequences,
)
from recsys_ssm.data.row_filter import RowFilter
from recsys_ssm.data.sequences import (
    COMMON_REPEATS,
    EventContext,
    HeldOut,
    Histories,
    SequenceData,
    SequenceSplits,
    count_repeats,
)
from recsys_ssm.data.titles import TitleTable
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema, as_frame

Duplicates = Literal["identical", "first", "last", "keep"]
Split = Literal["leave_one_out", "time"]

MIN_EVENTS = 3
"""Events that a user needs for ``leave_one_out``: one each to train on, to validate and to test."""


class Interactions(SequenceData):
    """Histories from one table of interactions; every argument is also a config option.

    Args:
        interactions: The file (or a folder of Parquet parts), several files of which the first that exists is read, or
            a data frame. Paths are relative to ``root``. Formats: :mod:`recsys_ssm.data.formats`.
        root: Folder of the files; None: the current folder.
        format: One of ``csv, parquet, json, recbole, movielens, sequences``; None: by the file's name. A ``*.txt`` with
            named columns is a table.
        user, item: Id columns. Ids are text of any length. A column of lists has a row for each element.
        timestamp: Column to order a user's events by (numbers, dates, or ISO text), or several of them, the most
            significant first: a date and a time of day are joined. None: rows are in the order of time already.
        rating: Column of ratings, used by ``min_rating``.
        min_rating: Drop rows rated below this; None: keep all.
        filter: Rows to read, as ``event_type == "purchase" and price > 3``; None: all. Comparisons of a column with
            values (``== != < <= > >= in``, ``is null``), ``and``, ``or``, ``not``.
        missing: Texts that stand for a missing id. A row with one is an error, as an empty id is.
        names: Names of the columns of a file without a header line.
        separator: Separator between the cells of a line; None: the format's own.
        duplicates: Which rows count once. ``identical``: rows of the same user, item and timestamp; ``first`` or
            ``last``: all rows of a user and an item, at the first or the last time; ``keep``: none.
        k_core: Repeatedly drop users and items with fewer events than this; 0: keep all.
        times: Give models the times of the events. Numbers are seconds.
        event_columns: Columns of the interactions to give to models as categories of an event, as ``event_type``. A
            value that only occurs after the training events has no code of its own.
        split: ``leave_one_out``: a user's last event is for the test, the one before it for validation, the rest for
            training. ``time``: two instants, the same for all users, separate training from validation and validation
            from the test; a user's first event of a period is predicted.
        val_share, test_share: Shares of the events, the latest, for ``split="time"``.
        val_from, test_from: The two instants, in place of the shares, as the column of times has them.
        since: Train on events from this instant on, as the column of times has it; earlier events are read as history
            alone. A model that begins from a run (``init_from=<run>``) goes on with new events so. None: all events.
        items: File of item features (CSV, Parquet, ``.item``, ``movies.dat``) relative to ``root``, or a data frame.
            Items without an event are not in the catalogue.
        items_id: Id column of ``items``; None: the same name as ``item``.
        item_numeric, item_categorical: Feature columns of ``items``.
        item_names: Names of the columns of ``items`` if that file has no header line.
        items_separator: Separator between the cells of ``items``; None: the format's own.
        item_title: Column of titles, which language models read; None: items have none. Without ``titles`` it is a
            column of ``items``. Titles are read when a model asks for them.
        titles: File of titles, several files of which the first that exists is read, or a data frame; None: ``items``.
            Paths are relative to ``root``.
        title_names: Names of the columns of ``titles`` if that file has no header line.
        cache_dir: Folder to keep prepared data in; None: ``$RECSYS_SSM_CACHE`` or the user's cache folder.
        download: ``{url, md5, member}`` of a public archive to fetch the file from if none exists, with ``titles``, the
            member that has the titles, if there is one; None: never fetch.
        source: Where people can get the file, for the message that it does not exist.
        name, base: See :class:`~recsys_ssm.data.sequences.SequenceData`.

    Raises:
        UserError: An option is not possible. Files are read at the first use of ``splits``.
    """

    def __init__(
        self,
        *,
        interactions: Table | Sequence[str] | None = None,
        root: str | Path | None = None,
        format: Format | None = None,  # noqa: A002 (the usual name)
        user: str = "user_id",
        item: str = "item_id",
        timestamp: str | Sequence[str] | None = "timestamp",
        rating: str | None = None,
        min_rating: float | None = None,
        filter: str | None = None,  # noqa: A002 (the usual name)
        missing: Sequence[str] = MISSING_IDS,
        names: Sequence[str] = (),
        separator: str | None = None,
        duplicates: Duplicates = "identical",
        k_core: int = 0,
        times: bool = False,
        event_columns: Sequence[str] = (),
        split: Split = "leave_one_out",
        val_share: float = 0.1,
        test_share: float = 0.1,
        val_from: float | str | None = None,
        test_from: float | str | None = None,
        since: float | str | None = None,
        items: Table | None = None,
        items_id: str | None = None,
        item_numeric: Sequence[str] = (),
        item_categorical: Sequence[str] = (),
        item_names: Sequence[str] = (),
        items_separator: str | None = None,
        item_title: str | None = None,
        titles: Table | Sequence[str] | None = None,
        title_names: Sequence[str] = (),
        cache_dir: str | Path | None = None,
        download: Mapping[str, str] | None = None,
        source: str | None = None,
        name: str = "interactions",
        **base: Any,
    ) -> None:
        super().__init__(name=name, **base)
        if not is_frame(interactions) and not interactions:
            raise UserError("dataset.interactions: not set; name the file of interactions")
        self.preparation = Preparation(
            format=format,
            user=str(user),
            item=str(item),
            timestamp=one_or_more(timestamp) or None,
            rating=rating,
            min_rating=min_rating,
            filter=filter,
            missing=one_or_more(missing),
            names=one_or_more(names),
            separator=separator,
            duplicates=duplicates,
            k_core=k_core,
            times=times,
            event_columns=one_or_more(event_columns),
            split=split,
            val_share=val_share,
            test_share=test_share,
            val_from=val_from,
            test_from=test_from,
            since=since,
        )
        if since is not None and self.objective == "masked":
            raise UserError(
                f"dataset.since={since}: with dataset.objective=masked items of the whole history are hidden; give "
                "dataset.since=null, or another objective"
            )
        if download is not None and set(download) - {"titles"} != {"url", "md5", "member"}:
            raise UserError(
                f"dataset.download: expected url, md5 and member, got {', '.join(download) or 'none'}"
            )
        self.root = Path(root or "").expanduser()
        self.frame: Table | None = None
        self.paths: list[Path] = []
        if is_frame(interactions):
            self.frame = interactions
        else:
            paths: Any = [interactions] if isinstance(interactions, str | Path) else interactions
            self.paths = [self.root / Path(path).expanduser() for path in paths]
        if isinstance(items, str | Path):
            items = self.root / Path(items).expanduser()
        self.items = FeatureTable(
            "item",
            items,
            str(items_id or item),
            one_or_more(item_numeric),
            one_or_more(item_categorical),
            names=one_or_more(item_names),
            separator=items_separator,
            names_option="dataset.item_names",
            separator_option="dataset.items_separator",
            key_option="dataset.items_id",
        )
        if items is not None and not self.items.features and item_title is None:
            raise UserError(
                "dataset.items: none of its columns is used; name its feature columns with "
                "dataset.item_numeric and dataset.item_categorical, or its titles with dataset.item_title"
            )
        self.title_table = self._title_table(items, titles, item_title, one_or_more(title_names))
        self.cache = cache_folder(cache_dir)
        self.download, self.source = download, source
        self._titles: list[str] | None = None

    def build(self) -> SequenceSplits:
        source = self._find() if self.frame is None else as_frame(self.frame, "interactions")
        prepared = load_or_make(
            self.cache / "interactions",
            self.name,
            lambda: self._hash(source),
            asdict(self.preparation),
            lambda: self.preparation.prepare(source),
        )
        where = str(source) if isinstance(source, Path) else "interactions"
        try:
            splits = _splits(prepared, self.preparation.event_columns)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        splits.sources.update(self._hash(source))
        _describe(splits)
        if splits.train_start is not None:
            splits.notes.append(_describe_since(splits, self.preparation.since))
        if self.items.features:
            splits.item_schema, splits.items = self._item_features(splits)
        return splits

    def _find(self) -> Path:
        """Return the first file that exists; fetch it if that is possible and needed."""
        for path in self.paths:
            if is_folder_of_parts(path):
                return path
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
            return self._fetch(self.download["member"])
        except UserError as error:
            raise UserError(f"{absent}; {error}") from error

    def _fetch(self, member: str) -> Path:
        """Fetch a member of the public archive."""
        assert self.download is not None
        archive = {"url": self.download["url"], "md5": self.download["md5"]}
        return fetch_member(**archive, member=member, folder=self.cache / "downloads")

    def _title_table(
        self,
        items: Table | None,
        titles: Table | Sequence[str] | None,
        column: str | None,
        names: tuple[str, ...],
    ) -> TitleTable:
        """Return where titles are: in ``titles``, or else in a column of ``items``."""
        if titles is None:
            table = self.items
            return TitleTable(
                items, table.key, column, table.names, table.separator, "dataset.item_names"
            )
        if not is_frame(titles):
            paths: Any = [titles] if isinstance(titles, str | Path) else titles
            titles = [self.root / Path(path).expanduser() for path in paths]
        return TitleTable(titles, self.items.key, column, names)

    def item_titles(self) -> list[str]:
        """Return the titles of the catalogue's items, in its order; notes say which items have none.

        Raises:
            UserError: The dataset names no titles, or their file is absent or wrong.
        """
        if self._titles is None:
            member = None if self.download is None else self.download.get("titles")
            source = self.title_table.find(
                lambda: None if member is None else self._fetch(member), self.source
            )
            splits = self.splits
            self._titles = self.title_table.read(
                source, splits.item_ids, splits.notes, splits.sources, self.cache
            )
        return self._titles

    def _hash(self, source: Path | pl.DataFrame) -> dict[str, str]:
        """Return the sha256 of the interactions by their name."""
        if isinstance(source, Path):
            return {str(source): hash_path(source, self.cache)}
        return {"interactions": hash_frame(self.preparation.select(source))}

    def read_histories(self, source: Any) -> tuple[pl.Series, list[str], Histories]:
        """Read the histories of users to recommend items to, from another table with the same columns.

        Rows are ordered and filtered as for training, except that users and items with few events are kept.

        Returns:
            User ids (U,), the item ids that the events are indices of, and the histories.

        Raises:
            UserError: The table does not exist, lacks a column, or a cell is wrong.
        """
        if not is_frame(source):
            source = Path(source)
        user_ids, item_ids, histories = _ragged(self.preparation.ordered(source, notes=[]))
        return user_ids, item_ids.to_list(), histories

    def _item_features(self, splits: SequenceSplits) -> tuple[FeatureSchema, Features]:
        """Return the features of the catalogue's items, scaled by the items with training events."""
        table = self.items
        frame, where = table.read(splits.notes)
        if isinstance(table.source, str | Path):
            splits.sources[where] = hash_path(Path(table.source), self.cache)
        else:
            splits.sources[where] = hash_frame(frame)
        ids = pl.Series(splits.item_ids)
        unknown = table.unknown(frame, ids, where)
        splits.notes += table.describe(frame, ids, unknown, where, idle="not in the catalogue")
        joined = table.join(ids, frame)
        schema = FeatureSchema.fit(
            joined.filter(pl.Series(splits.item_counts.numpy() > 0)),
            numeric=table.numeric,
            categorical=table.categorical,
            where=where,
        )
        return schema, schema.encode(joined, where=where)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Options that the prepared data depends on, and the preparation itself.

    The preparation reads nothing but its source and these fields, and all of them are in the cache's fingerprint: a new
    option that changes the prepared data must be a field here, and so is in the fingerprint. Arguments:
    :class:`Interactions`.

    Raises:
        UserError: An option is not possible.
    """

    format: Format | None
    user: str
    item: str
    timestamp: tuple[str, ...] | None
    rating: str | None
    min_rating: float | None
    filter: str | None
    missing: tuple[str, ...]
    names: tuple[str, ...]
    separator: str | None
    duplicates: Duplicates
    k_core: int
    times: bool
    event_columns: tuple[str, ...]
    split: Split
    val_share: float
    test_share: float
    val_from: float | str | None
    test_from: float | str | None
    since: float | str | None

    def __post_init__(self) -> None:
        check_format(self.format)
        for option, known in (("duplicates", get_args(Duplicates)), ("split", get_args(Split))):
            if (word := getattr(self, option)) not in known:
                raise UserError(f"dataset.{option}={word}: expected one of {', '.join(known)}")
        if self.k_core < 0:
            raise UserError(f"dataset.k_core={self.k_core}: give 0 (to keep all) or more")
        if self.user == self.item:
            raise UserError(f"dataset.user, dataset.item: both are {self.user!r}; name two columns")
        if self.min_rating is not None and self.rating is None:
            raise UserError(
                f"dataset.min_rating={self.min_rating}: name the column of ratings with "
                "dataset.rating"
            )
        if self.filter is not None:
            RowFilter(self.filter)
        for option in ("val_share", "test_share"):
            if not 0 < (share := getattr(self, option)) < 1:
                raise UserError(f"dataset.{option}={share}: give a share between 0 and 1")
        if self.val_share + self.test_share >= 1:
            raise UserError(
                f"dataset.val_share={self.val_share}, dataset.test_share={self.test_share}: leave "
                "some events to train on"
            )
        if (self.val_from is None) != (self.test_from is None):
            raise UserError(
                "dataset.val_from, dataset.test_from: give both instants, or neither of them"
            )
        if self.times and self.timestamp is None:
            raise UserError("dataset.times=true: name the column of times with dataset.timestamp")
        if self.split == "time" and self.timestamp is None:
            raise UserError("dataset.split=time: name the column of times with dataset.timestamp")
        if self.split != "time" and self.val_from is not None:
            raise UserError("dataset.val_from: needs dataset.split=time; set that, or leave it out")
        if self.since is not None and self.timestamp is None:
            raise UserError("dataset.since: name the column of times with dataset.timestamp")

    def prepare(self, source: Path | pl.DataFrame) -> Prepared:
        """Read the histories and split them."""
        notes: list[str] = []
        rows = _core(self.ordered(source, notes), self.k_core, notes)
        user_ids, item_ids, (events, offsets) = _ragged(rows)
        arrays: dict[str, np.ndarray] = {}
        if self.split == "leave_one_out":
            train_stop, val, test = _leave_one_out(offsets, notes)
        else:
            assert rows.time is not None
            instants = self._instants(rows.time)
            train_stop, val, test = _by_instants(offsets, rows.time.values, instants, notes)
        if again := count_repeats(Histories(events, offsets), test):
            notes.append(f"{again:,} users are tested on an item they had before")
        if self.times:
            arrays["times"] = _seconds(
                rows, str(source) if isinstance(source, Path) else "interactions"
            )
        texts: dict[str, pl.Series] = {}
        if self.event_columns:
            trained = np.arange(events.size) < np.repeat(train_stop, np.diff(offsets))
            codes, texts = _codes(rows, self.event_columns, trained)
            arrays["event_codes"] = codes
        since = {} if self.since is None else {"train_start": self._since(rows, offsets)}
        return Prepared(
            arrays={
                **arrays,
                **since,
                "events": events,
                "offsets": offsets,
                "train_stop": train_stop,
                "val_user": val.user,
                "val_event": val.event,
                "test_user": test.user,
                "test_event": test.event,
            },
            texts={"user_ids": user_ids, "item_ids": item_ids, **texts},
            notes=notes,
        )

    def ordered(self, source: Table, notes: list[str]) -> _Rows:
        """Read the rows of a table by user and time, without low ratings and repeated rows."""
        kind = (self.format or format_of(source)) if isinstance(source, Path) else None
        if (
            kind == "sequences"
            and isinstance(source, Path)
            and (self.format or self._is_sequences(source, notes))
        ):
            rows = self._sequences(source, notes)
        else:
            rows = self._table(source, notes)
        return _without_repeats(_by_user_and_time(rows, notes), self.duplicates, notes)

    def _is_sequences(self, path: Path, notes: list[str]) -> bool:
        """Return True for a ``*.txt`` whose lines are sequences, with a note where options are not used for it.

        Raises:
            UserError: Columns are named that the file does not seem to have.
        """
        if not path.is_file() or path.stat().st_size == 0:
            return True
        if not is_sequences(path, self.columns, self.names, self.separator):
            return False
        named = [
            f"dataset.{option}={value}"
            for option, value, default in (
                ("user", self.user, "user_id"),
                ("item", self.item, "item_id"),
                ("timestamp", ",".join(self.timestamp or ("timestamp",)), "timestamp"),
            )
            if value != default
        ]
        if named and not self.names:
            raise UserError(
                f"{path}: {named[0]}: the file has no such header line; name every column with dataset.names, or set "
                "dataset.format=sequences for lines like: user item item …"
            )
        if self.names:
            notes.append(
                f"{path}: lines have different numbers of ids: read as sequences (user item item …), and the named "
                "columns are not used"
            )
        return True

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once."""
        names = [self.user, self.item, *(self.timestamp or ())]
        names += [] if self.rating is None else [self.rating]
        names += self.event_columns
        names += [] if self.filter is None else RowFilter(self.filter).columns
        return list(dict.fromkeys(names))

    @property
    def _compact(self) -> Compact:
        """The columns to hold in little memory; those that the filter compares keep their kinds."""
        compared = () if self.filter is None else RowFilter(self.filter).columns
        values = [name for name in (*(self.timestamp or ()), self.rating) if name is not None]
        return Compact((self.user, self.item), [name for name in values if name not in compared])

    @property
    def options(self) -> dict[str, str]:
        """The option that names a column, by column."""
        named = [("user", self.user), ("item", self.item), ("rating", self.rating)]
        named += [("timestamp", name) for name in self.timestamp or ()]
        return {name: f"dataset.{option}" for option, name in named if name is not None}

    def select(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return the columns of a data frame that are read.

        Raises:
            UserError: One is absent, or there is no row.
        """
        return open_table(frame, "interactions", self.columns, options=self.options)[0]

    def _table(self, source: Table, notes: list[str]) -> _Rows:
        """Read a table with named columns, without the rows below ``min_rating``."""
        frame, where = open_table(
            source,
            "interactions",
            self.columns,
            format=self.format,
            names=self.names,
            separator=self.separator,
            names_option="dataset.names",
            options=self.options,
            notes=notes,
            compact=self._compact,
        )
        if self.filter is not None:
            frame = filtered(frame, self.filter, where, notes)
        listed = [self.user, self.item, *(self.timestamp or ()), *self.event_columns]
        frame = exploded(frame, listed, where, notes)
        (user, user_ids), (item, item_ids) = (
            coded_keys(frame, name, where, missing=self.missing, notes=notes)
            for name in (self.user, self.item)
        )
        time = None if self.timestamp is None else times(frame, self.timestamp, where)
        if time is not None and time.note:
            notes.append(time.note)
        columns = frame.select(pl.col(list(self.event_columns)).cast(pl.String))
        rows = _Rows(user, item, time, user_ids, item_ids, columns)
        notes.append(
            f"{where}: {frame.height:,} rows, {user_ids.len():,} users, {item_ids.len():,} items"
        )
        if self.min_rating is None:
            return rows
        assert self.rating is not None
        rating = numbers(frame, self.rating, where, "dataset.min_rating")
        kept = rating >= self.min_rating
        if not kept.any():
            raise UserError(
                f"{where}: no {self.rating} is {self.min_rating:g} or more, the highest is "
                f"{rating.max():g}; lower dataset.min_rating"
            )
        if not kept.all():
            notes.append(
                f"{int((~kept).sum()):,} rows with {self.rating} below {self.min_rating:g} dropped"
            )
        return rows.at(kept)

    def _sequences(self, path: Path, notes: list[str]) -> _Rows:
        """Read the events of a sequence text."""
        if self.split == "time":
            raise UserError(
                f"{path}: a sequence text has no times; set dataset.split=leave_one_out"
            )
        if self.min_rating is not None:
            raise UserError(f"{path}: a sequence text has no ratings; set dataset.min_rating=null")
        if self.filter is not None:
            raise UserError(f"{path}: a sequence text has no columns; set dataset.filter=null")
        if self.times:
            raise UserError(f"{path}: a sequence text has no times; set dataset.times=false")
        if self.event_columns:
            raise UserError(f"{path}: a sequence text has no columns; set dataset.event_columns=[]")
        frame = scan_sequences(path, separator=self.separator)
        alone = ((frame["items"].list.len() == 0) & ~frame["blank"]).to_numpy()
        if alone.any():
            line = int(alone.argmax())
            raise UserError(
                f"{path}, line {line + 1}: one id alone ({shown(frame['user'][line])}); write a user and "
                "the user's items in a line: user item item …"
            )
        gap = frame["items"].list.contains("") | (frame["user"] == "")
        if (gaps := (gap & ~frame["blank"]).to_numpy()).any():
            raise UserError(
                f"{path}, line {int(gaps.argmax()) + 1}: an empty id between two separators; give every id, or another "
                "dataset.separator"
            )
        blank = int(frame["blank"].sum())
        frame = frame.filter(~pl.col("blank")).select("user", "items")
        if not frame.height:
            raise UserError(f"{path}: every line is blank; write lines like: user item item …")
        if blank:
            notes.append(f"{path}: {blank:,} blank lines are left out")
        if again := frame.height - frame["user"].n_unique():
            notes.append(f"{path}: {again:,} lines continue the user of an earlier line")
        frame = frame.explode("items")
        user, item = frame["user"], frame["items"]
        user_ids, item_ids = user.unique().sort(), item.unique().sort()
        notes.append(
            f"{path}: {frame.height:,} events, {user_ids.len():,} users, {item_ids.len():,} items"
        )
        return _Rows(
            positions(user, user_ids, np.int32),
            positions(item, item_ids, np.int32),
            None,
            user_ids,
            item_ids,
        )

    def _since(self, rows: _Rows, offsets: np.ndarray) -> np.ndarray:
        """Return the index of each user's first event from ``dataset.since`` on, (U,) int64.

        Raises:
            UserError: The rows have no times, or the instant is of another kind than they are.
        """
        if rows.time is None:
            raise UserError(
                f"dataset.since={self.since}: a sequence text has no times; set dataset.since=null"
            )
        assert self.since is not None
        old = rows.time.values < instant(self.since, "since", rows.time.unit)
        return offsets[:-1] + np.add.reduceat(old, offsets[:-1], dtype=np.int64)

    def _instants(self, time: Times) -> tuple[float, float]:
        """Return the instants at which validation and test begin."""
        if self.val_from is None or self.test_from is None:
            ordered = np.sort(time.values)
            shares = (1 - self.val_share - self.test_share, 1 - self.test_share)
            val_from, test_from = (ordered[int(share * ordered.size)] for share in shares)
        else:
            val_from, test_from = (
                instant(value, option, time.unit)
                for option, value in (("val_from", self.val_from), ("test_from", self.test_from))
            )
        if not val_from < test_from:
            raise UserError(
                f"dataset.split=time: validation begins at {val_from}, the test at {test_from}; "
                "let the test begin later, with val_from and test_from or with other shares"
            )
        return val_from, test_from


def filtered(frame: pl.DataFrame, expression: str, where: str, notes: list[str]) -> pl.DataFrame:
    """Return the rows that fulfil ``dataset.filter``, and add a note on the others.

    Raises:
        UserError: The filter does not fit the columns, or no row is left.
    """
    kept = RowFilter(expression).mask(frame, where)
    if not kept.any():
        raise UserError(
            f"{where}: dataset.filter={shown(expression)} leaves no row; correct the column's values in it"
        )
    left_out = frame.height - int(kept.sum())
    notes.append(
        f"{where}: {left_out:,} of {frame.height:,} rows are left out by dataset.filter={shown(expression, 100)}"
    )
    return at_rows(frame, kept) if left_out else frame


class _Rows(NamedTuple):
    """Rows of a table: first in the order of the file, then sorted by user and time."""

    user: np.ndarray
    """(R,) int32, indices into ``user_ids``."""
    item: np.ndarray
    """(R,) int32, indices into ``item_ids``."""
    time: Times | None
    user_ids: pl.Series
    item_ids: pl.Series
    columns: pl.DataFrame = pl.DataFrame()
    """R rows of text, the columns that models are given."""

    def at(self, index: np.ndarray) -> _Rows:
        time = self.time
        if time is not None:
            time = time._replace(values=time.values[index])
        columns = self.columns
        if columns.width:
            columns = columns.filter(pl.Series(index)) if index.dtype == bool else columns[index]
        return self._replace(
            user=self.user[index], item=self.item[index], time=time, columns=columns
        )


_PER_SECOND = {"number": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _seconds(rows: _Rows, where: str) -> np.ndarray:
    """Return the times of rows in whole seconds, int64.

    Raises:
        UserError: Times are compared as text or are not finite, so that they have no differences.
    """
    assert rows.time is not None
    if rows.time.unit == "text":
        raise UserError(
            f"{where}: dataset.times=true, but its times are compared as text and have no differences; give numbers or "
            "dates as YYYY-MM-DD hh:mm:ss"
        )
    values = rows.time.values
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{where}: dataset.times=true, but a time is not finite; correct the cell")
    return (values // _PER_SECOND[rows.time.unit]).astype(np.int64)


def _codes(
    rows: _Rows, columns: Sequence[str], trained: np.ndarray
) -> tuple[np.ndarray, dict[str, pl.Series]]:
    """Return the codes (R, C) of columns, and the values of each by ``column_<number>``.

    Codes begin at 1, in the order of the values; 0 stands for an empty cell and for values that no training row has.

    Args:
        rows: The rows, with their columns.
        columns: Names of the columns.
        trained: (R,) bool, training rows.
    """
    codes, texts = [], {}
    for i, name in enumerate(columns):
        cells = rows.columns[name]
        values = cells.filter(pl.Series(trained)).drop_nulls().unique().sort()
        known = pl.DataFrame({name: values, "code": np.arange(1, values.len() + 1, dtype=np.int32)})
        joined = cells.to_frame().join(known, on=name, how="left", maintain_order="left")
        codes.append(joined["code"].fill_null(0).to_numpy())
        texts[f"column_{i}"] = values
    return np.stack(codes, axis=1).astype(np.int32), texts


def _ragged(rows: _Rows) -> tuple[pl.Series, pl.Series, Histories]:
    """Return the ids of the users and items that have rows, and the users' events."""
    user, user_ids = _renumber(rows.user, rows.user_ids)
    events, item_ids = _renumber(rows.item, rows.item_ids)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64)
    return user_ids, item_ids, Histories(events, offsets)


def _splits(prepared: Prepared, event_columns: Sequence[str]) -> SequenceSplits:
    """Return an entry of the cache as dataset splits."""
    arrays, texts = prepared.arrays, prepared.texts
    return SequenceSplits(
        item_ids=texts["item_ids"].to_list(),
        user_ids=texts["user_ids"],
        histories=Histories(arrays["events"], arrays["offsets"]),
        train_stop=arrays["train_stop"],
        train_start=arrays.get("train_start"),
        val=HeldOut(arrays["val_user"], arrays["val_event"]),
        test=HeldOut(arrays["test_user"], arrays["test_event"]),
        context=EventContext(arrays.get("times"), arrays.get("event_codes")),
        event_columns={
            name: texts[f"column_{i}"].to_list() for i, name in enumerate(event_columns)
        },
        notes=list(prepared.notes),
    )


def _by_user_and_time(rows: _Rows, notes: list[str]) -> _Rows:
    """Sort rows by user, then time, then place in the file (both sorts are stable)."""
    if rows.time is None:
        return rows.at(np.argsort(rows.user, kind="stable"))
    order = np.lexsort((rows.time.values, rows.user))
    if (np.diff(order)[np.diff(rows.user[order]) == 0] < 0).any():
        notes.append("rows were not in the order of time: sorted, rows of equal time in file order")
    return rows.at(order)


def _without_repeats(rows: _Rows, duplicates: str, notes: list[str]) -> _Rows:
    """Drop rows that repeat another; rows are sorted by user and time."""
    if duplicates == "keep" or (duplicates == "identical" and rows.time is None):
        return rows
    if duplicates == "identical":
        assert rows.time is not None
        again = (np.diff(rows.user) == 0) & (np.diff(rows.time.values) == 0)
        if not again.any():
            return rows
        group = np.cumsum(np.insert(~again, 0, False))  # rows of a user and an instant
    else:
        group = rows.user.astype(np.int64)
    # One key for each group and item: nearly sorted where groups are short, which this sort is fast for. It is stable:
    # a pair's rows stay in the order of time.
    key = group * rows.item_ids.len() + rows.item
    order = np.argsort(key, kind="stable")
    same = np.diff(key[order]) == 0
    # Keep the first row of a run of equal rows, or the last.
    same = np.append(same, False) if duplicates == "last" else np.insert(same, 0, False)
    if dropped := int(same.sum()):
        what = {
            "identical": "repeat the user, item and timestamp of another row: dropped",
            "first": "repeat an item of the same user: dropped, the first is kept",
            "last": "repeat an item of the same user: dropped, the last is kept",
        }[duplicates]
        notes.append(f"{dropped:,} rows {what} (duplicates={duplicates})")
    return rows.at(np.sort(order[~same]))


def _core(rows: _Rows, k_core: int, notes: list[str]) -> _Rows:
    """Repeatedly drop users and items with fewer than ``k_core`` events."""
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
            f"dataset.k_core={k_core} leaves none of {before:,} events: after filtering, no user and "
            f"no item has at least {k_core} events; lower it"
        )
    if dropped := before - rows.user.size:
        notes.append(
            f"k_core={k_core}: {dropped:,} events of users or items with fewer events dropped, in "
            f"{rounds} rounds"
        )
    return rows


def _leave_one_out(offsets: np.ndarray, notes: list[str]) -> tuple[np.ndarray, HeldOut, HeldOut]:
    """Hold out each user's last event for the test and the one before it for validation."""
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
    """Hold out each user's first event of each period; all events before the period are its history."""
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
            f"{int((active & ~known).sum()):,} users without an earlier event are left out"
        )
        held_out.append(HeldOut(user, begin[user]))
    return val_begin, held_out[0], held_out[1]


def _describe(splits: SequenceSplits) -> None:
    """Add notes on the sizes of the splits."""
    events, offsets = splits.histories
    splits.notes.append(
        f"{events.size:,} events of {offsets.size - 1:,} users and {len(splits.item_ids):,} items; "
        f"{int(splits.item_counts.sum()):,} trained on, {splits.val.user.size:,} users validated on, "
        f"{splits.test.user.size:,} tested"
    )
    if share := splits.repeat_share:
        common = share >= COMMON_REPEATS
        splits.notes.append(
            f"{share:.1%} of the validation targets are items that their users had before: seen items are "
            + ("recommended again" if common else "left out")
            + f" unless model.filter_seen={'true' if common else 'false'}"
        )
    if untrained := int((splits.item_counts == 0).sum()):
        splits.notes.append(
            f"{untrained:,} items have no training event: they are ranked like the others"
        )


def _describe_since(splits: SequenceSplits, since: object) -> str:
    """Return a note on the events that are trained on.

    Raises:
        UserError: There are none.
    """
    assert splits.train_start is not None
    offsets = splits.histories.offsets[:-1]
    n_new = int(np.maximum(splits.train_stop - splits.train_start, 0).sum())
    n_all = int((splits.train_stop - offsets).sum())
    if not (splits.train_stop > np.maximum(splits.train_start, offsets + 1)).any():
        raise UserError(
            f"dataset.since={since}: no user has an event to train on from then on; give an earlier instant"
        )
    return f"since={since}: {n_new:,} of {n_all:,} training events are targets, earlier ones are history alone"


def _renumber(codes: np.ndarray, ids: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Renumber codes so that ids without a row are left out."""
    used = np.bincount(codes, minlength=ids.len()) > 0
    return (np.cumsum(used, dtype=np.int32) - 1)[codes], ids.filter(pl.Series(used))
