"""Generate a small shop for next-item recommendation: nothing is downloaded, and its results are marked as generated.

Customers have a few favourite kinds of goods. They order again what they use up, buy what goes with their last
purchase, or choose among the popular goods of a favourite kind. So there are repeats, an order in time, and features
of items that help.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from recsys_ssm.data.cache import hash_values
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.data.sequences import SequenceSplits
from recsys_ssm.errors import UserError

VERSION = 1
"""Version of the generator: raise it when the same arguments give other data."""

KINDS = {
    "coffee": ("Coffee", 0.6),
    "tea": ("Tea", 0.6),
    "soap": ("Soap", 0.5),
    "paper": ("Paper", 0.4),
    "book": ("Book", 0.0),
    "game": ("Game", 0.0),
    "lamp": ("Lamp", 0.0),
    "tool": ("Tool", 0.1),
}
"""Kinds of goods: the beginning of their titles, and the probability of an order being one of the same goods again."""

_WORDS = (
    "Aurora",
    "Basalt",
    "Cedar",
    "Dune",
    "Ember",
    "Fjord",
    "Grove",
    "Harbour",
    "Iris",
    "Juniper",
)


class GeneratedShop(Interactions):
    """Histories of a generated shop's customers.

    Args:
        n_customers: Customers.
        n_items: Goods.
        mean_orders: Mean number of orders of a customer, at least 4.
        data_seed: Seed of the shop; ``seed`` is of the training's order alone, so that runs of several seeds share it.
        name, base: See :class:`~recsys_ssm.data.interactions.Interactions`.

    Raises:
        UserError: An option is not possible.
    """

    def __init__(
        self,
        *,
        n_customers: int = 400,
        n_items: int = 120,
        mean_orders: int = 12,
        data_seed: int = 0,
        name: str = "shop",
        **base: Any,
    ) -> None:
        for option, least, value in (
            ("n_customers", 10, n_customers),
            ("n_items", 2 * len(KINDS), n_items),
            ("mean_orders", 4, mean_orders),
            ("data_seed", 0, data_seed),
        ):
            if value < least:
                raise UserError(f"dataset.{option}={value}: give at least {least}")
        self.n_customers, self.n_items, self.mean_orders = n_customers, n_items, mean_orders
        self.data_seed = data_seed
        items = make_items(n_items, data_seed)
        own = {
            "interactions": make_orders(items, n_customers, mean_orders, data_seed),
            "items": items.drop("title"),
            "item_numeric": ["price"],
            "item_categorical": ["kind"],
            "titles": items.select("item_id", "title"),
            "item_title": "title",
        }
        super().__init__(name=name, **base | own)
        self.titles = items.select("item_id", "title")
        """Titles of the goods, for people."""

    def build(self) -> SequenceSplits:
        splits = super().build()
        splits.generated = True
        splits.notes.insert(0, f"generated data: a shop of {self.n_customers:,} customers")
        arguments = [self.n_customers, self.n_items, self.mean_orders, self.data_seed]
        splits.sources["shop"] = hash_values({"version": VERSION, "arguments": arguments})
        return splits


def make_items(n_items: int, seed: int) -> pl.DataFrame:
    """Return the goods: ``item_id``, ``title``, ``kind`` and ``price``, kind by kind."""
    rng = np.random.default_rng((seed, 0))
    kinds = sorted(list(KINDS)[i % len(KINDS)] for i in range(n_items))
    words = rng.integers(0, len(_WORDS), n_items)
    return pl.DataFrame(
        {
            "item_id": [f"g{i:04d}" for i in range(n_items)],
            "title": [
                f"{KINDS[kind][0]} {_WORDS[word]} no. {i}"
                for i, (kind, word) in enumerate(zip(kinds, words, strict=True))
            ],
            "kind": kinds,
            "price": np.round(np.exp(rng.normal(2.5, 0.6, n_items)), 2),
        }
    )


def make_orders(items: pl.DataFrame, n_customers: int, mean_orders: int, seed: int) -> pl.DataFrame:
    """Return the orders, by customer and time: ``user_id``, ``item_id`` and ``timestamp`` (seconds since 1970)."""
    rng = np.random.default_rng((seed, 1))
    kinds = items["kind"].to_list()
    names = list(KINDS)
    goods = {kind: [i for i, one in enumerate(kinds) if one == kind] for kind in names}
    weights = {kind: _weights(len(goods[kind])) for kind in names}
    users: list[str] = []
    bought: list[int] = []
    times: list[int] = []
    for customer in range(n_customers):
        favourites = rng.choice(names, size=3, replace=False)
        when = 1_700_000_000 + int(rng.integers(0, 200 * 86_400))
        mine: list[int] = []
        for _ in range(4 + int(rng.poisson(mean_orders - 4))):
            kind = str(favourites[min(int(rng.geometric(0.5)) - 1, 2)])
            of_kind = goods[kind]
            before = [item for item in mine if kinds[item] == kind]
            if before and rng.random() < KINDS[kind][1]:
                item = before[-1]
            elif mine and rng.random() < 0.4:  # what goes with the last purchase
                of_kind = goods[kinds[mine[-1]]]
                item = of_kind[(of_kind.index(mine[-1]) + 1) % len(of_kind)]
            else:
                item = of_kind[int(rng.choice(len(of_kind), p=weights[kind]))]
            when += 3600 + int(rng.exponential(5 * 86_400))
            mine.append(item)
            times.append(when)
        users += [f"c{customer:04d}"] * len(mine)
        bought += mine
    ids = items["item_id"]
    return pl.DataFrame({"user_id": users, "item_id": ids.gather(bought), "timestamp": times})


def _weights(n: int) -> np.ndarray:
    """Return how popular the n goods of a kind are, the first most; they sum to 1."""
    weight = 1 / np.arange(2, n + 2)
    shares: np.ndarray = weight / weight.sum()
    return shares
