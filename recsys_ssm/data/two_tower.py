"""Prepare datasets of user-item pairs with features: arrays, batches that are slices of them, and the DataModule.

A two-tower dataset is a subclass of :class:`TwoTowerData` in a file of its own; its ``build`` returns
:class:`TwoTowerSplits`. Batches, order, shards and resuming are here.

Legend: N pairs, B of them in a batch; U users to rank for; I items in the catalogue.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_ssm.batches import PairBatch, Ragged, RankingBatch, UserBatch
from recsys_ssm.data.base import RecommenderData, content_hash
from recsys_ssm.data.loaders import BlockLoader, ResumableLoader
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.metrics import RankingMetrics


class Pairs(NamedTuple):
    """Triplets (user, item, target) as three arrays of one length N."""

    user: Tensor
    item: Tensor
    target: Tensor


@dataclass(frozen=True)
class Ranking:
    """Users to rank the catalogue for, and the items that are relevant to each."""

    user: Tensor
    """(U,) int64, rows of the user table."""
    relevant: Ragged
    seen: Ragged | None = None


Baseline = Callable[[Tensor], Tensor]
"""Scores of a simpler method or of an oracle: from rows of the user table (U,) to scores (U, I).

Prepared data is pickled for the processes of ``ddp_spawn``: a baseline is an object or a partial, not a lambda.
"""


@dataclass(frozen=True)
class ByCount:
    """A baseline: the scores (I,) of the items, the same for every user."""

    counts: Tensor

    def __call__(self, user: Tensor) -> Tensor:
        return self.counts.expand(user.numel(), -1)


@dataclass(frozen=True)
class AtRandom:
    """A baseline: random scores of so many items."""

    n_items: int

    def __call__(self, user: Tensor) -> Tensor:
        return random_scores(user, self.n_items)


@dataclass
class TwoTowerSplits:
    """Prepared data of a two-tower dataset."""

    users: Features
    items: Features
    item_ids: list[str]
    """Ids of the catalogue in its order, which also resolves ties."""
    user_schema: FeatureSchema
    item_schema: FeatureSchema
    train: Pairs
    val: Pairs
    val_ranking: Ranking
    test_ranking: Ranking
    user_ids: pl.Series | None = None
    """(U,) names of the users; None: they have none."""
    item_counts: Tensor | None = None
    """(I,) int64, positive training pairs of each item; None: they are those with a target above ``relevant_above``."""
    relevant_above: float = 0.0
    """A pair is relevant if its target is above this."""
    seen: Ragged | None = None
    """Items of each user's training rows, not to recommend again; None: those of the relevant training pairs."""
    baselines: dict[str, Baseline] = field(default_factory=dict)
    """Baselines to print beside the model; ``random`` and ``popularity`` are added."""
    notes: list[str] = field(default_factory=list)
    """Lines on what was read, what was dropped and why."""
    generated: bool = False
    """True for generated data in place of real files; the run's name, logs and results then say so."""
    sources: dict[str, str] = field(default_factory=dict)
    """The sha256 of each input: by its path, by its argument (data frames), or of the generator's arguments."""

    def __post_init__(self) -> None:
        n_items = len(self.item_ids)
        if self.test_ranking.user.numel() == 0:
            raise UserError(
                "no test user is left: lower the dataset's minimum of relevant items, "
                "or give it more data"
            )
        if self.train.user.numel() == 0:
            raise UserError(
                "no training pair is left: give the dataset more interactions, "
                "or hold out fewer users"
            )
        if self.item_counts is None:
            positive = self.train.item[self.train.target > self.relevant_above]
            self.item_counts = torch.bincount(positive, minlength=n_items)
        self.baselines = {
            "random": AtRandom(n_items),
            "popularity": ByCount(self.item_counts.float()),
            **self.baselines,
        }


class PairLoader(ResumableLoader[PairBatch]):
    """Batches of pairs, gathered from prepared arrays.

    Args:
        users, items: Features of all users and of the catalogue.
        pairs: The pairs.
        batch_size: Pairs of a batch.
        loading: See :class:`~recsys_ssm.data.loaders.ResumableLoader`.
    """

    def __init__(
        self, users: Features, items: Features, pairs: Pairs, *, batch_size: int, **loading: Any
    ) -> None:
        super().__init__(**loading)
        self.users, self.items, self.pairs = users, items, pairs
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._share_size(self.pairs.user.numel()) // self.batch_size)

    def _begin(self, generator: np.random.Generator | None) -> Callable[[int], PairBatch]:
        n = self.pairs.user.numel()
        everything = np.arange(n) if generator is None else generator.permutation(n)
        order = torch.from_numpy(self._share(everything))

        return functools.partial(self._batch, order)

    def _batch(self, order: Tensor, position: int) -> PairBatch:
        index = order[position * self.batch_size : (position + 1) * self.batch_size]
        user, item = self.pairs.user[index], self.pairs.item[index]
        return PairBatch(
            self.users.rows(user), self.items.rows(item), self.pairs.target[index], user, item
        )


