"""Sample people and messages that encourage vaccination against COVID-19 (``dataset=vaccine``).

The synthetic data of FT-Mamba's third experiment (Starnes and Webster, *Mamba for Scalable and Efficient Personalized
Recommendations*, section III.C), sampled from the seed:

- People have an age and seven categorical features; all values are equally likely and independent.
- 100 messages and their embeddings ship with the package (``vaccine_messages.csv``, written for it;
  ``vaccine_embeddings.npy``, 384 numbers each by all-MiniLM-L6-v2, where the paper's Instructor model gave 768).
  ``n_messages`` of them are sampled.
- K-means makes k clusters of the people and, separately, k of the messages (each its own where k = n_messages). A user
  and a message match if their clusters have the same number. The numbers follow the random initial centres of k-means,
  so the matching of clusters is random too.
- Target of (user, message): 1 with probability ``p_same`` if they match, ``p_different`` if not. Messages that match
  are relevant to a user: one at k = n_messages, as in Table II (P@5 = R@5 / 5 there), n_messages / k on average
  elsewhere.
- Training pairs are a random training user and a random message, some twice. Validation and test users are others,
  assigned to the cluster with the nearest centre.

The paper says neither which features k-means uses nor how noisy the targets are. These decide how fast the clusters are
learnt. HR@1 / HR@5 / HR@10 of FT-Mamba at 25/25, one seed, 500 test users, published recipe, noise-free targets (Table
II: .54 .90 .98 after 5,000 steps):

============  ============  ============  ============
steps         1,000         2,000         5,000
============  ============  ============  ============
onehot        .34 .73 .89   .50 .89 .97
standardized  .12 .37 .64   .20 .59 .79   .37 .80 .95
raw           .12 .48 .75   .19 .71 .95
============  ============  ============  ============

``onehot`` reaches Table II's figures long before the end, ``standardized`` comes close at the end: that is the default.
With ``raw`` ages, neighbouring clusters are neighbouring ages, so that HR@5 nears 1 while HR@1 is still low (the age
alone gives .56, 1.00, 1.00), unlike Table II. Noise slows all three, so ``onehot`` with some noise is a second reading
that may fit.

Legend: U people, M messages, E numbers an embedding; N points, D numbers a point, K clusters.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_ssm.batches import Ragged
from recsys_ssm.data.files import read_table
from recsys_ssm.data.two_tower import Baseline, Pairs, Ranking, TwoTowerData, TwoTowerSplits
from recsys_ssm.errors import UserError
from recsys_ssm.features import FeatureSchema

VERSION = 1
"""Version of the generator: raise it when a seed gives other data."""

ASSETS = Path(__file__).parent / "assets"
MESSAGES_FILE = "vaccine_messages.csv"
EMBEDDINGS_FILE = "vaccine_embeddings.npy"
N_MESSAGES = 100

MIN_AGE, MAX_AGE = 18, 90
CATEGORIES = {
    "gender": ("female", "male", "nonbinary"),
    # The stages of change of the transtheoretical model.
    "progression": ("precontemplation", "contemplation", "preparation", "action", "maintenance"),
    "education": ("none", "high school", "some college", "bachelor", "graduate"),
    "insurance": ("private", "employer", "medicare", "medicaid", "none"),
    "race": ("asian", "black", "hispanic", "indigenous", "pacific islander", "white", "several"),
    "language": ("english", "spanish", "chinese", "vietnamese", "arabic", "other"),
    "religion": (
        "buddhist",
        "catholic",
        "hindu",
        "jewish",
        "muslim",
        "protestant",
        "other",
        "none",
    ),
}
"""Values of each categorical feature; all equally likely, independent of one another and of age."""

ClusterFeatures = Literal["standardized", "onehot", "raw", "raw_onehot"]
MessageFeatures = Literal["index", "embedding"]


class VaccineData(TwoTowerData):
    """People with an age and seven categorical features; messages by their index or embedding.

    Args:
        n_users: Training users.
        n_train: Training pairs, each a random training user and a random message.
        n_val: Validation pairs, of the validation users.
        n_val_users: Held-out users to rank for during validation.
        n_test_users: Held-out users to rank for in the test.
        k: Clusters of users, and of messages.
        n_messages: Messages, sampled from the 100 that ship.
        p_same: Probability of target 1 where the clusters' numbers are equal.
        p_different: Probability of target 1 where they are not.
        cluster_features: Features of people for k-means. ``standardized``: age and the categories' numbers,
            standardised; ``onehot``: standardised age and a 0/1 column for each category; ``raw``: age in years and the
            categories' numbers; ``raw_onehot``: age in years and 0/1 columns.
        message_features: Features of a message for the model: ``index``, one categorical feature; ``embedding``, 384
            numeric ones.
        age_bands: Bands of equal width of the ``age_band`` baseline.
        **base: Arguments of :class:`~recsys_ssm.data.two_tower.TwoTowerData`.
    """

    label = "Vaccine"
    grid = ("k", "n_messages")

    def __init__(
        self,
        *,
        n_users: int = 50_000,
        n_train: int = 160_000,
        n_val: int = 1_000,
        n_val_users: int = 500,
        n_test_users: int = 100,
        k: int = 25,
        n_messages: int = 25,
        p_same: float = 1.0,
        p_different: float = 0.0,
        cluster_features: ClusterFeatures = "standardized",
        message_features: MessageFeatures = "index",
        age_bands: int = 25,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        sizes = {
            "n_users": n_users,
            "n_train": n_train,
            "n_val": n_val,
            "n_val_users": n_val_users,
            "n_test_users": n_test_users,
            "k": k,
            "n_messages": n_messages,
            "age_bands": age_bands,
        }
        for option, size in sizes.items():
            if size < 1:
                raise UserError(f"dataset.{option}={size}: give at least 1")
        if n_messages > N_MESSAGES:
            raise UserError(f"dataset.n_messages={n_messages}: give at most {N_MESSAGES}")
        if k > n_messages:
            raise UserError(
                f"dataset.k={k}: more clusters than messages; lower it or raise "
                f"dataset.n_messages={n_messages}"
            )
        if k > n_users:
            raise UserError(
                f"dataset.k={k}: more clusters than users; lower it or raise dataset.n_users={n_users}"
            )
        for option, p in {"p_same": p_same, "p_different": p_different}.items():
            if not 0 <= p <= 1:
                raise UserError(f"dataset.{option}={p}: give a probability, from 0 to 1")
        for option, choice, choices in (
            ("cluster_features", cluster_features, get_args(ClusterFeatures)),
            ("message_features", message_features, get_args(MessageFeatures)),
        ):
            if choice not in choices:
                raise UserError(f"dataset.{option}={choice}: choose from {', '.join(choices)}")
        self.n_users, self.n_train, self.n_val = n_users, n_train, n_val
        self.n_val_users, self.n_test_users = n_val_users, n_test_users
        self.k, self.n_messages = k, n_messages
        self.p_same, self.p_different = p_same, p_different
        self.cluster_features, self.message_features = cluster_features, message_features
        self.age_bands = age_bands

    def build(self) -> TwoTowerSplits:
        # One random stream for each part, so that its size does not change the others.
        streams = np.random.SeedSequence(self.seed).spawn(6)
        train, val, test, sample, user_clusters, message_clusters = (
            np.random.default_rng(stream) for stream in streams
        )
        parts = [(self.n_users, train), (self.n_val_users, val), (self.n_test_users, test)]
        people = pl.concat([_sample_people(n, rng) for n, rng in parts])
        messages, embeddings_ME = _sample_messages(self.n_messages, sample)

        points_UD = self._cluster_points(people)
        centres_KD = kmeans(points_UD[: self.n_users], self.k, user_clusters)
        centres_KE = kmeans(embeddings_ME, self.k, message_clusters, n_init=10)
        user_cluster = torch.from_numpy(nearest(points_UD, centres_KD))
        message_cluster = torch.from_numpy(nearest(embeddings_ME, centres_KE))

        match = functools.partial(_in_same_cluster, user_cluster, message_cluster)

        def pairs(among: Tensor, n: int, rng: np.random.Generator) -> Pairs:
            user = among[torch.from_numpy(rng.integers(0, among.numel(), n))]
            item = torch.from_numpy(rng.integers(0, self.n_messages, n))
            same = user_cluster[user] == message_cluster[item]
            p = torch.where(same, self.p_same, self.p_different)
            return Pairs(user, item, (torch.from_numpy(rng.random(n)) < p).float())

        def ranking(user: Tensor) -> Ranking:
            return Ranking(user, Ragged.from_mask(match(user) > 0))

        train_users, val_users, test_users = torch.arange(people.height).split(
            [n for n, _ in parts]
        )
        train_pairs = pairs(train_users, self.n_train, train)
        user_schema = FeatureSchema.fit(
            people[: self.n_users], numeric=["age"], categorical=list(CATEGORIES)
        )
        by_index = self.message_features == "index"
        item_schema = FeatureSchema.fit(
            messages,
            numeric=[] if by_index else messages.columns[1:],
            categorical=["message"] if by_index else [],
        )
        age = torch.from_numpy(people["age"].to_numpy())
        return TwoTowerSplits(
            users=user_schema.encode(people),
            items=item_schema.encode(messages),
            item_ids=messages["message"].to_list(),
            user_schema=user_schema,
            item_schema=item_schema,
            train=train_pairs,
            val=pairs(val_users, self.n_val, val),
            val_ranking=ranking(val_users),
            test_ranking=ranking(test_users),
            baselines={
                "oracle": match,
                "age_band": age_band_rates(age, train_pairs, self.n_messages, self.age_bands),
            },
            notes=[f"users and {self.n_train:,} training pairs sampled, k={self.k}"],
            sources={
                "vaccine": self._hash_arguments(
                    VERSION, [ASSETS / MESSAGES_FILE, ASSETS / EMBEDDINGS_FILE]
                )
            },
        )

    def _cluster_points(self, people: pl.DataFrame) -> np.ndarray:
        """Return the points for k-means, (U, D) float64, scaled by the training users, who come first."""
        age = people["age"].to_numpy().astype(np.float64)[:, None]
        codes = [
            (people[name].cast(pl.Enum(values)).to_physical().to_numpy(), len(values))
            for name, values in CATEGORIES.items()
        ]
        numbers = np.column_stack([age, *(code for code, _ in codes)])
        indicators = np.column_stack([np.eye(n)[code] for code, n in codes])
        train = numbers[: self.n_users]
        scaled = (numbers - train.mean(axis=0)) / np.where(
            np.ptp(train, axis=0), train.std(axis=0), 1
        )
        points: dict[str, np.ndarray] = {
            "raw": numbers,
            "raw_onehot": np.column_stack([age, indicators]),
            "standardized": scaled,
            "onehot": np.column_stack([scaled[:, :1], indicators]),
        }
        return points[self.cluster_features]


def age_band_rates(age: Tensor, train: Pairs, n_messages: int, n_bands: int) -> Baseline:
    """Return a baseline that uses the user's age alone: the rate of target 1 by age band and message.

    A cell is an age band and a message. Its rate is averaged with the message's overall rate, which has the weight of
    one pair, so that an empty cell has the overall rate.

    Args:
        age: (U,) years of every user.
        train: Pairs to estimate the rates on.
        n_messages: Messages of the catalogue.
        n_bands: Bands of equal width from the least to the greatest age.
    """
    width = MAX_AGE + 1 - MIN_AGE
    band = (age - MIN_AGE) * n_bands // width
    cell = band[train.user] * n_messages + train.item
    size = n_bands * n_messages
    pairs = torch.bincount(cell, minlength=size).view(n_bands, n_messages)
    ones = torch.bincount(cell, train.target, minlength=size).view(n_bands, n_messages)
    overall = ones.sum(0) / pairs.sum(0).clamp(min=1)
    rates = (ones + overall) / (pairs + 1)
    return functools.partial(_of_band, rates, band)


def _in_same_cluster(user_cluster: Tensor, message_cluster: Tensor, user: Tensor) -> Tensor:
    """Return which messages match each user, (U, M) float32 of 0 and 1."""
    return (user_cluster[user, None] == message_cluster).float()


def _of_band(rates: Tensor, band: Tensor, user: Tensor) -> Tensor:
    return rates[band[user]]


def kmeans(
    points_ND: np.ndarray,
    k: int,
    rng: np.random.Generator,
    *,
    n_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
) -> np.ndarray:
    """Find centres (k, D) by Lloyd's algorithm with k-means++; return the best of ``n_init`` runs.

    Args:
        points_ND: (N, D) float64.
        k: Clusters, at most N. Their numbers follow the random initial centres.
        rng: Random numbers for the initial centres.
        n_init: Runs; the one with the least sum of squared distances is kept.
        max_iter: Most steps of a run.
        tol: A run ends when the centres' squared shift is below this share of the mean variance.
    """
    best, least = points_ND[:k], np.inf
    enough = tol * points_ND.var(axis=0).mean()
    for _ in range(n_init):
        centres_KD = _initial_centres(points_ND, k, rng)
        for _ in range(max_iter):
            moved_KD = _means(points_ND, nearest(points_ND, centres_KD), centres_KD)
            shift = np.square(moved_KD - centres_KD).sum()
            centres_KD = moved_KD
            if shift <= enough:
                break
        inertia = np.square(points_ND - centres_KD[nearest(points_ND, centres_KD)]).sum()
        if inertia < least:
            best, least = centres_KD, inertia
    return best


def nearest(points_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """Return the number of the nearest centre of each point, (N,) int64."""
    # |x - c|² is least where x·c - |c|²/2 is greatest, since |x|² is the same for every centre.
    affinity_NK = points_ND @ centres_KD.T - np.square(centres_KD).sum(axis=1) / 2
    return affinity_NK.argmax(axis=1)


def _means(points_ND: np.ndarray, label_N: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
    """Return the mean of each cluster's points; an empty cluster keeps its centre."""
    k = len(centres_KD)
    size_K1 = np.bincount(label_N, minlength=k)[:, None]
    sums_KD = np.column_stack([np.bincount(label_N, x_N, minlength=k) for x_N in points_ND.T])
    return np.where(size_K1 > 0, sums_KD / np.maximum(size_K1, 1), centres_KD)


