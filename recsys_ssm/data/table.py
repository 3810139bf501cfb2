"""Load a table of one's own: interactions, and features of users and items where there are any.

    data = TableData(interactions="ratings.csv", items="films.csv", item_categorical=["genre"])

The split is settled first. Scaling, vocabularies and negatives are then learnt or drawn from the training part alone.

Legend: R rows of the interactions; users and items are counted in the order of their sorted ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import torch

from recsys_ssm.batches import Ragged
from recsys_ssm.data.cache import cache_folder, hash_frame, hash_path
from recsys_ssm.data.columns import (
    MISSING_IDS,
    FeatureTable,
    Table,
    exploded,
    keys,
    numbers,
    one_or_more,
    open_table,
    positions,
    times,
)
from recsys_ssm.data.interactions import filtered
from recsys_ssm.data.row_filter import RowFilter
from recsys_ssm.data.two_tower import (
    Pairs,
    Ranking,
    TwoTowerData,
    TwoTowerSplits,
    sample_negatives,
    split_users,
)
from recsys_ssm.errors import UserError
from recsys_ssm.features import FeatureSchema, as_frame

MAX_NEGATIVES = 10**9
"""Most negatives that are drawn for a dataset: more of them would not be in memory."""

MAX_DEFAULT_USERS = 1000
"""Most users to rank for, in validation and in the test each, unless options give a number."""


class TableData(TwoTowerData):
    """Pairs and rankings from files or data frames of one's own; every argument is also a config option.

    The catalogue is every item of the items file and of the interactions. Ids are text. A (user, item) pair with
    several rows counts once, with its last row.

    Args:
        interactions: File or data frame with a row for each (user, item) pair.
        users: File or data frame with a row for each user: the id column ``user`` and the user features.
        items: File or data frame with a row for each item: the id column ``item`` and the item features.
        user, item: Id columns, with the same name in every file.
        timestamp: Column to order a user's rows by (numbers or dates): the last are held out, and of equal times those
            that are last in the file. Several columns, the most significant first: a date and a time of day are joined.
            None: random ones are.
        target: Column to learn, numeric. None: each row is a positive with target 1.
        negatives: Items without an interaction of the user to draw for each relevant row, with target 0. None: 1
            without a target column, 0 with one.
        relevant_above: A row is relevant (for ranking, and for losses of relevant pairs) if its target is above this;
            without a target column every row is.
        user_numeric, user_categorical: Feature columns of ``users``.
        item_numeric, item_categorical: Feature columns of ``items``.
        item_id_feature: Use the item's id as a feature.
        user_id_feature: Use the user's id as a feature. None: only if there are no user features.
        on_unknown: Treatment of interactions whose user or item is not in its file: ``keep`` them with missing features
            (and count them), or ``error``.
        filter: Rows of ``interactions`` to read, as ``event_type == "purchase" and price > 3``; None: all.
        missing: Texts that stand for a missing id in ``interactions``. A row with one is an error, as an empty id is.
        separator: Separator between the cells of a file; None: the format's own, a comma in a CSV.
        users_separator, items_separator: The same for ``users`` and ``items``; None: ``separator``.
        split: ``users``: hold out whole users, none of whose rows is trained on (needs user features).
            ``interactions``: hold out a share of some users' rows; items of their training rows are not ranked.
            ``auto``: the first if there are user features.
        held_out: Share of a user's rows that ``split="interactions"`` holds out.
        n_test_users, n_val_users: Users to rank for. None: a tenth of those who qualify, at most
            :data:`MAX_DEFAULT_USERS`.
        n_val_pairs: Most validation pairs for the loss. None: all.
        min_relevant: Relevant held-out items that a user needs to qualify.
        name, base: See :class:`~recsys_ssm.data.two_tower.TwoTowerData`.

    Raises:
        UserError: An option is not possible. Files are read at the first use of ``splits``.
    """

    def __init__(
        self,
        *,
        interactions: Table | None = None,
        users: Table | None = None,
        items: Table | None = None,
        user: str = "user_id",
        item: str = "item_id",
        timestamp: str | Sequence[str] | None = None,
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
        filter: str | None = None,  # noqa: A002 (the usual name)
        missing: Sequence[str] = MISSING_IDS,
        separator: str | None = None,
        users_separator: str | None = None,
        items_separator: str | None = None,
        split: Literal["auto", "users", "interactions"] = "auto",
        held_out: float = 0.2,
        n_test_users: int | None = None,
        n_val_users: int | None = None,
        n_val_pairs: int | None = 10_000,
        min_relevant: int = 1,
        name: str = "table",
        **base: Any,
    ) -> None:
        super().__init__(name=name, **base)
        if interactions is None:
            raise UserError("dataset.interactions: not set; name the file of interactions")
        for option, least, value in (
            ("negatives", 0, negatives),
            ("n_test_users", 1, n_test_users),
            ("n_val_users", 1, n_val_users),
            ("n_val_pairs", 1, n_val_pairs),
            ("min_relevant", 1, min_relevant),
        ):
            if value is not None and value < least:
                raise UserError(f"dataset.{option}={value}: give at least {least}")
            if value is not None and not float(value).is_integer():
                raise UserError(f"dataset.{option}={value}: give a whole number")
        for option, known, word in (
            ("split", ("auto", "users", "interactions"), split),
            ("on_unknown", ("keep", "error"), on_unknown),
        ):
            if word not in known:
                raise UserError(f"dataset.{option}={word}: expected one of {', '.join(known)}")
        if not 0 < held_out < 1:
            raise UserError(f"dataset.held_out={held_out}: give a share between 0 and 1")

        user, item = str(user), str(item)
        if user == item:
            raise UserError(f"dataset.user, dataset.item: both are {user!r}; name two columns")
        self.interactions, self.user, self.item = interactions, user, item
        self.timestamp, self.target = one_or_more(timestamp), target
        self.filter, self.missing = filter, one_or_more(missing)
        self.filter_columns = RowFilter(filter).columns if filter is not None else []
        self.negatives = int(negatives) if negatives is not None else int(target is None)
        self.relevant_above, self.on_unknown, self.separator = relevant_above, on_unknown, separator
        if self.negatives and relevant_above < 0:
            raise UserError(
                f"dataset.relevant_above={relevant_above:g}: drawn negatives have target 0 and would be relevant; give "
                "0 or more, or dataset.negatives=0"
            )
        self.held_out, self.min_relevant = held_out, min_relevant
        self.n_test_users, self.n_val_users = n_test_users, n_val_users
        self.n_val_pairs = n_val_pairs

        has_user_features = bool(user_numeric or user_categorical)
        if user_id_feature is None:
            user_id_feature = not has_user_features
        sides: tuple[tuple[Literal["user", "item"], Any, str, Any, Any, bool, Any], ...] = (
            (
                *("user", users, user, user_numeric, user_categorical, user_id_feature),
                users_separator,
            ),
            (
                *("item", items, item, item_numeric, item_categorical, item_id_feature),
                items_separator,
            ),
        )
        self.user_side, self.item_side = (
            _Side(
                FeatureTable(
                    kind,
                    source,
                    key,
                    one_or_more(numeric),
                    one_or_more(categorical),
                    separator=separator if own is None else own,
                    separator_option=f"dataset.{kind}s_separator",
                    instead=f", and set dataset.{kind}_id_feature=true for the id as a feature",
                ),
                id_feature,
            )
            for kind, source, key, numeric, categorical, id_feature, own in sides
        )
        if split == "users" and not has_user_features:
            raise UserError(
                "dataset.split=users: held-out users need features to differ in; give "
                "user_numeric or user_categorical, or set split=interactions"
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

        # Training knows the items of the items file and of its own rows. An item of held-out rows
        # alone is ranked like the others but never drawn as a negative.
        known = item_table["in_file"].to_numpy().copy()
        known[train_rows.item] = True
        train, without_room = self._draw_pairs(train_rows, train_rows, known, n_users, generator)
        if without_room:
            notes.append(f"{without_room:,} users have every item: they get no negatives")
        if train.target.numel() and bool((train.target == train.target[0]).all()):
            notes.append(
                f"every target is {train.target[0].item():g}: a loss on targets (mse, bce) cannot "
                "learn from them; set negatives, or a target column, or loss=in_batch_softmax"
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
        return TwoTowerSplits(
            users=user_schema.encode(user_table),
            items=item_schema.encode(item_table),
            item_ids=item_table[self.item].to_list(),
            user_schema=user_schema,
            item_schema=item_schema,
            train=train,
            val=val,
            val_ranking=self._ranking_of(rows, split, split.val),
            test_ranking=self._ranking_of(rows, split, split.test),
            item_counts=torch.from_numpy(counts),
            relevant_above=0.0 if self.target is None else self.relevant_above,
            seen=Ragged.from_pairs(
                torch.from_numpy(train_rows.user), torch.from_numpy(train_rows.item), n_users
            ),
            notes=notes,
            sources=self._hash(),
        )

    def _hash(self) -> dict[str, str]:
        """Return the sha256 of each table by its name."""
        hashes = {}
        for argument, source in (
            ("interactions", self.interactions),
            ("users", self.user_side.table.source),
            ("items", self.item_side.table.source),
        ):
            if isinstance(source, str | Path):
                hashes[str(source)] = hash_path(Path(source).expanduser(), cache_folder())
            elif source is not None:
                hashes[argument] = hash_frame(as_frame(source, argument))
        return hashes

    def _read(self, notes: list[str]) -> tuple[_Rows, pl.DataFrame, pl.DataFrame]:
        """Read the distinct interactions, as row numbers of the two tables, and those tables."""
        target_column = [] if self.target is None else [self.target]
        columns = [self.user, self.item, *target_column, *self.timestamp, *self.filter_columns]
        options = dict.fromkeys(self.timestamp, "dataset.timestamp")
        options |= {self.user: "dataset.user", self.item: "dataset.item"}
        options |= dict.fromkeys(target_column, "dataset.target")
        frame, where = open_table(
            self.interactions,
            "interactions",
            columns,
            separator=self.separator,
            options=options,
            notes=notes,
        )
        if self.filter is not None:
            frame = filtered(frame, self.filter, where, notes)
        frame = exploded(
            frame, [self.user, self.item, *target_column, *self.timestamp], where, notes
        )
        users, items = (
            keys(frame, name, where, missing=self.missing, notes=notes)
            for name in (self.user, self.item)
        )
        target = np.ones(frame.height)
        if self.target is not None:
            target = numbers(frame, self.target, where, "dataset.target")
        when = np.zeros(frame.height, dtype=np.int64)
        if self.timestamp:
            when, _, note = times(frame, self.timestamp, where)
            notes += [note] if note else []

        user_table = self.user_side.read(users, self.on_unknown, notes)
        item_table = self.item_side.read(items, self.on_unknown, notes)
        user = positions(users, user_table[self.user])
        item = positions(items, item_table[self.item])

        # Keep the last row of a pair in time, and of equal times the last in the file.
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
                f"; {repeated:,} rows repeat a (user, item) pair: the last is kept"
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
        """Choose the users to test and validate on, and the rows to hold out."""
        if self.whole_users:
            may_go = np.ones(rows.user.size, dtype=bool)
        else:
            # Count each user's rows from the last; at least one row of a user is trained on.
            size = np.bincount(rows.user, minlength=n_users)
            by = rows.when if self.timestamp else generator.random(rows.user.size)
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
        """Return how many of ``n`` users who qualify are for the test and for validation."""
        default = min(max(1, n // 10), MAX_DEFAULT_USERS)
        n_test = default if self.n_test_users is None else self.n_test_users
        n_val = default if self.n_val_users is None else self.n_val_users
        if n_test + n_val > n:
            raise UserError(
                f"no test user is left: {n} users have at least min_relevant={self.min_relevant} "
                f"relevant items to hold out, fewer than n_test_users={n_test} and "
                f"n_val_users={n_val} together; lower these, or give more data"
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
        """Make pairs of ``rows`` and of negatives: known items that the user has no row of in ``excluded``.

        Returns:
            The pairs, and the number of users without any item to draw.
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
            owner = rows.user[rows.relevant]
            full = np.unique(owner[~has_room[owner]])
            owner = owner[has_room[owner]]
            if self.negatives > n_known or owner.size * self.negatives > MAX_NEGATIVES:
                raise UserError(
                    f"dataset.negatives={self.negatives}: makes {owner.size * self.negatives:,} pairs; give at most "
                    f"{min(n_known, MAX_NEGATIVES // max(1, owner.size)):,} for {n_known:,} items and {owner.size:,} "
                    "relevant rows"
                )
            owner = np.repeat(owner, self.negatives)
            drawn = sample_negatives(positives, owner, n_known, generator)
            user = np.concatenate([user, owner])
            item = np.concatenate([item, np.flatnonzero(known)[drawn]])
            target = np.concatenate([target, np.zeros(owner.size, dtype=np.float32)])
        return Pairs(*map(torch.from_numpy, (user, item, target))), full.size

    def _ranking_of(self, rows: _Rows, split: _Split, users: np.ndarray) -> Ranking:
        """Return the relevant items of ``users`` in held-out rows, and their items in training rows."""
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
            + (f"the last by {', '.join(self.timestamp)}" if self.timestamp else "at random")
            + "; items of their training rows are not ranked for them"
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
    """(R,) times as numbers; all 0 without a column of times."""

    def at(self, index: np.ndarray) -> _Rows:
        return _Rows(*(array[index] for array in self))


