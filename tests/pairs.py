"""Numbered pairs, their loader and a DataModule of them: helpers of the tests of loaders and two-tower data."""

from __future__ import annotations

import itertools

import lightning as L
import torch

from recsys_ssm.batches import Ragged
from recsys_ssm.data.two_tower import PairLoader, Pairs, Ranking, TwoTowerData, TwoTowerSplits
from recsys_ssm.features import CategoricalField, Features, FeatureSchema, NumericField

N = 23
SCHEMA = FeatureSchema((NumericField("x"),), (CategoricalField("c", tuple("abcdefghij" * 3)),))


def features(n, offset=0.0):
    row = torch.arange(n)
    return Features(row.float().view(n, 1) + offset, row.view(n, 1))


def pairs(n=N):
    """Pair i is of user i and item n - 1 - i, target i / 2: every array tells which pair it is."""
    row = torch.arange(n)
    return Pairs(row, n - 1 - row, row / 2)


def loader(n=N, **options):
    defaults = {"batch_size": 4, "shuffle": True, "seed": 0}
    return PairLoader(features(n), features(n, 100.0), pairs(n), **{**defaults, **options})


def users_of(batches):
    return [batch.user_index.tolist() for batch in batches]


def flat(batches):
    return list(itertools.chain.from_iterable(users_of(batches)))


class Recorder(L.LightningModule):
    """Records the users of each training batch; its parameter is touched so that Lightning runs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append((self.current_epoch, batch_idx, batch.user_index.tolist()))
        return self.weight * batch.target.mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0): ...

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class PairData(TwoTowerData):
    def __init__(self, n=10, **base):
        super().__init__(name="tiny", **base)
        self.n = n

    def build(self):
        return splits(self.n)


def splits(n=10, **changes):
    user = torch.arange(3)
    ranking = Ranking(user, Ragged.from_pairs(user, user, 3))
    parts = {
        "users": features(n),
        "items": features(n),
        "item_ids": [str(i) for i in range(n)],
        "user_schema": SCHEMA,
        "item_schema": SCHEMA,
        "train": pairs(n),
        "val": pairs(4),
        "val_ranking": ranking,
        "test_ranking": ranking,
    }
    return TwoTowerSplits(**{**parts, **changes})
