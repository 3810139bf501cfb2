"""Stack the data of several seeds, for :mod:`recsys_ssm.batched_seeds.model`.

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
    """Yield the next batch of each seed, stacked: every tensor (K, B, …).

    Each seed's loader keeps its own order and its own state. All have the same length.
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
        """Object whose ``sampler.set_epoch`` Lightning calls before each epoch."""
        return SimpleNamespace(sampler=self)

    def state_dict(self) -> dict[str, Any]:
        return {"loaders": [loader.state_dict() for loader in self.loaders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for loader, own in zip(self.loaders, state["loaders"], strict=True):
            loader.load_state_dict(own)


class SeedsData(L.LightningDataModule):
    """Serve K datasets of one kind, each sampled with its own seed.

    Training batches are stacked. Validation takes the seeds one after the other, with two loaders each.

    Args:
        parts: One dataset for each seed.

    Raises:
        UserError: The seeds have different numbers of training pairs, so that their epochs would end apart.
    """

    def __init__(self, parts: Sequence[TwoTowerData]) -> None:
        super().__init__()
        self.parts = list(parts)
        sizes = {part.seed: part.splits.train.user.numel() for part in self.parts}
        first = self.parts[0]
        for seed, size in sizes.items():
            if size != sizes[first.seed]:
                raise UserError(
                    f"seeds: {first.name} has {sizes[first.seed]:,} training pairs with seed {first.seed} and {size:,} "
                    f"with seed {seed}, but seeds trained at once need equal numbers; train them one by one"
                )

    def train_dataloader(self) -> StackedLoader:
        return StackedLoader([part.train_dataloader() for part in self.parts])

    def val_dataloader(self) -> list[Any]:
        return [loader for part in self.parts for loader in part.val_dataloader()]
