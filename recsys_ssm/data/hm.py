"""Load H&M Personalized Fashion, the second dataset of FT-Mamba (``dataset=hm``).

Starnes and Webster, *Mamba for Scalable and Efficient Personalized Recommendations*, section III.B.
From the three official files (kaggle.com/c/h-and-m-personalized-fashion-recommendations):

- ``articles.csv``: the catalogue is the 100 articles bought most often. An article has its own id as the one
  categorical feature. The catalogue is ordered by id, so that popularity does not resolve ties in a ranking. Ties
  at the border of the 100 go to the lower id. ``n_items=None`` takes every article of the file, and
  :data:`ARTICLE_FEATURES` names the 11 features that the paper mentions (``experiment=two_tower/hm_full``).
- ``customers.csv``: age (numeric), FN, Active, club_member_status, fashion_news_frequency (categorical; an empty cell
  is a category of its own). Buyers absent from the file are kept with unknown features.
- ``transactions_train.csv``: a row is a purchase. Each purchase of a catalogue article is a pair of target 1, beside a
  pair of target 0: a random catalogue article that the customer never bought.

Test users are customers with 5 or more *different* catalogue articles, which are relevant to them. (The paper says "at
least 5 purchases"; its R@5 and P@5 imply about 6.5 relevant articles a user, which counting repeat purchases towards
the 5 would not give.) Validation users have as many; if too few are left, the minimum is lowered. Purchases of test and
validation users are not in training.

``split="time"`` holds out time in place of users, as the Kaggle competition does: the last ``test_days`` days are the
test, as many days before them the validation, and all earlier purchases the training. A customer is tested on the
different articles that they buy in the held-out days, whether they had them before or not.

Article ids have ten digits; leading zeros that an export dropped are restored.

If there are no files, :mod:`recsys_ssm.data.hm_generate` generates some, and the same code reads them.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from recsys_ssm.batches import Ragged
from recsys_ssm.data.cache import cache_folder, hash_file, hash_values
from recsys_ssm.data.files import collect, read_table, scan_table
from recsys_ssm.data.hm_generate import GeneratorSettings, Shop, generate, settings_of
from recsys_ssm.data.two_tower import (
    Baseline,
    ByCount,
    Pairs,
    Ranking,
    TwoTowerData,
    TwoTowerSplits,
    sample_negatives,
    split_users,
)
from recsys_ssm.errors import UserError
from recsys_ssm.features import FeatureSchema, numeric_column
from recsys_ssm.instantiate import check_arguments

log = logging.getLogger(__name__)

ARTICLES, CUSTOMERS, TRANSACTIONS = "articles.csv", "customers.csv", "transactions_train.csv"
NUMERIC = ("age",)
CATEGORICAL = ("FN", "Active", "club_member_status", "fashion_news_frequency")
ARTICLE_FEATURES = (
    "product_type_name",
    "product_group_name",
    "graphical_appearance_name",
    "colour_group_name",
    "perceived_colour_value_name",
    "perceived_colour_master_name",
    "department_name",
    "index_name",
    "index_group_name",
    "section_name",
    "garment_group_name",
)
"""The 11 categorical features of an article's type and appearance."""

_TRAIN, _VAL, _TEST = 1, 2, 3
"""Part of a purchase; 0: none."""


