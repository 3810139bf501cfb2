"""A dataset small enough to see through: 12 users, 6 items, one numeric and one categorical feature a side."""

from __future__ import annotations

import polars as pl
import pytest
import torch

from recsys_ssm.batches import Ragged
from recsys_ssm.data.two_tower import Pairs, Ranking, TwoTowerData, TwoTowerSplits
from recsys_ssm.features import FeatureSchema

N_USERS, N_ITEMS = 12, 6


class TinyData(TwoTowerData):
    """A user likes the items of his own colour."""

    def build(self) -> TwoTowerSplits:
        users = pl.DataFrame(
            {
                "age": [float(i) for i in range(N_USERS)],
                "colour": ["red", "blue", None] * (N_USERS // 3),
            }
        )
        items = pl.DataFrame(
            {"price": [1.0, 2.0, None, 4.0, 5.0, 6.0], "colour": ["red", "blue", "green"] * 2}
        )
        user_schema = FeatureSchema.fit(users, numeric=["age"], categorical=["colour"])
        item_schema = FeatureSchema.fit(items, numeric=["price"], categorical=["colour"])
        user = torch.arange(N_USERS).repeat_interleave(N_ITEMS)
        item = torch.arange(N_ITEMS).repeat(N_USERS)
        liked = user % 3 == item % 3
        pairs = Pairs(user, item, liked.float())
        relevant = Ragged.from_mask(liked.view(N_USERS, N_ITEMS))
        ranking = Ranking(torch.arange(N_USERS), relevant)
        return TwoTowerSplits(
            users=user_schema.encode(users),
            items=item_schema.encode(items),
            item_ids=[f"i{i}" for i in range(N_ITEMS)],
            user_schema=user_schema,
            item_schema=item_schema,
            train=pairs,
            val=pairs,
            val_ranking=ranking,
            test_ranking=ranking,
        )


@pytest.fixture
def tiny_data() -> TinyData:
    return TinyData(name="tiny", batch_size=8, eval_batch_size=5)