class _Split(NamedTuple):
    held: np.ndarray
    """(R,) bool, rows that are not trained on."""
    test: np.ndarray
    val: np.ndarray


@dataclass(frozen=True)
class _Side:
    """Users or items: their table, and whether their id is a feature."""

    table: FeatureTable
    id_feature: bool

    def __post_init__(self) -> None:
        kind = self.table.kind
        if not self.table.features and not self.id_feature:
            raise UserError(
                f"{'an' if kind == 'item' else 'a'} {kind} has no feature: name columns in "
                f"dataset.{kind}_numeric or dataset.{kind}_categorical, or set "
                f"dataset.{kind}_id_feature=true"
            )

    def read(self, seen: pl.Series, on_unknown: str, notes: list[str]) -> pl.DataFrame:
        """Read ids, features and ``in_file``, a row for each id, sorted; users only if they are in ``seen``.

        Args:
            seen: Ids of the interactions, (R,) text.
            on_unknown: See :class:`TableData`.
            notes: Notes to add to.

        Raises:
            UserError: The table cannot be read, or does not have the ids.
        """
        table, ids = self.table, seen.unique()
        kind, key = table.kind, table.key
        if table.source is None:
            return pl.DataFrame({key: ids.sort()}).with_columns(in_file=pl.lit(value=False))
        frame, where = table.read(notes)
        unknown = table.unknown(frame, ids, where)
        if unknown.len() and on_unknown == "error":
            raise UserError(
                f"{where}: no {kind} {unknown[0]!r}, which is in the interactions (and "
                f"{unknown.len() - 1:,} more); add them, or set dataset.on_unknown=keep"
            )
        notes += table.describe(
            frame,
            ids,
            unknown,
            where,
            idle="ranked like the others" if kind == "item" else "left out",
            n_rows=int(seen.is_in(unknown.implode()).sum()),
        )
        if kind == "item":
            ids = pl.concat([frame[key], unknown])
        frame = frame.with_columns(in_file=pl.lit(value=True))
        return table.join(ids.sort(), frame).with_columns(pl.col("in_file").fill_null(value=False))

    def fit(self, table: pl.DataFrame, trained: torch.Tensor) -> FeatureSchema:
        """Learn the schema from the rows ``trained`` (row numbers; repeated ones count once)."""
        categorical = [*([self.table.key] if self.id_feature else []), *self.table.categorical]
        return FeatureSchema.fit(
            table[trained.unique().numpy()], numeric=self.table.numeric, categorical=categorical
        )
