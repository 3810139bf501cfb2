"""Recompute a run's figures from the raw file, with NumPy and Polars: no number comes from the package.

The model's own scores come from its checkpoint, in float64, by a forward pass for one user at a time and one matrix
product with the catalogue.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch

from recsys_ssm.features import Features
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.models.two_tower import TwoTower

PER_USER = ("p", "r", "mrr", "hr", "ndcg", "map")
NAMES = (
    *(f"{family}@{k}" for family in PER_USER for k in (1, 3, 10, 60)),
    *("coverage@3", "coverage@10", "popularity@3", "popularity@10", "popularity@60"),
)
"""Every family of metrics; 60 places are more than the small catalogues have."""

MOST = 60


class Asked(NamedTuple):
    """A test user: the rows before the target, and the relevant items."""

    user: str
    history: list[tuple[str, int]]
    """Items and times, the oldest first."""
    relevant: set[str]


def ranked(scores: Mapping[str, float], without: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Return items by score; of equal scores the one with the smaller id comes first."""
    return sorted(scores.keys() - without, key=lambda item: (-scores[item], item))[:MOST]


def figures(
    lists: Sequence[list[str]],
    relevant: Sequence[set[str]],
    catalogue: Sequence[str],
    counts: Mapping[str, int],
    names: Sequence[str] = NAMES,
) -> dict[str, float]:
    """Return each metric by its definition, one user after another."""
    result: dict[str, float] = {}
    for name in names:
        family, cut = name.split("@")
        k, values = int(cut), []
        if family == "coverage":
            result[name] = len({item for top in lists for item in top[:k]}) / len(catalogue)
            continue
        if family == "popularity":
            shown = [counts.get(item, 0) for top in lists for item in top[:k]]
            result[name] = sum(shown) / len(shown)
            continue
        for top, liked in zip(lists, relevant, strict=True):
            if not liked:
                continue
            ranks = [rank for rank, item in enumerate(top[:k], 1) if item in liked]
            possible = min(k, len(liked))
            values.append(
                {
                    "p": len(ranks) / k,
                    "r": len(ranks) / len(liked),
                    "hr": float(bool(ranks)),
                    "mrr": 1 / ranks[0] if ranks else 0.0,
                    "ndcg": sum(1 / math.log2(rank + 1) for rank in ranks)
                    / sum(1 / math.log2(rank + 1) for rank in range(1, possible + 1)),
                    "map": sum((n + 1) / rank for n, rank in enumerate(ranks)) / possible,
                }[family]
            )
        result[name] = math.fsum(values) / len(values)
    result["n_users"] = len(lists)
    result["n_users_without_relevant"] = sum(not liked for liked in relevant)
    return result


def with_zeros(values: Mapping[str, float]) -> dict[str, float]:
    """Return figures in which users without a relevant item count as zeros."""
    n, without = values["n_users"], values["n_users_without_relevant"]
    return {
        name: value * (n - without) / n if name.split("@")[0] in ["p", "r", "mrr", "hr", "ndcg", "map"] else value
        for name, value in values.items()
    }  # fmt: skip


# ------------------------------------------------------------------------------------- next items


class NextItemTruth(NamedTuple):
    """A next-item dataset by the raw file."""

    users: list[str]
    """Ids in the order of ``test_users.parquet``'s row numbers."""
    catalogue: list[str]
    counts: Counter[str]
    asked: list[Asked]


