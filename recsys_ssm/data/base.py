"""What every dataset shares (loaders that resume), and every two-tower one: arrays, slices, the DataModule.

A two-tower dataset is one file: a subclass of :class:`TwoTowerData` whose ``build`` returns
:class:`TwoTowerSets`. The rest (batches, order, shards, resuming) is here, once.

Legend: N pairs, B of them in a batch; U users to rank for; I items in the catalogue.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.metrics import RankingMetrics

Batch = TypeVar("Batch")


class PairBatch(NamedTuple):
    """One training or validation batch of (user, item, target)."""

    user: Features
    item: Features
    target: Tensor
    """(B,) float32."""
    user_index: Tensor
    """(B,) int64, row of the user table."""
    item_index: Tensor
    """(B,) int64, row of the catalogue."""


class RankingBatch(NamedTuple):
    """Users for whom the whole catalogue is ranked."""

    user: Features
    relevant: Tensor
    """(U, I) bool."""
    seen: Tensor | None
    """(U, I) bool, items not to recommend (seen in training); None: every item may be."""
    user_index: Tensor
    """(U,) int64, row of the user table."""


class Pairs(NamedTuple):
    """(user, item, target) triplets as three arrays of one length N."""

    user: Tensor
    item: Tensor
    target: Tensor


@dataclass(frozen=True)
class Ragged:
    """A list of item rows for each user: ``values[offsets[u]:offsets[u + 1]]``."""

    values: Tensor
    offsets: Tensor

    @classmethod
    def from_pairs(cls, user: Tensor, item: Tensor, n_users: int) -> Ragged:
        """Group ``item`` (N,) by ``user`` (N,) in ``range(n_users)``; a user's keep their order."""
        order = torch.argsort(user, stable=True)
        offsets = torch.zeros(n_users + 1, dtype=torch.long)
        offsets[1:] = torch.bincount(user, minlength=n_users).cumsum(0)
        return cls(item[order], offsets)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Ragged:
        """From a (U, I) bool matrix."""
        user, item = mask.nonzero(as_tuple=True)
        return cls.from_pairs(user, item, mask.shape[0])

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def to(self, device: torch.device | str) -> Ragged:
        return Ragged(self.values.to(device), self.offsets.to(device))

    def mask(self, start: int, stop: int, n_items: int) -> Tensor:
        """Users ``start`` to ``stop`` as a (stop - start, I) bool matrix."""
        mask = torch.zeros(stop - start, n_items, dtype=torch.bool)
        rows = torch.repeat_interleave(torch.arange(stop - start), self.lengths[start:stop])
        mask[rows, self.values[self.offsets[start] : self.offsets[stop]]] = True
        return mask


@dataclass(frozen=True)
class Ranking:
    """Users to rank the catalogue for, and what is relevant to each."""

    user: Tensor
    """(U,) int64, rows of the user table."""
    relevant: Ragged
    seen: Ragged | None = None


Baseline = Callable[[Tensor], Tensor]
"""Scores of something simpler (or of an oracle): rows of the user table (U,) to scores (U, I)."""


@dataclass
class TwoTowerSets:
    """A dataset, prepared: what ``build`` returns."""

    users: Features
    items: Features
    item_ids: list[str]
    """What a recommendation is called, in catalogue order (the order that resolves ties)."""
    user_schema: FeatureSchema
    item_schema: FeatureSchema
    train: Pairs
    val: Pairs
    val_ranking: Ranking
    test_ranking: Ranking
    baselines: dict[str, Baseline] = field(default_factory=dict)
    """Printed beside the model; ``random`` and ``popularity`` are added to what a dataset gives."""
    notes: list[str] = field(default_factory=list)
    """What was read, dropped and why, a line each."""
    generated: bool = False
    """Stand-in data: the run's name, logs and results then say so."""

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
        counts = torch.bincount(self.train.item[self.train.target > 0], minlength=n_items).float()
        self.baselines = {
            "random": lambda user: random_scores(user, n_items),
            "popularity": lambda user: counts.expand(user.numel(), -1),
            **self.baselines,
        }


