"""Sample listeners of a few genres and the 50 songs of "Top 50 - Global" (``dataset=spotify``).

The data of FT-Mamba's first experiment (Starnes and Webster, *Mamba for Scalable and Efficient Personalized
Recommendations*, section III.A), made for reinforcement learning by Dereventsov, Starnes and Webster
(arXiv:2211.11869). All but two small tables that ship with the package is sampled from the seed, so nothing is
downloaded:

- G (20, 10) are the means of ten audio attributes over the songs of each genre, S (50, 10) are those of the songs.
- A listener likes k = floor(20 s) random genres, s uniform in [min_share, max_share): a 0/1 row u.
- Preference p = u R with R = (G - mean(G)) (S - mean(S))ᵀ, means over the rows. The paper writes u G Sᵀ; the code of
  the environment centres, and without centring every preference is positive.
- Target of (listener, song): +1 where p > threshold, -1 where p < -threshold, 0 otherwise. Songs of target +1 are
  relevant.

Training, validation and test listeners are independent samples. Only 6,195 different listeners exist (one to four of
20 genres), so most test listeners equal one in training, as in the paper. With the published settings 3.4% like no
song. Ranking by p itself, the ``oracle`` baseline, is the best any model can do: over the other listeners P@5 .982,
P@10 .931, R@5 .406, R@10 .706; over all .949, .900, .392, .682.

Shapes: B listeners, G genres, A attributes, S songs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_ssm.batches import Ragged
from recsys_ssm.data.files import read_table
from recsys_ssm.data.two_tower import Pairs, Ranking, TwoTowerData, TwoTowerSplits
from recsys_ssm.errors import UserError
from recsys_ssm.features import FeatureSchema, numeric_column

VERSION = 1
"""Version of the generator: raise it when a seed gives other data."""

ASSETS = Path(__file__).parent / "assets"
GENRES_FILE = "spotify_genres.csv"
SONGS_FILE = "spotify_songs.csv"
ATTRIBUTES = (
    "acousticness",
    "danceability",
    "energy",
    "instrumentalness",
    "liveness",
    "loudness",
    "mode",
    "speechiness",
    "tempo",
    "valence",
)


class SpotifyData(TwoTowerData):
    """Listeners as 20 numeric features (0 or 1, unscaled), songs as one categorical: their rank.

    Args:
        n_train: Training pairs, each of another listener and a random song.
        n_val: Validation pairs, for the loss.
        n_val_users: Listeners to rank for during validation.
        n_test_users: Listeners to rank for in the test.
        min_share: Least share of the genres that a listener likes; at least one genre.
        max_share: Upper limit of the share.
        threshold: Least distance from 0 of a preference that counts as liking or disliking.
        **base: Arguments of :class:`~recsys_ssm.data.two_tower.TwoTowerData`.
    """

    label = "Spotify"

    def __init__(
        self,
        *,
        n_train: int = 160_000,
        n_val: int = 1_000,
        n_val_users: int = 500,
        n_test_users: int = 100,
        min_share: float = 0.05,
        max_share: float = 0.25,
        threshold: float = 0.1,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        sizes = {
            "n_train": n_train,
            "n_val": n_val,
            "n_val_users": n_val_users,
            "n_test_users": n_test_users,
        }
        for option, size in sizes.items():
            if size < 1:
                raise UserError(f"dataset.{option}={size}: give at least 1")
        if not 0 <= min_share < max_share <= 1:
            raise UserError(
                f"dataset.min_share={min_share}, dataset.max_share={max_share}: "
                "shares of the genres, 0 <= min_share < max_share <= 1"
            )
        if threshold < 0:
            raise UserError(f"dataset.threshold={threshold}: give 0 or more")
        self.n_train, self.n_val = n_train, n_val
        self.n_val_users, self.n_test_users = n_val_users, n_test_users
        self.min_share, self.max_share, self.threshold = min_share, max_share, threshold

    def build(self) -> TwoTowerSplits:
        genres = read_table(ASSETS / GENRES_FILE)
        songs = read_table(ASSETS / SONGS_FILE)
        affinity = _affinity(_attributes(genres, GENRES_FILE), _attributes(songs, SONGS_FILE))
        affinity_GS, n_songs = torch.from_numpy(affinity), songs.height

        # One random stream for each part, so that its size does not change the others.
        streams = np.random.SeedSequence(self.seed).spawn(4)
        train, val, val_users, test_users = (np.random.default_rng(stream) for stream in streams)
        parts = [
            (train, self.n_train),
            (val, self.n_val),
            (val_users, self.n_val_users),
            (test_users, self.n_test_users),
        ]
        likes = np.concatenate([self._sample_listeners(n, genres.height, rng) for rng, n in parts])
        likes_BG = torch.from_numpy(likes)
        rows = torch.arange(len(likes)).split([n for _, n in parts])

        def pairs(user: Tensor, rng: np.random.Generator) -> Pairs:
            item = torch.from_numpy(rng.integers(0, n_songs, user.numel()))
            preference_B = (likes_BG[user] * affinity_GS.T[item]).sum(dim=1)
            return Pairs(user, item, self.sentiment(preference_B))

        def ranking(user: Tensor) -> Ranking:
            preference = likes_BG[user] @ affinity_GS
            return Ranking(user, Ragged.from_mask(self.sentiment(preference) > 0))

        listeners = pl.DataFrame(likes, schema=genres["genre"].to_list())
        user_schema = FeatureSchema.fit(listeners, numeric=listeners.columns, scale=False)
        item_schema = FeatureSchema.fit(songs, categorical=["rank"])
        return TwoTowerSplits(
            users=user_schema.encode(listeners),
            items=item_schema.encode(songs),
            item_ids=songs["id"].to_list(),
            user_schema=user_schema,
            item_schema=item_schema,
            train=pairs(rows[0], train),
            val=pairs(rows[1], val),
            val_ranking=ranking(rows[2]),
            test_ranking=ranking(rows[3]),
            baselines={"oracle": functools.partial(_preferences, likes_BG, affinity_GS)},
            notes=[f"listeners and {self.n_train:,} training pairs sampled, {n_songs} songs"],
            sources={
                "spotify": self._hash_arguments(
                    VERSION, [ASSETS / GENRES_FILE, ASSETS / SONGS_FILE]
                )
            },
        )

    def sentiment(self, preference: Tensor) -> Tensor:
        """Return preferences (any shape) as targets of the same shape: 1 liked, -1 disliked, 0 neither."""
        return (preference > self.threshold).float() - (preference < -self.threshold).float()

    def _sample_listeners(self, n: int, n_genres: int, rng: np.random.Generator) -> np.ndarray:
        """Sample the genres that each listener likes: (n, n_genres) float64 of 0 and 1."""
        n_liked_B = np.floor(n_genres * rng.uniform(self.min_share, self.max_share, n))
        # The first n_liked genres of a random order are a uniform choice.
        place_BG = rng.random((n, n_genres)).argsort(axis=1).argsort(axis=1)
        return (place_BG < np.maximum(n_liked_B, 1)[:, None]).astype(np.float64)


def _preferences(likes_BG: Tensor, affinity_GS: Tensor, user: Tensor) -> Tensor:
    return (likes_BG[user] @ affinity_GS).float()


def _attributes(table: pl.DataFrame, where: str) -> np.ndarray:
    """Return the audio attributes of a table, (rows, 10) float64."""
    return np.stack([numeric_column(table, name, where) for name in ATTRIBUTES], axis=1)


def _affinity(genres_GA: np.ndarray, songs_SA: np.ndarray) -> np.ndarray:
    """Return R (G, S), the inner products of the genres' and the songs' centred attributes."""
    return (genres_GA - genres_GA.mean(axis=0)) @ (songs_SA - songs_SA.mean(axis=0)).T