class HmData(TwoTowerData):
    """Customers and the articles bought most often.

    Args:
        root: Folder of the three files; None: ``$RECSYS_SSM_DATA/hm``, by default ``data/hm``.
        source: ``files``: read them; ``generated``: generate data; ``auto``: read ``root`` if it is set or exists, and
            generate data otherwise.
        n_items: Articles in the catalogue, those bought most. None: every article of ``articles.csv``.
        item_features: Columns of ``articles.csv``, all categorical.
        negatives: Pairs of target 0 for each purchase. 0: for a loss that takes its negatives from the batch.
        split: ``users``: hold out customers; ``time``: hold out the last days.
        test_days: Days of the test, and of the validation, with ``split="time"``.
        n_train: Training pairs, half of them purchases (with one negative each). If there are fewer purchases, they are
            repeated, each time with a new negative. None: every purchase once.
        n_val: Validation pairs for the loss, or fewer if there are not that many.
        n_val_users: Customers to rank for during validation; at most a tenth of those who are not test users.
        n_test_users: Customers to rank for in the test, or fewer if there are not that many. None: all.
        min_relevant: Different catalogue articles that a test user must have bought, with ``split="time"`` in the
            held-out days.
        on_unknown_article: Treatment of transactions whose article is not in ``articles.csv``: ``error``, or ``drop``
            and count them.
        generated_root: Folder for generated files; None: ``$RECSYS_SSM_CACHE`` or the user's cache folder.
        generator: Arguments of :class:`~recsys_ssm.data.hm_generate.GeneratorSettings`.
        **base: Arguments of :class:`~recsys_ssm.data.two_tower.TwoTowerData`.
    """

    label = "H&M"

    def __init__(
        self,
        *,
        root: str | None = None,
        source: Literal["auto", "files", "generated"] = "auto",
        n_items: int | None = 100,
        item_features: Sequence[str] = ("article_id",),
        negatives: int = 1,
        split: Literal["users", "time"] = "users",
        test_days: int = 7,
        n_train: int | None = 160_000,
        n_val: int = 1_000,
        n_val_users: int = 100,
        n_test_users: int | None = 100,
        min_relevant: int = 5,
        on_unknown_article: Literal["error", "drop"] = "error",
        generated_root: str | None = None,
        generator: Mapping[str, Any] | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        least = {
            "n_items": (2 if n_items is None else n_items, 2),
            "negatives": (negatives, 0),
            "test_days": (test_days, 1),
            "n_train": (2 if n_train is None else n_train, 2),
            "n_val": (n_val, 2),
            "n_val_users": (n_val_users, 1),
            "n_test_users": (1 if n_test_users is None else n_test_users, 1),
            "min_relevant": (min_relevant, 1),
        }
        for option, (value, minimum) in least.items():
            if value < minimum:
                raise UserError(f"dataset.{option}={value}: give at least {minimum}")
        if split not in ("users", "time"):
            raise UserError(f"dataset.split={split}: expected users or time")
        if isinstance(item_features, str):
            item_features = (item_features,)
        if not item_features:
            raise UserError("dataset.item_features=[]: name at least one column of articles.csv")
        check_arguments(GeneratorSettings, generator or {}, "dataset.generator")
        self.generator = GeneratorSettings(**(generator or {}))
        self.root, self.source, self.generated_root = root, source, generated_root
        self.n_items, self.item_features = n_items, tuple(item_features)
        self.n_train, self.n_val = n_train, n_val
        self.n_val_users, self.n_test_users = n_val_users, n_test_users
        self.min_relevant, self.on_unknown_article = min_relevant, on_unknown_article
        self.negatives, self.split, self.test_days = negatives, split, test_days

    def build(self) -> TwoTowerSplits:
        root, found = self._find()
        notes = [found]
        made_by = settings_of(root)
        if made_by is not None:
            if self.source == "files":
                raise UserError(
                    f"dataset.source=files, but the files of {root} are generated; name the folder of "
                    "real files with dataset.root"
                )
            notes = [f"GENERATED DATA: {found}; results say nothing about H&M's customers"]
            bar = "!" * 88
            log.warning("\n%s\n%s\nReal files: dataset.root=FOLDER\n%s", bar, notes[0], bar)
        tables = _read(
            root,
            n_items=self.n_items,
            item_columns=self.item_features,
            drop_unknown=self.on_unknown_article == "drop",
            by_time=self.split == "time",
            notes=notes,
        )
        n_users, n_items = tables.user_ids.len(), tables.articles.height
        user, item = (tables.purchases[side].to_numpy() for side in ("user", "item"))

        # One random stream for each part, so that its size does not change the others.
        streams = np.random.SeedSequence(self.seed).spawn(3)
        splits, train, val = (np.random.default_rng(stream) for stream in streams)
        baselines: dict[str, Baseline] = {}
        if self.split == "users":
            positives = tested = validated = _different(user, item, n_users)
            test_users, val_users = self._split(positives.lengths.numpy(), splits, notes)
            part = np.full(n_users, _TRAIN, dtype=np.int8)
            part[test_users], part[val_users] = _TEST, _VAL
            part = part[user]
        else:
            part, recent = self._by_time(tables.purchases["day"].to_numpy(), notes)
            positives, validated, tested = (
                _different(user[part == one], item[part == one], n_users)
                for one in (_TRAIN, _VAL, _TEST)
            )
            test_users = self._buyers("test", tested, self.n_test_users, splits, notes)
            val_users = self._buyers("validation", validated, self.n_val_users, splits, notes)
            counts = np.bincount(item[recent], minlength=n_items)
            baselines["popularity_last_days"] = ByCount(torch.from_numpy(counts).float())
        in_training = np.zeros(n_users, dtype=bool)
        in_training[user[part == _TRAIN]] = True

        # Customers who bought every article have no possible negative.
        bought_all = (positives.lengths == n_items).numpy()
        if self.negatives and (n_all := int(bought_all.sum())):
            notes.append(f"{n_all:,} customers bought the whole catalogue: they get no pairs")
            part[bought_all[user]] = 0
            in_training &= ~bought_all
        # Validation does not repeat purchases, which would add nothing to a loss.
        each = 1 + self.negatives
        n_val = min(self.n_val, each * int((part == _VAL).sum()))

        def sample(name: str, code: int, n: int | None, rng: np.random.Generator) -> Pairs:
            rows = np.flatnonzero(part == code)
            index = rng.permutation(rows) if n is None else _cycle(rows, n // each, rng)
            notes.append(f"{name} pairs: " + _describe(index.size, rows.size, self.negatives))
            if not self.negatives:
                of_user, of_item = torch.from_numpy(user[index]), torch.from_numpy(item[index])
                return Pairs(of_user, of_item, torch.ones(index.size))
            negative = sample_negatives(
                positives, user[index].repeat(self.negatives), n_items, rng
            ).reshape(-1, self.negatives)
            # Interleave both kinds, so that any first part of unshuffled pairs has both.
            return Pairs(
                torch.from_numpy(user[index].repeat(each)),
                torch.from_numpy(np.column_stack([item[index], negative]).ravel()),
                torch.tensor([1.0] + [0.0] * self.negatives).repeat(index.size),
            )

        where = str(root / CUSTOMERS)
        user_schema = FeatureSchema.fit(
            tables.customers.filter(pl.Series(in_training)),
            numeric=NUMERIC,
            categorical=CATEGORICAL,
            where=where,
        )
        item_schema = FeatureSchema.fit(
            tables.articles, categorical=self.item_features, where=str(root / ARTICLES)
        )
        item_ids = tables.articles["article_id"].to_list()
        if made_by is not None:
            baselines["oracle"] = _Oracle(made_by, tables.customers, item_ids)
        return TwoTowerSplits(
            users=user_schema.encode(tables.customers, where=where),
            items=item_schema.encode(tables.articles, where=str(root / ARTICLES)),
            item_ids=item_ids,
            user_schema=user_schema,
            item_schema=item_schema,
            train=sample("train", _TRAIN, self.n_train, train),
            val=sample("val", _VAL, n_val, val),
            val_ranking=_ranking(val_users, validated),
            test_ranking=_ranking(test_users, tested),
            user_ids=tables.user_ids,
            baselines=baselines,
            notes=notes,
            generated=made_by is not None,
            sources=_sources(root, made_by),
        )

    def clean_users(self, users: pl.DataFrame, where: str) -> pl.DataFrame:
        """Return a table of customers with numbers as the training read them."""
        return _numbers(users, where)

    def _by_time(self, day: np.ndarray, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the part of each purchase by its day, and the purchases of the last days of the training."""
        first_test = int(day.max()) - self.test_days + 1
        first_val = first_test - self.test_days
        if int(day.min()) >= first_val:
            raise UserError(
                f"dataset.test_days={self.test_days}: the files have purchases of {int(np.ptp(day)) + 1} days, and "
                "nothing is left to train on; give fewer days"
            )
        part = np.full(day.size, _TRAIN, dtype=np.int8)
        part[day >= first_val], part[day >= first_test] = _VAL, _TEST
        starts, end = (first_val, first_test), int(day.max())
        dates = [str(np.datetime64(d, "D")) for d in (int(day.min()), *starts, end)]
        sizes = np.bincount(part, minlength=4)
        notes.append(
            f"training from {dates[0]}: {sizes[_TRAIN]:,} purchases; validation from {dates[1]}: {sizes[_VAL]:,}; "
            f"test from {dates[2]} to {dates[3]}: {sizes[_TEST]:,}"
        )
        return part, (day >= first_val - self.test_days) & (day < first_val)

    def _buyers(
        self,
        name: str,
        bought: Ragged,
        n: int | None,
        rng: np.random.Generator,
        notes: list[str],
    ) -> np.ndarray:
        """Choose customers to rank for among those who bought enough articles in the held-out days."""
        eligible = np.flatnonzero(bought.lengths.numpy() >= self.min_relevant)
        if not eligible.size:
            raise UserError(
                f"no {name} user is left: no customer bought more than {int(bought.lengths.max())} different articles "
                f"of the catalogue in those days; lower dataset.min_relevant={self.min_relevant}"
            )
        chosen = eligible if n is None else split_users(eligible, [n], rng)[0]
        notes.append(
            f"{name} users: {chosen.size:,} of the {eligible.size:,} with at least {self.min_relevant} different "
            "articles of the catalogue in those days"
        )
        return chosen

    def _find(self) -> tuple[Path, str]:
        """Return the folder to read (with generated files if needed), and why it is this one."""
        usual = Path(os.environ.get("RECSYS_SSM_DATA") or "data") / "hm"
        root = usual if self.root is None else Path(self.root).expanduser()
        # A folder that the user named is never silently replaced by generated data.
        if self.source != "generated" and (self.root is not None or root.is_dir()):
            return root, f"files of {root}"
        if self.source == "files":
            raise UserError(
                f"dataset.source=files, but there is no folder {usual}: name the folder of "
                f"{ARTICLES}, {CUSTOMERS} and {TRANSACTIONS} with dataset.root="
            )
        why = "dataset.source=generated" if self.source == "generated" else f"no folder {usual}"
        return generate(self.generator, cache_folder(self.generated_root)), why

    def _split(
        self, n_distinct: np.ndarray, rng: np.random.Generator, notes: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose the rows of the test users and of the validation users."""
        eligible = np.flatnonzero(n_distinct >= self.min_relevant)
        n_test = eligible.size if self.n_test_users is None else self.n_test_users
        if not eligible.size:
            raise UserError(
                f"no test user is left: no customer bought more than {n_distinct.max()} different "
                f"articles of the catalogue; lower dataset.min_relevant={self.min_relevant} or raise "
                f"dataset.n_items={self.n_items}"
            )
        (test,) = split_users(eligible, [n_test], rng)
        rest = np.setdiff1d(np.arange(n_distinct.size), test)
        n_val = min(self.n_val_users, -(-rest.size // 10))
        # With the n_val-th largest number as the minimum, n_val customers qualify.
        lowered = int(np.sort(n_distinct[rest])[-n_val]) if n_val else self.min_relevant
        least = min(self.min_relevant, lowered)
        (val,) = split_users(rest[n_distinct[rest] >= least], [n_val], rng)
        notes.append(
            f"test users: {test.size:,} of the {eligible.size:,} with at least {self.min_relevant} "
            f"different articles of the catalogue"
            + (f" (all of them; n_test_users={n_test:,})" if test.size < n_test else "")
        )
        notes.append(f"validation users: {val.size:,} with at least {least}")
        return test, val


@dataclass(frozen=True)
class _Tables:
    articles: pl.DataFrame
    """The catalogue in its order: article_id (ten digits) and the feature columns, as text."""
    user_ids: pl.Series
    """The customers, sorted: those who bought from the catalogue, by time all of them."""
    customers: pl.DataFrame
    """Their feature columns."""
    purchases: pl.DataFrame
    """user, item (Int64): rows of the two tables; by time day (Int32, days since 1970) as well. Sorted by the three,
    repeat purchases kept."""


def _read(
    root: Path,
    *,
    n_items: int | None,
    item_columns: Sequence[str],
    drop_unknown: bool,
    by_time: bool,
    notes: list[str],
) -> _Tables:
    """Read the three files, reduced to the catalogue; add ``notes`` on what was read and left out.

    Raises:
        UserError: A file is missing, unreadable, lacks a column or holds a wrong value.
    """
    articles_path, customers_path = root / ARTICLES, root / CUSTOMERS
    articles = read_table(
        articles_path, columns=list(dict.fromkeys(["article_id", *item_columns]))
    ).with_columns(_canonical("article_id"))
    _check_key(articles, "article_id", articles_path)
    customers = read_table(customers_path, columns=["customer_id", *NUMERIC, *CATEGORICAL])
    _check_key(customers, "customer_id", customers_path)
    customers = _numbers(customers, customers_path)
    notes.append(f"{ARTICLES}: {articles.height:,} articles read")

    catalogue, purchases, buyers = _read_purchases(
        root / TRANSACTIONS,
        articles,
        customers.select("customer_id"),
        n_items=n_items,
        drop_unknown=drop_unknown,
        by_time=by_time,
        notes=notes,
    )
    known = buyers.join(customers, on="customer_id", how="left", maintain_order="left")
    n_known = customers.join(buyers.filter("bought"), on="customer_id", how="semi").height
    n_buyers = int(buyers["bought"].sum())
    without = f"{customers.height - n_known:,}"
    notes.append(
        f"{CUSTOMERS}: {customers.height:,} customers read, "
        + (
            f"{without} of them bought nothing of the catalogue"
            if by_time
            else f"{without} left out: they bought nothing of the catalogue"
        )
    )
    if absent := n_buyers - n_known:
        notes.append(
            f"{absent:,} of {n_buyers:,} buyers are not in {CUSTOMERS}: kept, features unknown"
        )
    return _Tables(catalogue, buyers["customer_id"], known.drop("customer_id", "bought"), purchases)


def _read_purchases(
    path: Path,
    articles: pl.DataFrame,
    customers: pl.DataFrame,
    *,
    n_items: int | None,
    drop_unknown: bool,
    by_time: bool,
    notes: list[str],
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return the catalogue; the purchases from it, as rows of the two other tables; and the users.

    The official file has 31.8 million rows, so it is streamed and its text is never in memory: once to count articles,
    once for the ids of the buyers, once for the purchases. The users have the columns customer_id, sorted, and bought.
    With ``by_time`` they are the buyers and all ``customers``.
    """
    rows = scan_table(path, columns=["customer_id", "article_id", *(("t_dat",) if by_time else ())])
    is_known = pl.col("customer_id").is_not_null()
    counts = collect(
        rows.group_by(pl.col("article_id").alias("written")).agg(
            pl.len().alias("rows"), is_known.sum().alias("n")
        ),
        path,
        streaming=True,
    ).with_columns(_canonical("written").alias("article_id"))
    unknown = counts.join(articles, on="article_id", how="anti")
    if unknown.height and not drop_unknown:
        wrong = pl.col("article_id").is_null() | pl.col("article_id").is_in(
            unknown["written"].drop_nulls().to_list()
        )
        first = collect(rows.with_row_index("row", offset=1).filter(wrong).head(1), path)
        raise UserError(
            f"{path}, row {first['row'][0]}, column 'article_id': {first['article_id'][0]!r} is in "
            f"no row of {ARTICLES} (nor are {int(unknown['rows'].sum()) - 1:,} more); correct it, "
            "or drop such rows with dataset.on_unknown_article=drop"
        )
    counts = counts.join(articles.select("article_id"), on="article_id", how="semi")
    ranked = (
        counts.group_by("article_id")
        .agg(pl.col("n").sum())
        .filter(pl.col("n") > 0)
        .sort(["n", "article_id"], descending=[True, False])
        .head(articles.height if n_items is None else n_items)
    )
    if ranked.height < 2:
        raise UserError(
            f"{path}: has purchases of {ranked.height} articles; give a file with at least 2"
        )
    catalogue = articles.sort("article_id")
    if n_items is not None:
        catalogue = catalogue.join(ranked, on="article_id", how="semi", maintain_order="left")
    place = catalogue.select("article_id").with_row_index("item")
    # An id may be written with and without its leading zeros.
    written = counts.join(place, on="article_id").select(
        pl.col("written"), pl.col("item").cast(pl.Int32)
    )
    sold = rows.filter(is_known).join(
        written.lazy(), left_on="article_id", right_on="written", how="inner"
    )
    # Streaming does not keep an order: everything below is sorted.
    buyers = collect(
        # Copy the text: a view would keep the whole file's text in memory.
        sold.select(pl.concat_str("customer_id", pl.lit("")).unique()),
        path,
        streaming=True,
    ).with_columns(bought=True)
    if by_time:
        others = customers.join(buyers, on="customer_id", how="anti").with_columns(bought=False)
        buyers = pl.concat([buyers, others])
    buyers = buyers.sort("customer_id")
    number = (
        buyers.select("customer_id")
        .with_row_index("user")
        .with_columns(pl.col("user").cast(pl.Int32))
    )
    if by_time:
        _check_dates(rows, path)
    day = [pl.col("t_dat").str.to_date(strict=False).to_physical().alias("day")] if by_time else []
    purchases = (
        collect(
            sold.join(number.lazy(), on="customer_id", how="inner").select("user", "item", *day),
            path,
            streaming=True,
        )
        .sort("user", "item", *(("day",) if by_time else ()))
        .with_columns(pl.col("user", "item").cast(pl.Int64))
    )

    n_unknown, n_all = int(unknown["rows"].sum()), int(counts["rows"].sum())
    n_anonymous = n_all - int(counts["n"].sum())
    left_out = {
        f"of articles {ARTICLES} lacks": n_unknown,
        "without a customer_id": n_anonymous,
        f"not of the {catalogue.height} articles bought most": n_all
        - n_anonymous
        - purchases.height,
    }
    if n_items is None:
        left_out.popitem()
        notes.append(f"{ranked.height:,} of {catalogue.height:,} articles were bought")
    notes.append(
        f"{TRANSACTIONS}: {n_all + n_unknown:,} purchases read, {purchases.height:,} kept; left out: "
        + (
            ", ".join(f"{n:,} {why}" for why, n in left_out.items() if n or "not of" in why)
            or "none"
        )
    )
    return catalogue, purchases, buyers


def _check_dates(rows: pl.LazyFrame, path: Path) -> None:
    """Check that every purchase has a date."""
    date = pl.col("t_dat").str.to_date(strict=False)
    wrong = collect(rows.select(date.is_null().any()), path, streaming=True)
    if wrong.item():
        first = collect(rows.with_row_index("row", offset=1).filter(date.is_null()).head(1), path)
        raise UserError(
            f"{path}, row {first['row'][0]}, column 't_dat': {first['t_dat'][0]!r} is not a date; correct it: "
            "year-month-day"
        )


def _canonical(column: str) -> pl.Expr:
    """Return an article id with ten digits, restoring its leading zeros."""
    return pl.col(column).str.strip_chars().str.zfill(10)


def _check_key(table: pl.DataFrame, column: str, path: Path) -> None:
    key = table[column]
    wrong = key.is_null() | ~key.is_first_distinct()
    if wrong.any():
        row = wrong.arg_max()
        assert row is not None
        what = "is empty" if key[row] is None else f"{key[row]!r} is in an earlier row too"
        raise UserError(f"{path}, row {row + 1}, column {column!r}: {what}; keep one row for each")


def _numbers(customers: pl.DataFrame, path: Path | str) -> pl.DataFrame:
    """Convert age, FN and Active to numbers, null where the cell is empty.

    FN and Active are flags written as 1.0. As numbers, they are the same category for a new customer however the
    customer's table stores them.
    """
    numbers = {
        name: pl.Series(name, numeric_column(customers, name, str(path))).fill_nan(None)
        for name in ("age", "FN", "Active")
    }
    negative = (numbers["age"] < 0).fill_null(value=False)
    if negative.any():
        row = negative.arg_max()
        assert row is not None
        raise UserError(
            f"{path}, row {row + 1}, column 'age': {customers['age'][row]!r} is negative; "
            "correct it, or leave it empty if it is unknown"
        )
    return customers.with_columns(**numbers)


def _cycle(values: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``n`` of ``values`` in random order, each equally often (give or take one)."""
    rounds = -(-n // values.size) if values.size else 0
    return np.concatenate([values[:0], *(rng.permutation(values) for _ in range(rounds))])[:n]


def _different(user: np.ndarray, item: np.ndarray, n_users: int) -> Ragged:
    """Return the different items of each user, from pairs sorted by user and item."""
    new = np.ones(user.size, dtype=bool)
    new[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    lengths = np.bincount(user[new], minlength=n_users)
    return Ragged(
        torch.from_numpy(item[new]), torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    )


def _describe(n: int, available: int, negatives: int) -> str:
    if not negatives:
        text = f"{n:,} purchases"
    elif negatives == 1:
        text = f"{2 * n:,}, {n:,} purchases and as many random articles not bought"
    else:
        text = f"{(1 + negatives) * n:,}, {n:,} purchases and {negatives} random articles not bought for each"
    if n > available:
        return f"{text}; {available:,} purchases repeated {n / available:.1f} times, negatives new"
    return text + (f"; drawn from {available:,} purchases" if n < available else "")


def _sources(root: Path, made_by: GeneratorSettings | None) -> dict[str, str]:
    """Return the sha256 of each file, or of the generator's settings."""
    if made_by is not None:
        return {"hm_generate": hash_values(made_by.fingerprint)}
    files = (root / name for name in (ARTICLES, CUSTOMERS, TRANSACTIONS))
    return {str(path): hash_file(path, cache_folder()) for path in files}


@dataclass
class _Oracle:
    """A baseline: the rule that generated data was made by, computed at its first use."""

    settings: GeneratorSettings
    customers: pl.DataFrame
    item_ids: list[str]

    @functools.cached_property
    def shop(self) -> Shop:
        return Shop(self.settings)

    def __call__(self, users: torch.Tensor) -> torch.Tensor:
        rows = self.customers[users.cpu().numpy()]
        return torch.from_numpy(self.shop.log_probability(rows, self.item_ids))


def _ranking(users: np.ndarray, positives: Ragged) -> Ranking:
    """Return the ranking of ``users``: all articles a user bought are relevant."""
    place = torch.full((positives.lengths.numel(),), -1)
    place[users] = torch.arange(users.size)
    owner = place.repeat_interleave(positives.lengths)
    mine = owner >= 0
    relevant = Ragged.from_pairs(owner[mine], positives.values[mine], users.size)
    return Ranking(torch.from_numpy(users), relevant)