def next_item_truth(
    rows: pl.DataFrame,
    split: str,
    *,
    duplicates: str = "identical",
    val_share: float = 0.1,
    test_share: float = 0.1,
) -> NextItemTruth:
    """Split a table of ``user_id``, ``item_id`` (text) and ``timestamp`` (whole numbers)."""
    if duplicates == "identical":
        rows = rows.unique(["user_id", "item_id", "timestamp"], keep="first", maintain_order=True)
    ordered = rows.sort("timestamp", maintain_order=True)
    events: dict[str, list[tuple[str, int]]] = {}
    for user, item, time in ordered.select("user_id", "item_id", "timestamp").iter_rows():
        events.setdefault(user, []).append((item, time))
    times = sorted(ordered["timestamp"])
    val_from = times[int((1 - val_share - test_share) * len(times))]
    test_from = times[int((1 - test_share) * len(times))]
    counts: Counter[str] = Counter()
    asked = []
    for user in sorted(events):
        mine = events[user]
        if split == "leave_one_out":
            n_trained = len(mine) - 2 if len(mine) >= 3 else len(mine)
            target = len(mine) - 1 if len(mine) >= 3 else None
        else:
            n_trained = sum(time < val_from for _, time in mine)
            before = sum(time < test_from for _, time in mine)
            target = before if 0 < before < len(mine) else None
        counts.update(item for item, _ in mine[:n_trained])
        if target is not None:
            asked.append(Asked(user, mine[:target], {mine[target][0]}))
    return NextItemTruth(sorted(events), sorted(set(rows["item_id"])), counts, asked)


def next_item_scores(checkpoint: Path, truth: NextItemTruth) -> list[dict[str, float]]:
    """Return each asked user's scores of the catalogue, from the checkpoint in float64."""
    model = NextItem.load_from_checkpoint(
        checkpoint, map_location="cpu", weights_only=True
    ).double()
    assert model.item_ids == truth.catalogue
    place = {item: i for i, item in enumerate(truth.catalogue)}
    scores = []
    with torch.no_grad():
        items = model._items().numpy()
        for _, history, _ in truth.asked:
            known = [place[item] for item, _ in history]
            if model.objective == "masked":
                known.append(-2)
            item = torch.tensor([known[-model.max_length :]])
            position = torch.arange(item.shape[1])[None]
            query = model.head.query(model(item, torch.zeros_like(item), position)[0, -1:])
            scores.append(
                dict(zip(truth.catalogue, products(query.numpy(), items)[0], strict=True))
            )
    return scores


