"""Define the DataModule that every dataset is."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import lightning as L
import numpy as np
from torch import Tensor

Splits = TypeVar("Splits")


class RecommenderData(L.LightningDataModule, abc.ABC, Generic[Splits]):
    """What the doors ask of a dataset, whatever it is of.

    Args:
        name: What runs and results are called after.
        seed: Of everything that is sampled: users, pairs, splits, order.
    """

    label: ClassVar[str | None] = None
    """Display name in reports; None: the name."""
    grid: ClassVar[tuple[str, ...]] = ()
    """Options that span a grid of tasks in reports, ``("k", "n_messages")``; a report has a figure over the grid."""

    name: str
    seed: int

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        self.name, self.seed = name, seed
        self._splits: Splits | None = None

    @abc.abstractmethod
    def build(self) -> Splits:
        """Read or sample everything; deterministic in the constructor's arguments."""

    @property
    def splits(self) -> Splits:
        """The prepared data, built at the first use: ``item_ids``, ``notes``, ``generated`` and what it is of."""
        if self._splits is None:
            self._splits = self.build()
        return self._splits

    def setup(self, stage: str | None = None) -> None:
        _ = self.splits

    @abc.abstractmethod
    def item_counts(self) -> Tensor:
        """(I,) int64, training interactions of each item: its popularity."""

    @abc.abstractmethod
    def baseline_metrics(self, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
        """Test metrics of what is simpler than a model (or of an oracle), by its name."""

    @abc.abstractmethod
    def identity(self) -> dict[str, str]:
        """Return a hash of the items, of the users, and of the split, by name: a model fits data with the same ones."""

    def _shard(self) -> dict[str, int]:
        """Which of the processes that share the data this is."""
        if self.trainer is None:
            return {}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}


def content_hash(*parts: Any) -> str:
    """Return a hash of texts, sequences of texts, series, arrays and tensors, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.shape}{part.dtype.kind}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            texts = [part] if isinstance(part, str) else part
            digest.update("\0".join(map(str, texts)).encode())
        digest.update(b"\1")
    return digest.hexdigest()[:16]
