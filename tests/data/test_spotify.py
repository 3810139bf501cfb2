from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from recsys_ssm.data.spotify import ASSETS, ATTRIBUTES, GENRES_FILE, SONGS_FILE, SpotifyData
from recsys_ssm.data.two_tower import Ranking, TwoTowerSplits
from recsys_ssm.errors import UserError

ROOT = Path(__file__).parents[2]
SOURCE = Path(os.environ.get("RECSYS_SSM_DATA", ROOT.parent / "shared/data")) / "spotify"


def make(**options: object) -> SpotifyData:
    small = {"n_train": 2_000, "n_val": 50, "n_val_users": 20, "n_test_users": 30}
    return SpotifyData(**{"name": "spotify", "seed": 0, **small, **options})


def preference(likes: torch.Tensor) -> torch.Tensor:
    """p = u (G - mean(G)) (S - mean(S))ᵀ from the shipped tables: (B, 20) to (B, 50)."""
    genres = pl.read_csv(ASSETS / GENRES_FILE).select(ATTRIBUTES).to_torch(dtype=pl.Float64)
    songs = pl.read_csv(ASSETS / SONGS_FILE).select(ATTRIBUTES).to_torch(dtype=pl.Float64)
    return likes.double() @ (genres - genres.mean(0)) @ (songs - songs.mean(0)).T


def relevant(splits: TwoTowerSplits, ranking: Ranking) -> torch.Tensor:
    return ranking.relevant.mask(0, ranking.user.numel(), len(splits.item_ids))


@pytest.mark.skipif(not SOURCE.is_dir(), reason=f"the playlists are not at {SOURCE}")
def test_shipped_tables_are_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts/make_spotify_tables.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    genres, songs = script.make_tables(SOURCE)
    assert_frame_equal(pl.read_csv(ASSETS / GENRES_FILE), genres, rel_tol=1e-12)
    assert_frame_equal(pl.read_csv(ASSETS / SONGS_FILE), songs)
    blues = pl.read_csv(SOURCE / "blues.csv")
    tempo = genres.filter(pl.col("genre") == "blues")["tempo"].item()
    assert tempo == pytest.approx(blues["tempo"].mean())


def test_shipped_tables() -> None:
    genres, songs = pl.read_csv(ASSETS / GENRES_FILE), pl.read_csv(ASSETS / SONGS_FILE)
    assert genres.height == genres["genre"].n_unique() == 20
    assert genres["genre"].is_sorted()
    assert songs["rank"].to_list() == list(range(1, 51))
    assert songs["id"].n_unique() == 50


def test_features() -> None:
    splits = make().splits
    assert splits.users.numeric.shape == (2_100, 20)
    assert splits.users.categorical.shape == (2_100, 0)
    assert splits.users.numeric.unique().tolist() == [0, 1], "likes are used as they are"
    assert splits.user_schema.names == pl.read_csv(ASSETS / GENRES_FILE)["genre"].to_list()
    assert splits.items.numeric.shape == (50, 0)
    assert splits.item_schema.names == ["rank"]
    assert sorted(splits.items.categorical[:, 0].tolist()) == list(range(1, 51))
    assert splits.item_ids == pl.read_csv(ASSETS / SONGS_FILE)["id"].to_list()


def test_listeners_like_one_to_four_genres_equally_often() -> None:
    likes = make(n_train=40_000).splits.users.numeric
    share = torch.bincount(likes.sum(1).long(), minlength=6) / len(likes)
    assert share[0] == share[5] == 0
    torch.testing.assert_close(share[1:5], torch.full((4,), 0.25), atol=0.01, rtol=0)
    torch.testing.assert_close(likes.mean(0), torch.full((20,), 2.5 / 20), atol=0.01, rtol=0)


def test_targets_are_thresholded_centred_preferences() -> None:
    data = make()
    train = data.splits.train
    p = preference(data.splits.users.numeric)[train.user, train.item]
    assert ((train.target == 1) == (p > 0.1)).all()
    assert ((train.target == -1) == (p < -0.1)).all()
    assert ((train.target == 0) == (p.abs() <= 0.1)).all()
    assert train.target.unique().tolist() == [-1, 0, 1]
    assert data.sentiment(torch.tensor([-0.2, -0.1, 0.0, 0.1, 0.2])).tolist() == [-1, 0, 0, 0, 1]


