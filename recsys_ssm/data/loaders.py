"""Load batches in an order that depends on (seed, epoch) alone, and resume within an epoch."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Generic, TypeVar

import numpy as np

Batch = TypeVar("Batch")


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
