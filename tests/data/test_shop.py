"""The generated shop: the same for the same seed, with repeats, and marked as generated."""

from __future__ import annotations

import pytest

from recsys_ssm.data.shop import GeneratedShop, make_items, make_orders
from recsys_ssm.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


def test_the_shop_depends_on_its_own_seed_alone():
    first, second = GeneratedShop(seed=0), GeneratedShop(seed=1)
    assert first.identity() == second.identity() and first.sources == second.sources
    other = GeneratedShop(data_seed=1)
    assert other.identity()["split"] != first.identity()["split"]
    assert other.sources["shop"] != first.sources["shop"]


def test_it_has_repeats_times_titles_and_features_and_says_that_it_is_generated():
    data = GeneratedShop()
    splits = data.splits
    assert splits.generated and splits.notes[0].startswith("generated data")
    assert 3000 < splits.histories.events.size < 7000
    assert 0.1 < splits.repeat_share < 0.9
    assert splits.items is not None and splits.items.categorical.max() == 8
    assert data.titles.height == 120 and data.titles["title"].n_unique() == 120
    orders = make_orders(make_items(120, 0), 400, 12, 0)
    ordered = orders.group_by("user_id").agg(ordered=(orders["timestamp"].diff() > 0).any())
    assert ordered["ordered"].all()
    baselines = data.baseline_metrics(["hr@10"])
    # The latest different items are better than the most popular ones: there is something to learn.
    assert (
        baselines["repeat_last_unfiltered"]["hr@10"] > baselines["popularity_unfiltered"]["hr@10"]
    )


@pytest.mark.parametrize("option", ["n_customers", "n_items", "mean_orders"])
def test_sizes_that_are_too_small(option):
    with pytest.raises(UserError, match=f"dataset.{option}=1: give at least"):
        GeneratedShop(**{option: 1})
