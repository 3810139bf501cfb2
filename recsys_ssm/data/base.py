"""Define the DataModule that every dataset is."""

from __future__ import annotations

import abc
import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import lightning as L
import numpy as np
from torch import Tensor

from recsys_ssm.data.cache import hash_values
from recsys_ssm.errors import UserError


class PreparedSplits(Protocol):
    """Members that the prepared data of every dataset has."""

    item_ids: list[str]
    notes: list[str]
    generated: bool
    sources: dict[str, str]


Splits = TypeVar("Splits", bound=PreparedSplits)


class RecommenderData(L.LightningDataModule, abc.ABC, Generic[Splits]):
    """A dataset, as commands and models use it.

    Args:
        name: Name of the dataset in runs and results.
        seed: Seed of all that is sampled: users, pairs, splits, order.
        num_workers: Processes that make batches ahead; 0: batches are made in the training process.

    Raises:
        UserError: The number of workers is negative.
    """

    label: ClassVar[str | None] = None
    """Display name in reports; None: the name."""
    grid: ClassVar[tuple[str, ...]] = ()
    """Options that span a grid of tasks in reports, ``("k", "n_messages")``; a report has a figure over the grid."""

    name: str
    seed: int

    def __init__(self, name: str, seed: int, num_workers: int = 0) -> None:
        super().__init__()
        if num_workers < 0:
            raise UserError(f"dataset.num_workers={num_workers}: give 0 or more")
        self.name, self.seed, self.num_workers = name, seed, num_workers
        self._splits: Splits | None = None
        # Of a few rows or users a process may have none.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @abc.abstractmethod
    def build(self) -> Splits:
        """Read or sample the data; the result depends on the constructor's arguments alone."""

    @property
    def splits(self) -> Splits:
        """The prepared data, built at the first use."""
        if self._splits is None:
            self._splits = self.build()
        return self._splits

    @property
    def sources(self) -> dict[str, str]:
        """The sha256 of each input: by its path, by its argument (data frames), or of the generator's arguments."""
        return self.splits.sources

    def setup(self, stage: str | None = None) -> None:
        _ = self.splits

    @abc.abstractmethod
    def item_counts(self) -> Tensor:
        """Return the training interactions of each item, its popularity: (I,) int64."""

    @abc.abstractmethod
    def baseline_metrics(self, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return test metrics of methods simpler than a model (or of an oracle) by their names."""

    @abc.abstractmethod
    def identity(self) -> dict[str, str]:
        """Return a hash of the items, of the users, and of the split, by name: a model fits data with the same ones."""

    def _shard(self) -> dict[str, Any]:
        """Return the number of this process among those that share the data."""
        if self.trainer is None:
            return {}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _loading(self) -> dict[str, Any]:
        """Return the loaders' options: workers as configured, pinned memory if batches go to a CUDA device."""
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {"num_workers": self.num_workers, "pin_memory": on_cuda}

    def _hash_arguments(self, version: int, files: Sequence[Path] = ()) -> str:
        """Return the sha256 of a generated dataset's arguments and seed.

        Every argument of the dataset's own constructor must be an attribute of the same name.

        Args:
            version: Version of the generator.
            files: Small files that the generator reads.
        """
        names = {"seed"}
        for kind in type(self).__mro__:
            if "build" not in vars(kind) or inspect.isabstract(kind):
                continue
            names |= {
                name
                for name, parameter in inspect.signature(kind).parameters.items()
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY
            }
        arguments = {name: getattr(self, name) for name in names}
        contents = [path.read_bytes().hex() for path in files]
        return hash_values({"version": version, "arguments": arguments, "files": contents})


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