class RankingLoader(BlockLoader[RankingBatch]):
    """Blocks of users to rank for.

    Args:
        users: Features of all users.
        ranking: The users to rank for.
        n_items: Items of the catalogue.
        batch_size: Users of a batch.
        loading: See :class:`~recsys_ssm.data.loaders.BlockLoader`.
    """

    def __init__(
        self, users: Features, ranking: Ranking, n_items: int, *, batch_size: int, **loading: Any
    ) -> None:
        super().__init__(ranking.user.numel(), batch_size=batch_size, **loading)
        self.users, self.ranking, self.n_items = users, ranking, n_items

    def _block(self, start: int, stop: int) -> RankingBatch:
        user, seen = self.ranking.user[start:stop], self.ranking.seen
        return RankingBatch(
            self.users.rows(user),
            self.ranking.relevant.mask(start, stop, self.n_items),
            None if seen is None else seen.mask(start, stop, self.n_items),
            user,
        )


class UserLoader(BlockLoader[UserBatch]):
    """Blocks of users to recommend to.

    Args:
        users: Features of the users.
        seen: Items that each user had; None: they are not known.
        batch_size: Users of a batch.
        loading: See :class:`~recsys_ssm.data.loaders.BlockLoader`.
    """

    def __init__(
        self, users: Features, seen: Ragged | None, *, batch_size: int, **loading: Any
    ) -> None:
        super().__init__(users.n_rows, batch_size=batch_size, **loading)
        self.users, self.seen = users, seen

    def _block(self, start: int, stop: int) -> UserBatch:
        user = torch.arange(start, stop)
        return UserBatch(
            self.users.rows(slice(start, stop)),
            None if self.seen is None else self.seen.rows(user),
            user,
        )


