"""Load batches in an order that depends on (seed, epoch) alone, and resume within an epoch.

A batch is a pure function of seed, epoch and position. So worker processes can make batches ahead of the training
process, and a checkpoint needs no more than the epoch and the position of the next batch. The number of workers may
differ when it is resumed.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from recsys_ssm.errors import UserError

Batch = TypeVar("Batch")


class BatchLoader(abc.ABC, Generic[Batch]):
    """An iterable of prepared batches, which Lightning accepts as it is.

    Args:
        num_workers: Processes that make batches ahead; 0: batches are made in the training process.
        pin_memory: Copy batches to pinned memory, from which they reach a GPU while it computes.

    Raises:
        UserError: The number of workers is negative.
    """

    def __init__(self, *, num_workers: int = 0, pin_memory: bool = False) -> None:
        if num_workers < 0:
            raise UserError(f"dataset.num_workers={num_workers}: give 0 or more")
        self.num_workers, self.pin_memory = num_workers, pin_memory

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of batches of an epoch, the same in every epoch."""

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of an epoch."""

    def _load(self, batch_at: Callable[[int], Batch], start: int = 0) -> Iterator[Batch]:
        """Make the batches from position ``start`` on, with workers and pinned memory as configured.

        Args:
            batch_at: Function that makes the batch at a position; picklable, for workers.
            start: First position.
        """
        positions = range(start, len(self))
        if not (self.num_workers or self.pin_memory):
            yield from map(batch_at, positions)
            return
        yield from DataLoader(
            _Batches(batch_at),
            batch_size=None,
            sampler=positions,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # the global one is for the model
        )


class _Batches(Dataset[Batch]):
    """Batches by position, for PyTorch's DataLoader."""

    def __init__(self, batch_at: Callable[[int], Batch]) -> None:
        self.batch_at = batch_at

    def __getitem__(self, position: int) -> Batch:
        return self.batch_at(position)


def _unchanged(batch: Batch) -> Batch:
    return batch


class ResumableLoader(BatchLoader[Batch]):
    """Batches whose order depends on (seed, epoch) alone.

    The state is the epoch and the position of the next batch. It is saved in checkpoints: a run that was killed within
    an epoch continues with the next batch. Without a loaded state, a new iteration restarts the epoch. Each of several
    processes takes every ``world_size``-th element. In shuffled epochs the remainder that does not divide evenly among
    processes is dropped.

    Args:
        shuffle: Use a new order in each epoch.
        seed: Seed of the orders.
        rank, world_size: Number of this process, and of processes.
        num_workers, pin_memory: See :class:`BatchLoader`.
    """

    def __init__(
        self,
        *,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(num_workers=num_workers, pin_memory=pin_memory)
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self._epoch = 0
        self._position = 0
        self._resumed = False

    @abc.abstractmethod
    def _begin(self, generator: np.random.Generator | None) -> Callable[[int], Batch]:
        """Settle an epoch's order; return the function that makes the batch at a position, which can be pickled.

        Args:
            generator: Random numbers of this epoch; None: no shuffling.
        """

    def _share(self, order: np.ndarray) -> np.ndarray:
        """Return the part of ``order`` that this process takes."""
        if self.shuffle:
            order = order[: order.size - order.size % self.world_size]
        return order[self.rank :: self.world_size]

    def _share_size(self, n: int) -> int:
        """Return the length of :meth:`_share` of n elements."""
        if self.shuffle:
            n -= n % self.world_size
        return len(range(self.rank, n, self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        epoch, n_batches = self._epoch, len(self)
        generator = np.random.default_rng((self.seed, epoch)) if self.shuffle else None
        batch_at = self._begin(generator)
        start, self._resumed = self._position if self._resumed else 0, False
        for position, batch in enumerate(self._load(batch_at, start), start):
            # The state moves on before the batch is yielded: a checkpoint is written while the batch
            # is in use, and Lightning never asks for one after the last.
            last = position + 1 == n_batches
            self._epoch, self._position = (epoch + 1, 0) if last else (epoch, position + 1)
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``, unless the loader is in that epoch already."""
        if epoch != self._epoch:
            self._epoch, self._position, self._resumed = epoch, 0, False

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Return the object in which Lightning looks for a ``sampler`` to call ``set_epoch`` on."""
        return SimpleNamespace(sampler=self)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._position, self._resumed = state["epoch"], state["position"], True


class BlockLoader(BatchLoader[Batch]):
    """Batches of consecutive elements in their order, without shuffling.

    Each process takes a contiguous share; no element is padded, left out or taken twice. A process whose share is empty
    makes one empty batch, since all processes take part in the sums over them.

    Args:
        n: Number of elements.
        batch_size: Elements of a batch.
        rank, world_size: Number of this process, and of processes.
        num_workers, pin_memory: See :class:`BatchLoader`.
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(num_workers=num_workers, pin_memory=pin_memory)
        self.n, self.batch_size = n, batch_size
        self._least = int(world_size > 1)
        self._start, self._stop = n * rank // world_size, n * (rank + 1) // world_size

    @abc.abstractmethod
    def _block(self, start: int, stop: int) -> Batch:
        """Make the batch of the elements from ``start`` to ``stop``."""

    def __len__(self) -> int:
        return max(self._least, -(-(self._stop - self._start) // self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        return self._load(self._at)

    def _at(self, position: int) -> Batch:
        start = self._start + position * self.batch_size
        return self._block(start, min(start + self.batch_size, self._stop))


class PartLoader(BatchLoader[Batch]):
    """Batches of some parts of the elements, a part after another; no batch has elements of two parts.

    So a batch does not depend on which parts are loaded, nor on how many processes share them.

    Args:
        blocks: Loader of all elements.
        parts: Numbers of the parts: part p has the elements from ``p * part_size``.
        part_size: Elements of a part; the last may have fewer.
    """

    def __init__(self, blocks: BlockLoader[Batch], parts: Sequence[int], part_size: int) -> None:
        super().__init__(num_workers=blocks.num_workers, pin_memory=blocks.pin_memory)
        self.blocks = blocks
        self.spans = [
            (start, min(start + blocks.batch_size, (part + 1) * part_size, blocks.n))
            for part in parts
            for start in range(
                part * part_size, min((part + 1) * part_size, blocks.n), blocks.batch_size
            )
        ]

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[Batch]:
        return self._load(self._at)

    def _at(self, position: int) -> Batch:
        return self.blocks._block(*self.spans[position])