def _initial_centres(points_ND: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Choose initial centres by k-means++: random points, with probabilities by squared distance."""
    chosen = [int(rng.integers(len(points_ND)))]
    distance_N = np.square(points_ND - points_ND[chosen[0]]).sum(axis=1)
    while len(chosen) < k:
        cumulative_N = distance_N.cumsum()
        # With side="right", a point at distance 0 is drawn only if all points are.
        drawn = np.searchsorted(cumulative_N, rng.random() * cumulative_N[-1], side="right")
        chosen.append(min(int(drawn), len(points_ND) - 1))
        distance_N = np.minimum(
            distance_N, np.square(points_ND - points_ND[chosen[-1]]).sum(axis=1)
        )
    return points_ND[chosen]


def _sample_people(n: int, rng: np.random.Generator) -> pl.DataFrame:
    """Sample ``age`` and the columns of :data:`CATEGORIES`, every value equally likely."""
    columns: dict[str, Any] = {"age": rng.integers(MIN_AGE, MAX_AGE + 1, n)}
    for name, values in CATEGORIES.items():
        columns[name] = np.asarray(values)[rng.integers(0, len(values), n)]
    return pl.DataFrame(columns)


def _sample_messages(n: int, rng: np.random.Generator) -> tuple[pl.DataFrame, np.ndarray]:
    """Sample ``n`` of the shipped messages: their names and embedding columns; the embeddings (n, E)."""
    names = read_table(ASSETS / MESSAGES_FILE)["message"]
    embeddings = np.load(ASSETS / EMBEDDINGS_FILE, allow_pickle=False).astype(np.float64)
    rows = np.sort(rng.choice(len(names), n, replace=False))
    columns = {f"embedding_{j}": embeddings[rows, j] for j in range(embeddings.shape[1])}
    return pl.DataFrame({"message": names[rows], **columns}), embeddings[rows]
