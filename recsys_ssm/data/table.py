"""A user's own table: interactions, and features of users and items where there are any.

    data = TableData(interactions="ratings.csv", items="films.csv", item_categorical=["genre"])

What training may see is settled first (the split); scaling, vocabularies and sampled negatives are
then learnt from that alone.

Legend: R rows of the interactions file, users and items counted in the order of their sorted ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import torch

from recsys_ssm.batches import Ragged
from recsys_ssm.data.files import read_table
from recsys_ssm.data.two_tower import (
    Pairs,
    Ranking,
    TwoTowerData,
    TwoTowerSplits,
    sample_negatives,
    split_users,
)
from recsys_ssm.errors import UserError
from recsys_ssm.features import FeatureSchema, numeric_column, text_column

Table = str | Path | pl.DataFrame | Any
"""A CSV or Parquet file, or a data frame (polars, pandas, anything polars makes a frame of)."""

MAX_DEFAULT_USERS = 1000
"""Users ranked for in validation and in the test unless the options say another number."""


class TableData(TwoTowerData):
    """Pairs and rankings from files (or data frames) of one's own; every option is also a config key.

    The catalogue is every item of the items file and of the interactions. Ids are text. A (user,
    item) pair that stands there several times counts once, with its last row.

    Args:
        interactions: One row a (user, item) pair.
        users: One row a user, with ``user_key`` and the user features.
        items: One row an item, with ``item_key`` and the item features.
        user_key, item_key: What the id columns are called, in every file.
        target: Column to learn, numeric. None: each row is a positive with target 1.
        negatives: Items the user did not interact with, drawn for each relevant row, with target 0.
            None: 1 without a target column, 0 with one.
        relevant_above: A row is relevant (for ranking) if its target is above this; without a
            target column every row is.
        user_numeric, user_categorical: Feature columns of the users file.
        item_numeric, item_categorical: Feature columns of the items file.
        item_id_feature: The item's id is a feature itself.
        user_id_feature: The user's id is. None: only if there are no user features.
        on_unknown: What to do with interactions of users or items that are not in their file: keep
            them with missing features (and count them), or make it an error.
        separator: Between the cells of a CSV.
        split: ``users``: whole users are held out, none of their rows is trained on (needs user
            features); ``interactions``: a share of some users' rows is held out, and what the user
            was seen with in training is not ranked. ``auto``: the first if there are user features.
        held_out: Share of a user's rows that ``split="interactions"`` holds out.
        time: Column to order a user's rows by (numbers or ISO dates): the last are held out, of
            equal times those that come last in the file. None: random ones are.
        n_test_users, n_val_users: Users to rank for. None: a tenth of those who qualify, at most
            :data:`MAX_DEFAULT_USERS`.
        n_val_pairs: At most so many validation pairs for the loss. None: all there are.
        min_relevant: A user qualifies with at least so many relevant held-out items.
        name, base: See :class:`~recsys_ssm.data.base.TwoTowerData`.

    Raises:
        UserError: An option is not possible. Files are read, and their mistakes found, at the first
            use of ``splits``.
    """

    def __init__(
        self,
        *,
        interactions: Table | None = None,
        users: Table | None = None,
        items: Table | None = None,
        user_key: str = "user_id",
        item_key: str = "item_id",
        target: str | None = None,
        negatives: int | None = None,
        relevant_above: float = 0.0,
        user_numeric: Sequence[str] = (),
        user_categorical: Sequence[str] = (),
        item_numeric: Sequence[str] = (),
        item_categorical: Sequence[str] = (),
        item_id_feature: bool = True,
        user_id_feature: bool | None = None,
        on_unknown: Literal["keep", "error"] = "keep",
        separator: str = ",",
        split: Literal["auto", "users", "interactions"] = "auto",
        held_out: float = 0.2,
        time: str | None = None,
        n_test_users: int | None = None,
        n_val_users: int | None = None,
        n_val_pairs: int | None = 10_000,
        min_relevant: int = 1,
        name: str = "table",
        **base: Any,
    ) -> None:
        super().__init__(name=name, **base)
        if interactions is None:
            raise UserError(
                "dataset.interactions: not set; name the file with a (user, item) a row"
            )
        for option, least, value in (
            ("negatives", 0, negatives),
            ("n_test_users", 1, n_test_users),
            ("n_val_users", 1, n_val_users),
            ("n_val_pairs", 1, n_val_pairs),
            ("min_relevant", 1, min_relevant),
        ):
            if value is not None and value < least:
                raise UserError(f"dataset.{option}={value}: give at least {least}")
        for option, known, word in (
            ("split", ("auto", "users", "interactions"), split),
            ("on_unknown", ("keep", "error"), on_unknown),
        ):
            if word not in known:
                raise UserError(f"dataset.{option}={word}: expected one of {', '.join(known)}")
        if not 0 < held_out < 1:
            raise UserError(f"dataset.held_out={held_out}: give a share between 0 and 1")

        self.interactions, self.target, self.time = interactions, target, time
        self.negatives = negatives if negatives is not None else int(target is None)
        self.relevant_above, self.on_unknown, self.separator = relevant_above, on_unknown, separator
        self.held_out, self.min_relevant = held_out, min_relevant
        self.n_test_users, self.n_val_users = n_test_users, n_val_users
        self.n_val_pairs = n_val_pairs

        has_user_features = bool(user_numeric or user_categorical)
        if user_id_feature is None:
            user_id_feature = not has_user_features
        self.user_side = _Side(
            "user", users, user_key, user_numeric, user_categorical, user_id_feature
        )
        self.item_side = _Side(
            "item", items, item_key, item_numeric, item_categorical, item_id_feature
        )
        if split == "users" and not has_user_features:
            raise UserError(
                "dataset.split=users: held-out users need features to be told apart by; "
                "give user_numeric or user_categorical, or take split=interactions"
            )
        self.whole_users = split == "users" or (split == "auto" and has_user_features)
        self._why = "users have features" if has_user_features else "users have no features"
        self._why = f" (split=auto: {self._why})" if split == "auto" else ""

    def build(self) -> TwoTowerSplits:
        notes: list[str] = []
        generator = np.random.default_rng(self.seed)
        rows, user_table, item_table = self._read(notes)
        n_users, n_items = user_table.height, item_table.height

        split = self._hold_out(rows, n_users, generator)
        notes.append(self._describe(rows, split))
        train_rows = rows.at(~split.held)

        # What training knows of the catalogue: the items file, and what its own rows name. An item
        # only held-out rows name is ranked like any other but never drawn as a negative.
        known = item_table["in_file"].to_numpy().copy()
        known[train_rows.item] = True
        train, without_room = self._draw_pairs(train_rows, train_rows, known, n_users, generator)
        if without_room:
            notes.append(f"{without_room:,} users have every item: no negatives for them")
        if train.target.numel() and bool((train.target == train.target[0]).all()):
            notes.append(
                f"every target is {train.target[0].item():g}: a loss on targets (mse, bce) has "
                "nothing to tell apart; set negatives, or a target column, or head.loss=softmax"
            )
        val_user = np.zeros(n_users, dtype=bool)
        val_user[split.val] = True
        of_val_users = rows.at(val_user[rows.user])
        val_rows = rows.at(val_user[rows.user] & split.held)
        val, _ = self._draw_pairs(val_rows, of_val_users, known, n_users, generator)
        if self.n_val_pairs is not None and val.user.numel() > self.n_val_pairs:
            some = torch.from_numpy(generator.permutation(val.user.numel())[: self.n_val_pairs])
            val = Pairs(*(array[some] for array in val))

        user_schema = self.user_side.fit(user_table, train.user)
        item_schema = self.item_side.fit(item_table, train.item)
        counts = np.bincount(train_rows.item[train_rows.relevant], minlength=n_items)
        popularity = torch.from_numpy(counts).float()
        return TwoTowerSplits(
            users=user_schema.encode(user_table),
            items=item_schema.encode(item_table),
            item_ids=item_table[self.item_side.key].to_list(),
            user_schema=user_schema,
            item_schema=item_schema,
            train=train,
            val=val,
            val_ranking=self._ranking_of(rows, split, split.val),
            test_ranking=self._ranking_of(rows, split, split.test),
            baselines={"popularity": lambda user: popularity.expand(user.numel(), -1)},
            notes=notes,
        )

    def _read(self, notes: list[str]) -> tuple[_Rows, pl.DataFrame, pl.DataFrame]:
        """The distinct interactions, by row number of the two tables, and those tables."""
        user_key, item_key = self.user_side.key, self.item_side.key
        columns = [user_key, item_key, *filter(None, (self.target, self.time))]
        frame, where = _open(
            self.interactions, "interactions", list(dict.fromkeys(columns)), self.separator
        )
        users, items = _keys(frame, user_key, where), _keys(frame, item_key, where)
        target = np.ones(frame.height)
        if self.target is not None:
            target = numeric_column(frame, self.target, where)
            _refuse(np.isnan(target), where, self.target, "the target is missing")
        when = np.zeros(frame.height, dtype=np.int64)
        if self.time is not None:
            when = _order_of_times(frame, self.time, where)

        user_table = self.user_side.table(users, self.separator, self.on_unknown, notes)
        item_table = self.item_side.table(items, self.separator, self.on_unknown, notes)
        user = _positions(users, user_table[user_key])
        item = _positions(items, item_table[item_key])

        # Of equal pairs the last in time stays, of equal times the last in the file.
        latest_first = np.argsort(when, kind="stable")[::-1]
        pair = user * item_table.height + item
        _, first = np.unique(pair[latest_first], return_index=True)
        kept = np.sort(latest_first[first])
        relevant = np.ones(frame.height, dtype=bool)
        if self.target is not None:
            relevant = target > self.relevant_above
        rows = _Rows(user, item, target.astype(np.float32), relevant, when).at(kept)

        repeated = frame.height - kept.size
        notes.insert(
            0,
            f"{where}: {frame.height:,} rows, {np.unique(user).size:,} users, "
            f"{np.unique(item).size:,} items"
            + (
                f"; {repeated:,} rows repeat a (user, item) pair, the last counts"
                if repeated
                else ""
            ),
        )
        if self.target is not None:
            notes.append(
                f"relevant: {self.target} > {self.relevant_above:g} "
                f"({rows.relevant.mean():.1%} of the pairs; set by relevant_above)"
            )
        return rows, user_table, item_table

    def _hold_out(self, rows: _Rows, n_users: int, generator: np.random.Generator) -> _Split:
        if self.whole_users:
            may_go = np.ones(rows.user.size, dtype=bool)
        else:
            # Place of each row within its user's, counted from the last; one row at least stays.
            size = np.bincount(rows.user, minlength=n_users)
            by = rows.when if self.time is not None else generator.random(rows.user.size)
            order = np.lexsort((by, rows.user))
            place = np.empty_like(order)
            place[order] = size.cumsum()[rows.user[order]] - 1 - np.arange(order.size)
            n_held = np.minimum(np.maximum(1, np.rint(self.held_out * size)), size - 1)
            may_go = place < n_held[rows.user]
        n_relevant = np.bincount(rows.user[may_go & rows.relevant], minlength=n_users)
        candidates = np.flatnonzero(n_relevant >= self.min_relevant)
        test, val = split_users(candidates, self._group_sizes(candidates.size), generator)
        chosen = np.zeros(n_users, dtype=bool)
        chosen[test] = chosen[val] = True
        return _Split(chosen[rows.user] & may_go, test, val)

    def _group_sizes(self, n: int) -> tuple[int, int]:
        """How many of ``n`` users who qualify are tested and validated on."""
        default = min(max(1, n // 10), MAX_DEFAULT_USERS)
        n_test = default if self.n_test_users is None else self.n_test_users
        n_val = default if self.n_val_users is None else self.n_val_users
        if n_test + n_val > n:
            raise UserError(
                f"no test user is left: {n} users have at least min_relevant={self.min_relevant} "
                f"relevant items to hold out, but n_test_users={n_test} and n_val_users={n_val} are "
                "needed; lower these, or give more data"
            )
        return n_test, n_val

    def _draw_pairs(
        self,
        rows: _Rows,
        excluded: _Rows,
        known: np.ndarray,
        n_users: int,
        generator: np.random.Generator,
    ) -> tuple[Pairs, int]:
        """``rows`` and their negatives: known items that are not among the user's ``excluded``.

        Returns:
            The pairs, and the number of users for whom no item is left to draw.
        """
        user, item, target = rows.user, rows.item, rows.target
        full = np.zeros(0, dtype=np.int64)
        if self.negatives:
            # Draw by number among the known items only.
            number = np.cumsum(known) - 1
            inside = known[excluded.item]
            positives = Ragged.from_pairs(
                torch.from_numpy(excluded.user[inside]),
                torch.from_numpy(number[excluded.item[inside]]),
                n_users,
            )
            n_known = int(known.sum())
            has_room = positives.lengths.numpy() < n_known
            of = rows.user[rows.relevant]
            full = np.unique(of[~has_room[of]])
            of = np.repeat(of[has_room[of]], self.negatives)
            drawn = sample_negatives(positives, of, n_known, generator)
            user = np.concatenate([user, of])
            item = np.concatenate([item, np.flatnonzero(known)[drawn]])
            target = np.concatenate([target, np.zeros(of.size, dtype=np.float32)])
        return Pairs(*map(torch.from_numpy, (user, item, target))), full.size

    def _ranking_of(self, rows: _Rows, split: _Split, users: np.ndarray) -> Ranking:
        """What is relevant to each of ``users`` among the held-out rows, and seen in the others."""
        place = np.full(int(rows.user.max()) + 1, -1)
        place[users] = np.arange(users.size)
        mine = place[rows.user] >= 0

        def ragged(mask: np.ndarray) -> Ragged:
            user, item = place[rows.user[mask]], rows.item[mask]
            return Ragged.from_pairs(torch.from_numpy(user), torch.from_numpy(item), users.size)

        return Ranking(
            torch.from_numpy(users),
            relevant=ragged(mine & split.held & rows.relevant),
            seen=None if self.whole_users else ragged(mine & ~split.held),
        )

    def _describe(self, rows: _Rows, split: _Split) -> str:
        how = (
            "whole users are held out, none of their rows is trained on"
            if self.whole_users
            else f"{self.held_out:.0%} of these users' rows are held out, "
            + (f"the last by {self.time}" if self.time is not None else "at random")
            + "; items seen in training are not ranked for them"
        )
        return (
            f"test on {split.test.size:,} users, validation on {split.val.size:,}: {how}{self._why}; "
            f"{int((~split.held).sum()):,} of {rows.user.size:,} pairs are trained on"
        )


class _Rows(NamedTuple):
    """Distinct interactions, R of them."""

    user: np.ndarray
    item: np.ndarray
    target: np.ndarray
    relevant: np.ndarray
    when: np.ndarray
    """(R,) int64, rank of the time; all 0 without a time column."""

    def at(self, index: np.ndarray) -> _Rows:
        return _Rows(*(array[index] for array in self))


class _Split(NamedTuple):
    held: np.ndarray
    """(R,) bool, rows that training must not see."""
    test: np.ndarray
    val: np.ndarray


@dataclass
class _Side:
    """Users or items: their file, their key and which columns are features."""

    kind: Literal["user", "item"]
    source: Table
    key: str
    numeric: Sequence[str]
    categorical: Sequence[str]
    id_feature: bool

    def __post_init__(self) -> None:
        kind = self.kind
        for option in ("numeric", "categorical"):
            names = getattr(self, option) or ()
            # One name written without the brackets of a list is that one column.
            setattr(self, option, (names,) if isinstance(names, str) else tuple(names))
        features = [*self.numeric, *self.categorical]
        if twice := [name for name in features if features.count(name) > 1]:
            raise UserError(
                f"dataset.{kind}_numeric and dataset.{kind}_categorical: column {twice[0]!r} stands "
                "there twice; a column is read either as numbers or as categories"
            )
        if self.key in features:
            raise UserError(
                f"dataset.{kind}_numeric, dataset.{kind}_categorical: {self.key!r} is the key; for "
                f"the id as a feature set {kind}_id_feature=true instead"
            )
        if features and self.source is None:
            raise UserError(
                f"dataset.{kind}s: not set, but {kind}_numeric and {kind}_categorical name columns "
                f"({', '.join(features)}); give the file that has them"
            )
        if not features and not self.id_feature:
            raise UserError(
                f"{'an' if kind == 'item' else 'a'} {kind} has no feature: name columns in dataset.{kind}_numeric or "
                f"dataset.{kind}_categorical, or set {kind}_id_feature=true"
            )

    def table(
        self, seen: pl.Series, separator: str, on_unknown: str, notes: list[str]
    ) -> pl.DataFrame:
        """Key, features and ``in_file``; one row an id, sorted: for the users those of ``seen``.

        Args:
            seen: Ids of the interactions, (R,) text.
        """
        kind = self.kind
        ids = seen.unique()
        if self.source is None:
            return pl.DataFrame({self.key: ids.sort()}).with_columns(in_file=pl.lit(value=False))
        columns = [self.key, *self.numeric, *self.categorical]
        frame, where = _open(self.source, f"{kind}s", columns, separator)
        keys = _keys(frame, self.key, where)
        if (again := ~keys.is_first_distinct()).any():
            row = int(again.to_numpy().argmax())
            raise UserError(
                f"{where}, row {row + 1}: {self.key} {keys[row]!r} stands there already, in row "
                f"{int((keys == keys[row]).to_numpy().argmax()) + 1}; each {kind} needs one row"
            )
        # Cells are checked here, where their row number is the file's.
        frame = pl.DataFrame(
            {
                self.key: keys,
                **{name: numeric_column(frame, name, where) for name in self.numeric},
                **{name: text_column(frame, name, where) for name in self.categorical},
            }
        ).with_columns(pl.col(self.numeric).fill_nan(None), in_file=pl.lit(value=True))

        unknown = ids.filter(~ids.is_in(keys.implode())).sort()
        if unknown.len() == ids.len():
            raise UserError(
                f"{where}: none of the {ids.len():,} {kind}s of the interactions is in it, for "
                f"example {unknown[0]!r}; its first is {keys[0]!r}: are ids written alike in both?"
            )
        if unknown.len() and on_unknown == "error":
            raise UserError(
                f"{where}: no {kind} {unknown[0]!r}, which the interactions name (and "
                f"{unknown.len() - 1:,} more); add them, or set on_unknown=keep"
            )
        if unknown.len():
            rows = int(seen.is_in(unknown.implode()).sum())
            notes.append(
                f"{where}: {unknown.len():,} {kind}s of the interactions ({rows:,} rows) are not in "
                f"it, for example {unknown[0]!r}: kept, their features missing"
            )
        idle = frame.height - (ids.len() - unknown.len())
        if kind == "item":
            if idle:
                notes.append(
                    f"{where}: {idle:,} items without an interaction: ranked like the others"
                )
            ids = pl.concat([keys, unknown])
        elif idle:
            notes.append(f"{where}: {idle:,} users without an interaction: left out")
        ids_frame = pl.DataFrame({self.key: ids.sort()})
        joined = ids_frame.join(frame, on=self.key, how="left", maintain_order="left")
        return joined.with_columns(pl.col("in_file").fill_null(value=False))

    def fit(self, table: pl.DataFrame, trained: torch.Tensor) -> FeatureSchema:
        """The schema, learnt from the rows ``trained`` on (row numbers, repeated ones count once)."""
        categorical = [*([self.key] if self.id_feature else []), *self.categorical]
        return FeatureSchema.fit(
            table[trained.unique().numpy()], numeric=self.numeric, categorical=categorical
        )


def _open(
    source: Table, option: str, columns: Sequence[str], separator: str
) -> tuple[pl.DataFrame, str]:
    """The named columns of a file or data frame, and what to call it in messages."""
    if isinstance(source, str | Path):
        return read_table(source, columns=columns, separator=separator), str(source)
    if isinstance(source, pl.LazyFrame):
        source = source.collect()
    if not isinstance(source, pl.DataFrame):
        try:
            source = _to_polars(source)
        except (TypeError, ValueError, AttributeError, pl.exceptions.PolarsError) as error:
            raise UserError(
                f"{option}: neither a file's path nor a data frame but {type(source).__name__} "
                f"({error})"
            ) from error
    if absent := [name for name in columns if name not in source.columns]:
        raise UserError(
            f"{option}: no column {absent[0]!r}; its columns are {', '.join(source.columns[:30])}"
        )
    if source.height == 0:
        raise UserError(f"{option}: the data frame has no row")
    return source.select(columns), option


def _to_polars(source: Any) -> pl.DataFrame:
    try:
        return pl.DataFrame(dict(source) if isinstance(source, Mapping) else source)
    except ImportError:  # pandas without pyarrow, which polars takes its columns through
        plain = source.astype(object).where(source.notna(), None)
        cells = {str(name): plain[name].tolist() for name in plain.columns}
        return pl.DataFrame(cells, strict=False)


def _keys(frame: pl.DataFrame, key: str, where: str) -> pl.Series:
    """Column ``key`` as text, all there."""
    keys = text_column(frame, key, where)
    _refuse(
        keys.is_null().to_numpy(), where, key, "empty (or a blank line); every row needs its id"
    )
    return keys


def _refuse(wrong: np.ndarray, where: str, column: str, what: str) -> None:
    if wrong.any():
        raise UserError(f"{where}, row {int(wrong.argmax()) + 1}, column {column!r}: {what}")


def _positions(keys: pl.Series, ids: pl.Series) -> np.ndarray:
    """Where each of ``keys`` stands among ``ids``, (R,) int64."""
    return keys.cast(pl.Enum(ids)).to_physical().cast(pl.Int64).to_numpy()


def _order_of_times(frame: pl.DataFrame, column: str, where: str) -> np.ndarray:
    """Rank of each row's time, (R,) int64: equal times rank the same.

    Raises:
        UserError: A cell is empty, or neither a number nor a date.
    """
    times = frame[column]
    if times.dtype == pl.String:
        numbers = times.cast(pl.Float64, strict=False)
        if numbers.null_count() < times.len() / 2:
            times = numbers
        else:
            # ISO dates and times sort as text.
            times = times.set(~times.str.contains(r"^\d{4}-\d\d-\d\d").fill_null(value=False), None)
    if not (times.dtype.is_numeric() or times.dtype.is_temporal() or times.dtype == pl.String):
        raise UserError(f"{where}: column {column!r} holds {times.dtype}, no times")
    if times.dtype.is_float():
        times = times.fill_nan(None)
    _refuse(
        times.is_null().to_numpy(),
        where,
        column,
        f"{frame[column].filter(times.is_null()).head(1).to_list()[:1]} is no time; "
        "give numbers, or dates as YYYY-MM-DD hh:mm:ss, in every row",
    )
    return times.rank("dense").cast(pl.Int64).to_numpy()