class TwoTowerData(RecommenderData[TwoTowerSplits]):
    """DataModule of user-item pairs with features; a dataset implements :meth:`build`.

    Args:
        name: Name of the dataset in runs and results.
        seed: Seed of all that is sampled: users, pairs, splits, order.
        batch_size: Pairs of a training batch (on each process).
        eval_batch_size: Users to rank for at once; (eval_batch_size, I) scores are in memory.
        shuffle: Use a new order in each epoch. False gives the same batches again (``debug=overfit``).
        num_workers: Processes that make batches ahead; 0: batches are made in the training process.
    """

    def __init__(
        self,
        *,
        name: str,
        seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        shuffle: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(name, seed, num_workers)
        if batch_size < 1 or eval_batch_size < 1:
            raise UserError(
                f"dataset.batch_size={batch_size}, dataset.eval_batch_size={eval_batch_size}: "
                "give at least 1"
            )
        self.batch_size, self.eval_batch_size, self.shuffle = batch_size, eval_batch_size, shuffle

    def train_dataloader(self) -> PairLoader:
        return self._pairs(self.splits.train, self.batch_size, self.shuffle)

    def val_dataloader(self) -> list[Any]:
        """Return two loaders: pairs (for the loss) and users (for the ranking metrics)."""
        splits = self.splits
        return [
            self._pairs(splits.val, max(self.batch_size, self.eval_batch_size), False),
            self._ranking(splits.val_ranking),
        ]

    def test_dataloader(self) -> RankingLoader:
        return self._ranking(self.splits.test_ranking)

    def predict_dataloader(self) -> UserLoader:
        """Return a loader of all users, for recommendations; items of their training rows are seen, as in the test."""
        splits = self.splits
        seen = splits.seen
        if seen is None:
            mine = splits.train.target > splits.relevant_above
            seen = Ragged.from_pairs(
                splits.train.user[mine], splits.train.item[mine], splits.users.n_rows
            )
        return UserLoader(
            splits.users, seen, batch_size=self.eval_batch_size, **self._shard(), **self._loading()
        )

    def clean_users(self, users: pl.DataFrame, where: str) -> pl.DataFrame:
        """Return a table of users as the dataset reads its own.

        Args:
            users: A row for each user, cells as in the file.
            where: Name of the table in messages.
        """
        return users

    def item_counts(self) -> Tensor:
        """Return the number of positive training pairs of each item, (I,) int64."""
        assert self.splits.item_counts is not None, "set by TwoTowerSplits"
        return self.splits.item_counts

    def identity(self) -> dict[str, str]:
        """Return hashes of the items, of the users' columns, and of the pairs that are trained on."""
        splits = self.splits
        return {
            "items": content_hash(splits.item_ids, json.dumps(splits.item_schema.to_dict())),
            "users": content_hash(json.dumps(splits.user_schema.to_dict())),
            "split": content_hash(*splits.train, splits.test_ranking.user),
        }

    def baseline_metrics(self, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return test metrics of the baselines: random, popularity, an oracle where there is one."""
        splits = self.splits
        results = {}
        for name, scores in splits.baselines.items():
            # Every process ranks for all users here, so there is nothing to sum over processes.
            ranking = RankingMetrics(
                metrics,
                n_items=len(splits.item_ids),
                item_counts=self.item_counts(),
                sync_on_compute=False,
            )
            for batch in RankingLoader(
                splits.users,
                splits.test_ranking,
                len(splits.item_ids),
                batch_size=self.eval_batch_size,
            ):
                ranking.update(scores(batch.user_index), batch.relevant, batch.seen)
            results[name] = {metric: float(value) for metric, value in ranking.compute().items()}
        return results

    def _pairs(self, pairs: Pairs, batch_size: int, shuffle: bool) -> PairLoader:
        return PairLoader(
            self.splits.users,
            self.splits.items,
            pairs,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **self._shard(),
            **self._loading(),
        )

    def _ranking(self, ranking: Ranking) -> RankingLoader:
        return RankingLoader(
            self.splits.users,
            ranking,
            len(self.splits.item_ids),
            batch_size=self.eval_batch_size,
            **self._shard(),
            **self._loading(),
        )


# splitmix64's constants as signed integers, since torch multiplies those.
_MIX = ((32, -0x61C8864680B583EB), (30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))


def random_scores(user: Tensor, n_items: int) -> Tensor:
    """Return (U, I) random scores in [0, 1) that depend on the user row and the item alone.

    Scores from a generator would change with the evaluation batch size and the number of processes. These are the
    number of each pair, mixed as in splitmix64.
    """
    x_UI = user.cpu()[:, None] * n_items + torch.arange(n_items) + 1
    for shift, factor in _MIX:
        x_UI = (x_UI ^ (x_UI >> shift)) * factor
    return (x_UI ^ (x_UI >> 31)).float() / 2**63


def sample_negatives(
    positives: Ragged, user: np.ndarray, n_items: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw an item for each entry of ``user`` (N,), uniformly among those not in the user's ``positives``.

    The draw is exact and needs no rejection. The item of rank r among those a user lacks is r plus the number of the
    user's items t_i (sorted, i = 0, 1, …) with t_i - i <= r. One search over all users' keys at once finds that number.

    Args:
        positives: Items of each user, none twice.
        user: Users to draw for.
        n_items: Items of the catalogue.
        generator: Random numbers.

    Raises:
        UserError: A user has the whole catalogue.
    """
    lengths, offsets = positives.lengths.numpy(), positives.offsets.numpy()
    room = n_items - lengths[user]
    if room.size and room.min() <= 0:
        raise UserError(
            "a user interacted with every item of the catalogue, so no negative can be drawn: "
            "enlarge the catalogue or set negatives to 0"
        )
    rank = generator.integers(0, room)
    owner = np.repeat(np.arange(lengths.size), lengths)
    taken = np.sort(owner * n_items + positives.values.numpy()) - owner * n_items
    keys = owner * (n_items + 1) + taken - (np.arange(taken.size) - offsets[owner])
    return rank + np.searchsorted(keys, user * (n_items + 1) + rank, side="right") - offsets[user]


def split_users(
    candidates: Sequence[int] | np.ndarray, sizes: Sequence[int], generator: np.random.Generator
) -> list[np.ndarray]:
    """Split candidates into disjoint random groups of ``sizes`` (smaller if there are too few), each sorted."""
    order = generator.permutation(np.asarray(candidates, dtype=np.int64))
    edges = np.cumsum([0, *sizes])
    return [np.sort(order[a:b]) for a, b in itertools.pairwise(edges)]
