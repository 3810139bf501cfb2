"""The official H&M columns and a few customers: helpers of the tests of H&M data."""

from __future__ import annotations

import torch

from recsys_ssm.data.two_tower import Ranking, TwoTowerSplits

SMALL = {"n_customers": 3_000, "n_articles": 500, "n_transactions": 30_000}
OFFICIAL_ARTICLES = [
    "article_id",
    "product_code",
    "prod_name",
    "product_type_no",
    "product_type_name",
    "product_group_name",
    "graphical_appearance_no",
    "graphical_appearance_name",
    "colour_group_code",
    "colour_group_name",
    "perceived_colour_value_id",
    "perceived_colour_value_name",
    "perceived_colour_master_id",
    "perceived_colour_master_name",
    "department_no",
    "department_name",
    "index_code",
    "index_name",
    "index_group_no",
    "index_group_name",
    "section_no",
    "section_name",
    "garment_group_no",
    "garment_group_name",
    "detail_desc",
]
CUSTOMERS = """customer_id,FN,Active,club_member_status,fashion_news_frequency,age,postal_code
u1,1.0,1.0,ACTIVE,Regularly,20.0,x
u2,,,ACTIVE,NONE,40.0,x
u3,,,,,,x
u4,,,PRE-CREATE,NONE,30.0,x
u5,1.0,,ACTIVE,Regularly,50.0,x
u6,,,ACTIVE,NONE,60.0,x
u7,,1.0,ACTIVE,NONE,25.0,x
u8,,,ACTIVE,NONE,35.0,x
v1,,,ACTIVE,NONE,35.0,x
v2,,,ACTIVE,NONE,35.0,x
"""


def note(splits: TwoTowerSplits, start: str) -> str:
    (line,) = [line for line in splits.notes if line.startswith(start)]
    return line


def relevant(splits: TwoTowerSplits, ranking: Ranking) -> torch.Tensor:
    return ranking.relevant.mask(0, ranking.user.numel(), len(splits.item_ids))