def test_threshold_is_an_option() -> None:
    strict = make(threshold=0.3).splits
    p = preference(strict.users.numeric)[strict.train.user, strict.train.item]
    assert ((strict.train.target == 1) == (p > 0.3)).all()
    assert (strict.train.target == 1).any()
    liked = preference(strict.users.numeric)[strict.test_ranking.user] > 0.3
    assert (relevant(strict, strict.test_ranking) == liked).all()


def test_relevant_songs_are_the_liked_ones() -> None:
    splits = make().splits
    p = preference(splits.users.numeric)
    assert (relevant(splits, splits.test_ranking) == (p[splits.test_ranking.user] > 0.1)).all()
    assert (relevant(splits, splits.val_ranking) == (p[splits.val_ranking.user] > 0.1)).all()


def test_parts_have_listeners_of_their_own() -> None:
    splits = make().splits
    parts = [splits.train.user, splits.val.user, splits.val_ranking.user, splits.test_ranking.user]
    assert [part.unique().numel() for part in parts] == [2_000, 50, 20, 30]
    assert torch.cat(parts).unique().numel() == 2_100
    assert torch.bincount(splits.train.item, minlength=50).min() > 10, "every song is met"
    assert not torch.equal(
        splits.users.numeric[:30], splits.users.numeric[splits.test_ranking.user]
    )


def test_oracle_reaches_the_measured_ceilings() -> None:
    splits = make(n_test_users=20_000).splits
    liked = relevant(splits, splits.test_ranking)
    top = splits.baselines["oracle"](splits.test_ranking.user).topk(10).indices
    hits = liked.gather(1, top).double()
    n_liked = liked.sum(1)
    some = n_liked > 0
    assert some.double().mean().item() == pytest.approx(0.966, abs=0.003)
    published = {5: (0.949, 0.392, 0.982, 0.406), 10: (0.900, 0.682, 0.931, 0.706)}
    for k, ceilings in published.items():
        precision = hits[:, :k].mean(1)
        recall = hits[:, :k].sum(1) / n_liked.clamp(min=1)
        means = (precision.mean(), recall.mean(), precision[some].mean(), recall[some].mean())
        # Four standard errors of a mean over 20,000 listeners are .006 at most.
        assert torch.stack(means).tolist() == pytest.approx(ceilings, abs=0.006)


def test_seed_decides_everything_and_parts_are_independent() -> None:
    def numbers(data: SpotifyData) -> list[torch.Tensor]:
        splits = data.splits
        test = splits.users.numeric[splits.test_ranking.user]
        return [
            test,
            splits.train.item,
            splits.train.target,
            splits.val.item,
            splits.users.numeric[:50],
        ]

    first, again, other = (numbers(make(seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    fewer = make(seed=3, n_train=100, n_val=10).splits
    test = fewer.users.numeric[fewer.test_ranking.user]
    assert torch.equal(test, first[0]), "the other parts' sizes do not matter"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_train": 0}, "dataset.n_train=0"),
        ({"n_val": -1}, "dataset.n_val=-1"),
        ({"n_test_users": 0}, "dataset.n_test_users=0"),
        ({"threshold": -0.1}, "dataset.threshold=-0.1"),
        ({"min_share": 0.3}, "dataset.min_share=0.3"),
        ({"max_share": 1.5}, "dataset.max_share=1.5"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        make(**options)


def test_the_source_is_the_hash_of_the_arguments() -> None:
    def source(**options: float) -> str:
        (value,) = SpotifyData(name="x", **options).sources.values()
        return value

    few = {"n_train": 10, "n_val": 1, "n_val_users": 40, "n_test_users": 40}
    assert source(**few) == source(**few, batch_size=7)
    assert len({source(**few, **more) for more in ({}, {"seed": 1}, {"threshold": 0.2})}) == 3
