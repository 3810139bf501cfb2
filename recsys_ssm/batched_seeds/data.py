"""The data of several seeds side by side, for models that are trained at once (:mod:`recsys_ssm.batched_seeds.model`).

Legend: K seeds, B pairs in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch.utils._pytree import tree_map

from recsys_ssm.batches import PairBatch
from recsys_ssm.data.two_tower import PairLoader, TwoTowerData
from recsys_ssm.errors import UserError


class StackedLoader:
    """The next batch of each seed, stacked: every tensor (K, B, …).

    Each seed's loader keeps its own order and its own state; all are as long.
    """

    def __init__(self, loaders: Sequence[PairLoader]) -> None:
        self.loaders = list(loaders)

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[PairBatch]:
        for batches in zip(*self.loaders, strict=True):
            yield tree_map(lambda *tensors: torch.stack(tensors), *batches)

    def set_epoch(self, epoch: int) -> None:
        for loader in self.loaders:
            loader.set_epoch(epoch)

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for a ``sampler`` to call ``set_epoch`` on before each epoch."""
        return SimpleNamespace(sampler=self)

    def state_dict(self) -> dict[str, Any]:
        return {"loaders": [loader.state_dict() for loader in self.loaders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for loader, own in zip(self.loaders, state["loaders"], strict=True):
            loader.load_state_dict(own)


class SeedsData(L.LightningDataModule):
    """K datasets of one kind, each sampled from a seed of its own.

    Training batches are stacked; validation goes through the seeds one after the other, two loaders each.

    Args:
        parts: One a seed.

    Raises:
        UserError: The seeds have unequal numbers of training pairs, so that their epochs end apart.
    """

    def __init__(self, parts: Sequence[TwoTowerData]) -> None:
        super().__init__()
        self.parts = list(parts)
        sizes = {part.seed: part.splits.train.user.numel() for part in self.parts}
        first = self.parts[0]
        for seed, size in sizes.items():
            if size != sizes[first.seed]:
                raise UserError(
                    f"train.seeds: {first.name} has {sizes[first.seed]:,} training pairs with seed {first.seed} "
                    f"and {size:,} with seed {seed}, and seeds trained at once need as many; train them one by one"
                )

    def train_dataloader(self) -> StackedLoader:
        return StackedLoader([part.train_dataloader() for part in self.parts])

    def val_dataloader(self) -> list[Any]:
        return [loader for part in self.parts for loader in part.val_dataloader()]
