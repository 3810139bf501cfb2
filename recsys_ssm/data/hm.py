"""Load H&M Personalized Fashion, the second dataset of FT-Mamba (``dataset=hm``).

Starnes and Webster, *Mamba for Scalable and Efficient Personalized Recommendations*, section III.B.
From the three official files (kaggle.com/c/h-and-m-personalized-fashion-recommendations):

- ``articles.csv``: the catalogue is the 100 articles bought most often. An article has its own id as the one
  categorical feature. The catalogue is ordered by id, so that popularity does not resolve ties in a ranking. Ties
  at the border of the 100 go to the lower id.
- ``customers.csv``: age (numeric), FN, Active, club_member_status, fashion_news_frequency (categorical; an empty cell
  is a category of its own). Buyers absent from the file are kept with unknown features.
- ``transactions_train.csv``: a row is a purchase. Each purchase of a catalogue article is a pair of target 1, beside a
  pair of target 0: a random catalogue article that the customer never bought.

Test users are customers with 5 or more *different* catalogue articles, which are relevant to them. (The paper says "at
least 5 purchases"; its R@5 and P@5 imply about 6.5 relevant articles a user, which counting repeat purchases towards
the 5 would not give.) Validation users have as many; if too few are left, the minimum is lowered. Purchases of test and
validation users are not in training.

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
from recsys_ssm.data.hm_generate import GeneratorSettings, Shop, generate
from recsys_ssm.data.two_tower import (
    Baseline,
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


class HmData(TwoTowerData):
    """Customers and the articles bought most often.

    Args:
        root: Folder of the three files; None: ``$RECSYS_SSM_DATA/hm``, by default ``data/hm``.
        source: ``files``: read them; ``generated``: generate data; ``auto``: read ``root`` if it is set or exists, and
            generate data otherwise.
        n_items: Articles in the catalogue.
        item_features: Columns of ``articles.csv``, all categorical.
        n_train: Training pairs, half of them purchases. If there are fewer purchases, they are repeated, each time with
            a new negative. None: every purchase once.
        n_val: Validation pairs for the loss, or fewer if there are not that many.
        n_val_users: Customers to rank for during validation; at most a tenth of those who are not test users.
        n_test_users: Customers to rank for in the test, or fewer if there are not that many.
        min_relevant: Different catalogue articles that a test user must have bought.
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
        n_items: int = 100,
        item_features: Sequence[str] = ("article_id",),
        n_train: int | None = 160_000,
        n_val: int = 1_000,
        n_val_users: int = 100,
        n_test_users: int = 100,
        min_relevant: int = 5,
        on_unknown_article: Literal["error", "drop"] = "error",
        generated_root: str | None = None,
        generator: Mapping[str, Any] | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        least = {
            "n_items": (n_items, 2),
            "n_train": (2 if n_train is None else n_train, 2),
            "n_val": (n_val, 2),
            "n_val_users": (n_val_users, 1),
            "n_test_users": (n_test_users, 1),
            "min_relevant": (min_relevant, 1),
        }
        for option, (value, minimum) in least.items():
            if value < minimum:
                raise UserError(f"dataset.{option}={value}: give at least {minimum}")
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

    def build(self) -> TwoTowerSplits:
        root, found = self._find()
        notes = [found]
        shop = Shop.of(root)
        if shop is not None:
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
            notes=notes,
        )
        n_users, n_items = tables.customers.height, tables.articles.height
        user, item = (tables.purchases[side].to_numpy() for side in ("user", "item"))
        different = tables.purchases.unique(maintain_order=True)
        positives = Ragged.from_pairs(
            different["user"].to_torch(), different["item"].to_torch(), n_users
        )

        # One random stream for each part, so that its size does not change the others.
        streams = np.random.SeedSequence(self.seed).spawn(3)
        splits, train, val = (np.random.default_rng(stream) for stream in streams)
        test_users, val_users = self._split(positives.lengths.numpy(), splits, notes)

        # Customers who bought every article have no possible negative.
        bought_all = (positives.lengths == n_items).numpy()
        if n_all := int(bought_all.sum()):
            notes.append(f"{n_all:,} customers bought the whole catalogue: they get no pairs")
        part = np.full(n_users, "train")
        part[test_users], part[val_users], part[bought_all] = "test", "val", ""
        # Validation does not repeat purchases, which would add nothing to a loss.
        n_val = min(self.n_val, 2 * int((part[user] == "val").sum()))

        def sample(name: str, n: int | None, rng: np.random.Generator) -> Pairs:
            rows = np.flatnonzero(part[user] == name)
            index = rng.permutation(rows) if n is None else _cycle(rows, n // 2, rng)
            negative = sample_negatives(positives, user[index], n_items, rng)
            notes.append(f"{name} pairs: " + _describe(index.size, rows.size))
            # Interleave both kinds, so that any first part of unshuffled pairs has both.
            return Pairs(
                torch.from_numpy(user[index].repeat(2)),
                torch.from_numpy(np.column_stack([item[index], negative]).ravel()),
                torch.tensor([1.0, 0.0]).repeat(index.size),
            )

        where = str(root / CUSTOMERS)
        user_schema = FeatureSchema.fit(
            tables.customers.filter(pl.Series(part == "train")),
            numeric=NUMERIC,
            categorical=CATEGORICAL,
            where=where,
        )
        item_schema = FeatureSchema.fit(
            tables.articles, categorical=self.item_features, where=str(root / ARTICLES)
        )
        item_ids = tables.articles["article_id"].to_list()
        baselines: dict[str, Baseline] = {}
        if shop is not None:
            baselines["oracle"] = functools.partial(_oracle, shop, tables.customers, item_ids)
        return TwoTowerSplits(
            users=user_schema.encode(tables.customers, where=where),
            items=item_schema.encode(tables.articles, where=str(root / ARTICLES)),
            item_ids=item_ids,
            user_schema=user_schema,
            item_schema=item_schema,
            train=sample("train", self.n_train, train),
            val=sample("val", n_val, val),
            val_ranking=_ranking(val_users, positives),
            test_ranking=_ranking(test_users, positives),
            baselines=baselines,
            notes=notes,
            generated=shop is not None,
            sources=_sources(root, shop),
        )

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
        if not eligible.size:
            raise UserError(
                f"no test user is left: no customer bought more than {n_distinct.max()} different "
                f"articles of the catalogue; lower dataset.min_relevant={self.min_relevant} or raise "
                f"dataset.n_items={self.n_items}"
            )
        (test,) = split_users(eligible, [self.n_test_users], rng)
        rest = np.setdiff1d(np.arange(n_distinct.size), test)
        n_val = min(self.n_val_users, -(-rest.size // 10))
        # With the n_val-th largest number as the minimum, n_val customers qualify.
        lowered = int(np.sort(n_distinct[rest])[-n_val]) if n_val else self.min_relevant
        least = min(self.min_relevant, lowered)
        (val,) = split_users(rest[n_distinct[rest] >= least], [n_val], rng)
        notes.append(
            f"test users: {test.size:,} of the {eligible.size:,} with at least {self.min_relevant} "
            f"different articles of the catalogue"
            + (
                f" (all of them; n_test_users={self.n_test_users:,})"
                if test.size < self.n_test_users
                else ""
            )
        )
        notes.append(f"validation users: {val.size:,} with at least {least}")
        return test, val


@dataclass(frozen=True)
class _Tables:
    articles: pl.DataFrame
    """The catalogue in its order: article_id (ten digits) and the feature columns, as text."""
    customers: pl.DataFrame
    """Feature columns of the customers who bought from it, by customer_id."""
    purchases: pl.DataFrame
    """user, item (Int64): rows of the two tables; sorted, repeat purchases kept."""


def _read(
    root: Path,
    *,
    n_items: int,
    item_columns: Sequence[str],
    drop_unknown: bool,
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

    catalogue, purchases = _read_purchases(
        root / TRANSACTIONS, articles, n_items, drop_unknown, notes
    )
    # Streaming does not keep an order: everything below is sorted.
    buyers = purchases.select(pl.col("customer_id").unique().sort())
    known = buyers.join(customers, on="customer_id", how="left", maintain_order="left")
    n_known = customers.join(buyers, on="customer_id", how="semi").height
    notes.append(
        f"{CUSTOMERS}: {customers.height:,} customers read, "
        f"{customers.height - n_known:,} left out: they bought nothing of the catalogue"
    )
    if absent := buyers.height - n_known:
        notes.append(
            f"{absent:,} of {buyers.height:,} buyers are not in {CUSTOMERS}: kept, features unknown"
        )
    rows = (
        purchases.join(buyers.with_row_index("user"), on="customer_id")
        .join(catalogue.select("article_id").with_row_index("item"), on="article_id")
        .select(pl.col("user", "item").cast(pl.Int64))
        .sort("user", "item")
    )
    return _Tables(catalogue, known.drop("customer_id"), rows)


def _read_purchases(
    path: Path, articles: pl.DataFrame, n_items: int, drop_unknown: bool, notes: list[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the catalogue, and (customer_id, article_id) of each purchase from it.

    The official file has 31.8 million rows, so it is streamed twice and never in memory: once to count articles, once
    for the purchases of the catalogue's articles.
    """
    rows = scan_table(path, columns=["customer_id", "article_id"])
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
        .head(n_items)
    )
    if ranked.height < 2:
        raise UserError(
            f"{path}: has purchases of {ranked.height} articles; give a file with at least 2"
        )
    catalogue = articles.join(ranked, on="article_id", how="semi").sort("article_id")
    written = counts.join(ranked, on="article_id", how="semi")["written"].to_list()
    purchases = collect(
        rows.filter(is_known & pl.col("article_id").is_in(written)).select(
            # Copy the text: a view would keep the whole file's text in memory.
            pl.concat_str("customer_id", pl.lit("")),
            _canonical("article_id"),
        ),
        path,
        streaming=True,
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
    notes.append(
        f"{TRANSACTIONS}: {n_all + n_unknown:,} purchases read, {purchases.height:,} kept; left out: "
        + ", ".join(f"{n:,} {why}" for why, n in left_out.items() if n or "not of" in why)
    )
    return catalogue, purchases


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


def _numbers(customers: pl.DataFrame, path: Path) -> pl.DataFrame:
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


def _describe(n: int, available: int) -> str:
    text = f"{2 * n:,}, {n:,} purchases and as many random articles not bought"
    if n > available:
        return f"{text}; {available:,} purchases repeated {n / available:.1f} times, negatives new"
    return text + (f"; drawn from {available:,} purchases" if n < available else "")


def _sources(root: Path, shop: Shop | None) -> dict[str, str]:
    """Return the sha256 of each file, or of the generator's settings."""
    if shop is not None:
        return {"hm_generate": hash_values(shop.settings.fingerprint)}
    files = (root / name for name in (ARTICLES, CUSTOMERS, TRANSACTIONS))
    return {str(path): hash_file(path, cache_folder()) for path in files}


def _oracle(
    shop: Shop, customers: pl.DataFrame, item_ids: list[str], users: torch.Tensor
) -> torch.Tensor:
    return torch.from_numpy(shop.log_probability(customers[users.cpu().numpy()], item_ids))


def _ranking(users: np.ndarray, positives: Ragged) -> Ranking:
    """Return the ranking of ``users``: all articles a user bought are relevant."""
    place = torch.full((positives.lengths.numel(),), -1)
    place[users] = torch.arange(users.size)
    owner = place.repeat_interleave(positives.lengths)
    mine = owner >= 0
    relevant = Ragged.from_pairs(owner[mine], positives.values[mine], users.size)
    return Ranking(torch.from_numpy(users), relevant)
