"""The shared data parts: order, shards, resuming, ranking blocks, negatives."""

import itertools

import numpy as np
import pytest
import torch
from pairs import N, PairData, features, flat, loader, pairs, splits, users_of

from recsys_ssm.batches import Ragged
from recsys_ssm.data.two_tower import (
    Pairs,
    Ranking,
    RankingLoader,
    random_scores,
    sample_negatives,
    split_users,
)
from recsys_ssm.errors import UserError


def test_a_batch_is_a_slice_of_the_prepared_arrays():
    for batch in loader():
        index = batch.user_index
        assert torch.equal(batch.target, index / 2)
        assert torch.equal(batch.item_index, N - 1 - index)
        assert torch.equal(batch.user.numeric[:, 0], index.float())
        assert torch.equal(batch.item.numeric[:, 0], batch.item_index + 100.0)
        assert torch.equal(batch.item.categorical[:, 0], batch.item_index)


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_each_user_is_ranked_once_whatever_the_number_of_processes(world_size):
    user = torch.arange(17) + 3
    ranking = Ranking(user, Ragged.from_pairs(torch.arange(17), torch.arange(17) % 7, 17))
    blocks = [
        list(RankingLoader(features(N), ranking, 7, batch_size=4, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    batches = list(itertools.chain(*blocks))
    assert torch.cat([batch.user_index for batch in batches]).tolist() == user.tolist()
    assert max(batch.user_index.numel() for batch in batches) <= 4
    relevant = torch.cat([batch.relevant for batch in batches])
    assert relevant.nonzero().tolist() == [[u, u % 7] for u in range(17)]
    assert all(batch.seen is None for batch in batches)
    numeric = torch.cat([batch.user.numeric for batch in batches])
    assert torch.equal(numeric[:, 0], user.float())
    lengths = [
        len(RankingLoader(features(N), ranking, 7, batch_size=4, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert lengths == [len(block) for block in blocks]


def test_seen_items_come_with_their_users():
    user = torch.tensor([2, 5])
    relevant = Ragged.from_pairs(torch.tensor([0, 1]), torch.tensor([3, 0]), 2)
    seen = Ragged.from_pairs(torch.tensor([1, 1]), torch.tensor([1, 2]), 2)
    (batch,) = RankingLoader(features(N), Ranking(user, relevant, seen), 4, batch_size=9)
    assert batch.relevant.tolist() == [[False, False, False, True], [True, False, False, False]]
    assert batch.seen.tolist() == [[False] * 4, [False, True, True, False]]


# Ragged


def test_ragged_groups_by_user_and_keeps_the_order():
    ragged = Ragged.from_pairs(torch.tensor([2, 0, 2, 2]), torch.tensor([9, 5, 1, 4]), 4)
    assert ragged.offsets.tolist() == [0, 1, 1, 4, 4]
    assert ragged.values.tolist() == [5, 9, 1, 4]
    assert ragged.lengths.tolist() == [1, 0, 3, 0]


def test_ragged_and_masks_are_inverse():
    mask = torch.rand(9, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    ragged = Ragged.from_mask(mask)
    assert torch.equal(ragged.mask(0, 9, 6), mask)
    assert torch.equal(ragged.mask(3, 7, 6), mask[3:7])
    assert ragged.mask(4, 4, 6).shape == (0, 6)


# Negatives


def test_negatives_are_uniform_over_exactly_what_a_user_lacks():
    """Every allowed item turns up as often as another, no other ever: chi-square of 40,000 draws."""
    generator = np.random.default_rng(0)
    n_users, n_items, n_draws = 8, 12, 40_000
    mask = generator.random((n_users, n_items)) < np.linspace(0, 0.9, n_users)[:, None]
    mask[3], mask[4] = False, True
    mask[4, 7] = False  # one item left
    mask[5, [0, 11]] = True  # the ends of the catalogue
    positives = Ragged.from_mask(torch.from_numpy(mask))
    # Items in any order within a user.
    shuffled = [
        generator.permutation(block)
        for block in np.split(positives.values.numpy(), positives.offsets.numpy()[1:-1])
    ]
    positives = Ragged(torch.from_numpy(np.concatenate(shuffled)), positives.offsets)
    user = np.repeat(np.arange(n_users), n_draws)
    generator.shuffle(user)
    item = sample_negatives(positives, user, n_items, generator)
    counts = np.zeros((n_users, n_items))
    np.add.at(counts, (user, item), 1)
    assert (counts[mask] == 0).all()
    for u in range(n_users):
        free = counts[u, ~mask[u]]
        expected = n_draws / free.size
        chi_square = ((free - expected) ** 2 / expected).sum()
        assert chi_square < free.size + 6 * np.sqrt(2 * free.size), f"user {u}: {free}"


def test_negatives_are_reproducible_and_may_be_none():
    positives = Ragged.from_mask(torch.eye(5, dtype=torch.bool))
    user = np.arange(5).repeat(10)
    first = sample_negatives(positives, user, 5, np.random.default_rng(3))
    assert (first == sample_negatives(positives, user, 5, np.random.default_rng(3))).all()
    assert sample_negatives(positives, user[:0], 5, np.random.default_rng(3)).size == 0


def test_a_user_with_the_whole_catalogue_is_an_error():
    positives = Ragged.from_mask(torch.tensor([[True, False], [True, True]]))
    assert sample_negatives(positives, np.array([0]), 2, np.random.default_rng(0)).tolist() == [1]
    with pytest.raises(UserError, match="every item of the catalogue"):
        sample_negatives(positives, np.array([0, 1]), 2, np.random.default_rng(0))


# Users, baselines, the DataModule


def test_split_users_gives_disjoint_random_groups():
    candidates = np.arange(100, 200)
    test, val = split_users(candidates, (30, 20), np.random.default_rng(0))
    assert (test.size, val.size) == (30, 20)
    assert set(test) | set(val) <= set(candidates)
    assert not set(test) & set(val)
    assert (np.diff(test) > 0).all()
    assert test.tolist() != list(range(100, 130))
    other, _ = split_users(candidates, (30, 20), np.random.default_rng(1))
    assert test.tolist() != other.tolist()
    test, val = split_users(candidates[:4], (3, 3), np.random.default_rng(0))
    assert (test.size, val.size) == (3, 1)


def test_random_scores_depend_on_user_and_item_alone_and_look_random():
    scores = random_scores(torch.arange(2000), 50)
    assert torch.equal(scores[[7, 3]], random_scores(torch.tensor([7, 3]), 50))
    assert scores.min() >= 0
    assert scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.005
    assert abs(scores.std() - 12**-0.5) < 0.005
    first = torch.bincount(scores.topk(5).indices.flatten(), minlength=50)  # binomial, mean 200
    assert (first - 200).abs().max() < 5 * (2000 * 0.1 * 0.9) ** 0.5
    correlation = torch.corrcoef(scores.T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 2000**0.5


def test_popularity_counts_positive_training_targets():
    train = Pairs(
        torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 2, 2]), torch.tensor([1.0, 1, 0, -1])
    )
    baselines = splits(4, train=train).baselines
    assert list(baselines) == ["random", "popularity"]
    assert baselines["popularity"](torch.tensor([5, 6])).tolist() == [[0, 2, 0, 0]] * 2
    own = splits(4, baselines={"oracle": random_scores, "popularity": random_scores}).baselines
    assert list(own) == ["random", "popularity", "oracle"]
    assert own["popularity"] is random_scores


def test_nothing_to_train_or_test_on_is_an_error():
    nobody = Ranking(torch.arange(0), Ragged.from_pairs(torch.arange(0), torch.arange(0), 0))
    with pytest.raises(UserError, match="no test user is left"):
        splits(test_ranking=nobody)
    with pytest.raises(UserError, match="no training pair is left"):
        splits(train=pairs(0))


@pytest.mark.parametrize("option", ["batch_size", "eval_batch_size"])
def test_batch_sizes_start_at_1(option):
    with pytest.raises(UserError, match=f"dataset.{option}=0"):
        PairData(**{option: 0})


def test_the_data_module_hands_out_its_loaders_and_builds_once():
    data = PairData(batch_size=3, eval_batch_size=2, seed=4)
    data.setup("fit")
    assert data.splits is data.splits
    assert users_of(data.train_dataloader()) == users_of(loader(10, batch_size=3, seed=4))
    of_pairs, of_users = data.val_dataloader()
    assert users_of(of_pairs) == [[0, 1, 2], [3]]
    assert users_of(of_users) == users_of(data.test_dataloader()) == [[0, 1], [2]]
    data = PairData(shuffle=False)
    assert flat(data.train_dataloader()) == list(range(10))