def products(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return the inner products (U, I); equal items have equal ones."""
    different, again = np.unique(items, axis=0, return_inverse=True)
    return (queries @ different.T)[:, again.ravel()]


def next_item_lists(
    truth: NextItemTruth, scores: Sequence[Mapping[str, float]]
) -> dict[str, list[list[str]]]:
    """Return the lists of every column, by the column's name in ``metrics.json``."""
    popular = {item: float(truth.counts[item]) for item in truth.catalogue}
    seen = [{item for item, _ in asked.history} for asked in truth.asked]
    return {
        "filtered": [ranked(own, had) for own, had in zip(scores, seen, strict=True)],
        "unfiltered": [ranked(own) for own in scores],
        "popularity": [ranked(popular, had) for had in seen],
        "popularity_unfiltered": [ranked(popular) for _ in seen],
        "repeat_last_unfiltered": [
            list(dict.fromkeys(item for item, _ in reversed(asked.history)))[:MOST]
            for asked in truth.asked
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------- two towers


class TwoTowerTruth(NamedTuple):
    """A table of one's own by the raw file."""

    users: list[str]
    catalogue: list[str]
    counts: Counter[str]
    """Relevant rows that are trained on."""
    asked: list[Asked]
    seen: list[set[str]]
    """Items of each asked user's training rows."""
    trained: pl.DataFrame
    """The rows that are trained on."""


def two_tower_truth(
    rows: pl.DataFrame,
    catalogue: Sequence[str],
    split: str,
    *,
    seed: int,
    relevant_above: float,
    min_relevant: int = 1,
    held_out: float = 0.2,
) -> TwoTowerTruth:
    """Split a table of ``user_id``, ``item_id``, ``stars`` and ``timestamp``; a pair counts once, with its last row."""
    latest = (
        rows.with_row_index("line")
        .sort("timestamp", "line")
        .unique(["user_id", "item_id"], keep="last", maintain_order=True)
        .with_columns(liked=pl.col("stars") > relevant_above)
    )
    users = sorted(set(rows["user_id"]))
    mine = {user: latest.filter(user_id=user) for user in users}
    last = {
        user: own.height if split == "users"
        else min(max(1, round(held_out * own.height)), own.height - 1)
        for user, own in mine.items()
    }  # fmt: skip
    liked = {user: int(own.tail(last[user])["liked"].sum()) for user, own in mine.items()}
    candidates = [i for i, user in enumerate(users) if liked[user] >= min_relevant]
    order = np.random.default_rng(seed).permutation(np.array(candidates))
    n = max(1, len(candidates) // 10)
    test, val = sorted(order[:n]), sorted(order[n : 2 * n])
    held = {users[i] for i in (*test, *val)}
    trained = pl.concat(
        own.head(own.height - last[user]) if user in held else own for user, own in mine.items()
    )
    asked, seen = [], []
    for user in (users[i] for i in test):
        own = mine[user]
        kept = own.head(own.height - last[user])
        asked.append(
            Asked(
                user,
                list(kept.select("item_id", "timestamp").iter_rows()),
                set(own.tail(last[user]).filter("liked")["item_id"]),
            )
        )
        seen.append(set(kept["item_id"]) if split == "interactions" else set())
    counts = Counter(trained.filter("liked")["item_id"])
    return TwoTowerTruth(users, sorted(catalogue), counts, asked, seen, trained)


def two_tower_scores(
    checkpoint: Path, truth: TwoTowerTruth, people: pl.DataFrame
) -> list[dict[str, float]]:
    """Return each asked user's scores of the catalogue, from the checkpoint in float64."""
    model = TwoTower.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    assert model.item_ids == truth.catalogue
    table = pl.DataFrame({"user_id": [asked.user for asked in truth.asked]})
    table = table.join(people, on="user_id", how="left", maintain_order="left")
    numeric, categorical = model.user_schema.encode(table, where="people")
    model = model.double()
    with torch.no_grad():
        queries = model.user_tower(Features(numeric.double(), categorical)).numpy()
        items = np.concatenate(
            [
                model.item_tower(model.items.rows(slice(i, i + 1))).numpy()
                for i in range(len(model.item_ids))
            ]
        )
    return [dict(zip(truth.catalogue, row, strict=True)) for row in products(queries, items)]


def random_scores(row: int, n_items: int) -> np.ndarray:
    """Return the documented random scores of a user: splitmix64 of the pair's number."""
    mask = (1 << 64) - 1

    def signed(x: int) -> int:
        return x - (1 << 64) if x >> 63 else x

    scores = []
    for item in range(n_items):
        x = row * n_items + item + 1
        for shift, factor in (
            (32, 0x9E3779B97F4A7C15),
            (30, 0xBF58476D1CE4E5B9),
            (27, 0x94D049BB133111EB),
        ):
            x = (((signed(x) ^ (signed(x) >> shift)) & mask) * factor) & mask
        x = (signed(x) ^ (signed(x) >> 31)) & mask
        scores.append(signed(x))
    return np.array(scores, dtype=np.int64).astype(np.float32)


def two_tower_lists(
    truth: TwoTowerTruth, scores: Sequence[Mapping[str, float]]
) -> dict[str, list[list[str]]]:
    """Return the lists of every column, by the column's name in ``metrics.json``."""
    popular = {item: float(truth.counts[item]) for item in truth.catalogue}
    row = {user: i for i, user in enumerate(truth.users)}
    chance = [
        dict(
            zip(truth.catalogue, random_scores(row[asked.user], len(truth.catalogue)), strict=True)
        )
        for asked in truth.asked
    ]
    return {
        "model": [ranked(own, had) for own, had in zip(scores, truth.seen, strict=True)],
        "popularity": [ranked(popular, had) for had in truth.seen],
        "random": [ranked(own, had) for own, had in zip(chance, truth.seen, strict=True)],
    }  # fmt: skip


# ------------------------------------------------------------------------------------- what a run wrote


def kept_lists(folder: Path, users: Sequence[str]) -> dict[str, tuple[list[str], set[str]]]:
    """Return the recommended and the relevant items of each test user, as a run's folder has them."""
    names = pl.read_parquet(folder / "items.parquet")["item"].to_list()
    kept = {}
    for row, n, top, liked in pl.read_parquet(folder / "test_users.parquet").iter_rows():
        assert n == len(liked)
        kept[users[row]] = [names[i] for i in top], {names[i] for i in liked}
    return kept


def results(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "metrics.json").read_text())