class ResumableLoader(abc.ABC, Generic[Batch]):
    """Batches whose order depends on (seed, epoch) alone; a plain iterable Lightning takes as it is.

    The state is the batch that comes next (epoch, position) and travels in the checkpoint: a run
    that was killed in the middle of an epoch goes on with the next batch. Without a loaded state,
    iterating anew begins the epoch anew. With several processes each takes every ``world_size``-th
    of what there is; the last, incomplete round is left out of a shuffled epoch so that all take
    the same number of steps.
    """

    def __init__(self, *, shuffle: bool, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self._epoch = 0
        self._position = 0
        self._resumed = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """Batches an epoch, the same in every one."""

    @abc.abstractmethod
    def _begin(self, generator: np.random.Generator | None) -> Callable[[int], Batch]:
        """Settle an epoch's order; what is returned makes the batch at a position.

        Args:
            generator: Of this epoch; None: no shuffling.
        """

    def _share(self, order: np.ndarray) -> np.ndarray:
        """What of ``order`` this process takes."""
        if self.shuffle:
            order = order[: order.size - order.size % self.world_size]
        return order[self.rank :: self.world_size]

    def _share_size(self, n: int) -> int:
        """The length of :meth:`_share` of n."""
        if self.shuffle:
            n -= n % self.world_size
        return len(range(self.rank, n, self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        epoch, n_batches = self._epoch, len(self)
        generator = np.random.default_rng((self.seed, epoch)) if self.shuffle else None
        batch_at = self._begin(generator)
        start, self._resumed = self._position if self._resumed else 0, False
        for position in range(start, n_batches):
            # The state moves on before the batch is given out: a checkpoint is written while the
            # batch is in use, and whoever counts the batches never asks for one after the last.
            last = position + 1 == n_batches
            self._epoch, self._position = (epoch + 1, 0) if last else (epoch, position + 1)
            yield batch_at(position)

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch`` unless the loader is in it already; so an epoch cut short is left."""
        if epoch != self._epoch:
            self._epoch, self._position, self._resumed = epoch, 0, False

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for a ``sampler`` to call ``set_epoch`` on before each epoch."""
        return SimpleNamespace(sampler=self)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._position, self._resumed = state["epoch"], state["position"], True


class PairLoader(ResumableLoader[PairBatch]):
    """Batches of pairs, gathered from prepared arrays."""

    def __init__(
        self,
        users: Features,
        items: Features,
        pairs: Pairs,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        self.users, self.items, self.pairs = users, items, pairs
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._share_size(self.pairs.user.numel()) // self.batch_size)

    def _begin(self, generator: np.random.Generator | None) -> Callable[[int], PairBatch]:
        n = self.pairs.user.numel()
        everything = np.arange(n) if generator is None else generator.permutation(n)
        order = torch.from_numpy(self._share(everything))

        def batch_at(position: int) -> PairBatch:
            index = order[position * self.batch_size : (position + 1) * self.batch_size]
            user, item = self.pairs.user[index], self.pairs.item[index]
            return PairBatch(
                self.users.rows(user), self.items.rows(item), self.pairs.target[index], user, item
            )

        return batch_at


class RankingLoader:
    """Blocks of users to rank for.

    Each process takes a contiguous share; no user is padded, left out or counted twice.
    """

    def __init__(
        self,
        users: Features,
        ranking: Ranking,
        n_items: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.users, self.ranking = users, ranking
        self.n_items, self.batch_size = n_items, batch_size
        n = ranking.user.numel()
        self._start, self._stop = n * rank // world_size, n * (rank + 1) // world_size

    def __len__(self) -> int:
        return -(-(self._stop - self._start) // self.batch_size)

    def __iter__(self) -> Iterator[RankingBatch]:
        for start in range(self._start, self._stop, self.batch_size):
            stop = min(start + self.batch_size, self._stop)
            user = self.ranking.user[start:stop]
            seen = self.ranking.seen
            yield RankingBatch(
                self.users.rows(user),
                self.ranking.relevant.mask(start, stop, self.n_items),
                None if seen is None else seen.mask(start, stop, self.n_items),
                user,
            )


Sets = TypeVar("Sets")


class RecommenderData(L.LightningDataModule, abc.ABC, Generic[Sets]):
    """What the doors ask of a dataset, whatever it is of.

    Args:
        name: What runs and results are called after.
        seed: Of everything that is sampled: users, pairs, splits, order.
    """

    name: str
    seed: int

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        self.name, self.seed = name, seed
        self._sets: Sets | None = None

    @abc.abstractmethod
    def build(self) -> Sets:
        """Read or sample everything; deterministic in the constructor's arguments."""

    @property
    def sets(self) -> Sets:
        """The prepared data, built at the first use: ``item_ids``, ``notes``, ``generated`` and what it is of."""
        if self._sets is None:
            self._sets = self.build()
        return self._sets

    def setup(self, stage: str | None = None) -> None:
        _ = self.sets

    @abc.abstractmethod
    def item_counts(self) -> Tensor:
        """(I,) int64, training interactions of each item: its popularity."""

    @abc.abstractmethod
    def baseline_metrics(self, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
        """Test metrics of what is simpler than a model (or of an oracle), by its name."""

    def _shard(self) -> dict[str, int]:
        """Which of the processes that share the data this is."""
        if self.trainer is None:
            return {}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}


class TwoTowerData(RecommenderData[TwoTowerSets]):
    """DataModule of user-item pairs with features; a dataset implements :meth:`build`.

    Args:
        name: What runs and results are called after.
        seed: Of everything that is sampled: users, pairs, splits, order.
        batch_size: Pairs a training batch (on each process).
        eval_batch_size: Users ranked at once; (eval_batch_size, I) scores are held.
        shuffle: A new order each epoch; off to see the same batches again (``debug=overfit``).
    """

    def __init__(
        self,
        *,
        name: str,
        seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        shuffle: bool = True,
    ) -> None:
        super().__init__(name, seed)
        if batch_size < 1 or eval_batch_size < 1:
            raise UserError(
                f"dataset.batch_size={batch_size}, dataset.eval_batch_size={eval_batch_size}: "
                "give at least 1"
            )
        self.batch_size, self.eval_batch_size, self.shuffle = batch_size, eval_batch_size, shuffle

    def train_dataloader(self) -> PairLoader:
        return self._pairs(self.sets.train, self.batch_size, self.shuffle)

    def val_dataloader(self) -> list[Any]:
        """Two loaders: pairs (for the loss) and users (for the ranking metrics)."""
        sets = self.sets
        return [
            self._pairs(sets.val, max(self.batch_size, self.eval_batch_size), False),
            self._ranking(sets.val_ranking),
        ]

    def test_dataloader(self) -> RankingLoader:
        return self._ranking(self.sets.test_ranking)

    def item_counts(self) -> Tensor:
        """(I,) int64, positive training pairs of each item."""
        train = self.sets.train
        return torch.bincount(train.item[train.target > 0], minlength=len(self.sets.item_ids))

    def baseline_metrics(self, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
        """Test metrics of the dataset's baselines: random, popularity, an oracle where there is one."""
        sets = self.sets
        results = {}
        for name, scores in sets.baselines.items():
            # Every process sees all users here: there is nothing to add up.
            ranking = RankingMetrics(metrics, n_items=len(sets.item_ids), sync_on_compute=False)
            for batch in RankingLoader(
                sets.users, sets.test_ranking, len(sets.item_ids), batch_size=self.eval_batch_size
            ):
                ranking.update(scores(batch.user_index), batch.relevant, batch.seen)
            results[name] = {metric: float(value) for metric, value in ranking.compute().items()}
        return results

    def _pairs(self, pairs: Pairs, batch_size: int, shuffle: bool) -> PairLoader:
        return PairLoader(
            self.sets.users,
            self.sets.items,
            pairs,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            **self._shard(),
        )

    def _ranking(self, ranking: Ranking) -> RankingLoader:
        return RankingLoader(
            self.sets.users,
            ranking,
            len(self.sets.item_ids),
            batch_size=self.eval_batch_size,
            **self._shard(),
        )


# splitmix64's odd constants as signed integers, which is what torch multiplies.
_MIX = ((32, -0x61C8864680B583EB), (30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))


def random_scores(user: Tensor, n_items: int) -> Tensor:
    """(U, I) scores in [0, 1) without meaning, a function of the user row and the item alone.

    A generator's would change with the evaluation batch size and the number of processes; this is
    a finaliser in the manner of splitmix64 over the pair's number.
    """
    x_UI = user.cpu()[:, None] * n_items + torch.arange(n_items) + 1
    for shift, factor in _MIX:
        x_UI = (x_UI ^ (x_UI >> shift)) * factor
    return (x_UI ^ (x_UI >> 31)).float() / 2**63


def sample_negatives(
    positives: Ragged, user: np.ndarray, n_items: int, generator: np.random.Generator
) -> np.ndarray:
    """For each entry of ``user`` (N,) an item, uniform among those not in the user's ``positives``.

    Exact and without rejection: the item of rank r among those a user lacks is r plus the number of
    his items t_i (sorted, i = 0, 1, …) with t_i - i <= r; one search over all users' keys at once
    finds that number.

    Args:
        positives: Each user's items, none twice.

    Raises:
        UserError: A user already has the whole catalogue.
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
    """Disjoint random groups of the given sizes (less when the candidates run out), each sorted."""
    order = generator.permutation(np.asarray(candidates, dtype=np.int64))
    edges = np.cumsum([0, *sizes])
    return [np.sort(order[a:b]) for a, b in itertools.pairwise(edges)]
