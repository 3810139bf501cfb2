"""Test metrics against hand-computed cases, against torchmetrics, and against plain loops."""

import math

import numpy as np
import pytest
import torch
import torchmetrics.functional.retrieval as tm

from recsys_ssm import metrics as metrics_module
from recsys_ssm.errors import UserError
from recsys_ssm.metrics import (
    DEFAULT_METRICS,
    METRICS,
    MetricName,
    RankingMetrics,
    over_all_users,
    per_user,
    rank_top_k,
)


def ranking_by_rule(scores: np.ndarray, exclude: np.ndarray, k: int) -> list[list[int]]:
    """Rank by the rule in plain Python: score descending, then index ascending; -1 is an empty place."""
    ranking = []
    for user_scores, user_exclude in zip(scores.tolist(), exclude.tolist(), strict=True):
        kept = [item for item, out in enumerate(user_exclude) if not out]
        kept.sort(key=lambda item: (-user_scores[item], item))
        ranking.append((kept + [-1] * k)[:k])
    return ranking


@pytest.fixture
def small_blocks(monkeypatch):
    """Make blocks so small that a few items and users need many of them."""
    monkeypatch.setattr(metrics_module, "_BLOCK_ITEMS", 2)
    monkeypatch.setattr(metrics_module, "_BLOCK_ELEMENTS", 300)


class TestRankTopK:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
    @pytest.mark.parametrize("blocks", ["blocks as they are", "small blocks"])
    def test_follows_the_rule_for_ties_and_exclusions(self, dtype, blocks, request):
        if blocks == "small blocks":
            request.getfixturevalue("small_blocks")
        rng = np.random.default_rng(0)
        for _ in range(60):
            n_users, n_items = int(rng.integers(1, 9)), int(rng.integers(1, 150))
            k = int(rng.integers(1, 13))
            levels = int(rng.choice([1, 2, 5, 50, 100_000]))
            scores = torch.from_numpy(rng.integers(-levels, levels, (n_users, n_items))).to(dtype)
            exclude = torch.from_numpy(rng.random((n_users, n_items)) < rng.choice([0, 0.3, 0.97]))
            expected = ranking_by_rule(scores.double().numpy(), exclude.numpy(), k)
            assert rank_top_k(scores, k, exclude).tolist() == expected
            if not exclude.any():
                assert rank_top_k(scores, k).tolist() == expected

    def test_large_catalogue(self):
        generator = torch.Generator().manual_seed(0)
        for scores in (
            torch.randn(3, 30_000, generator=generator),
            torch.randint(0, 500, (3, 30_000), generator=generator).float(),
        ):
            expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :10]
            assert torch.equal(rank_top_k(scores, 10), expected)

    def test_the_best_item_is_found_wherever_it_stands(self, small_blocks):
        scores = torch.rand(133, 133, generator=torch.Generator().manual_seed(0))
        assert rank_top_k(scores.fill_diagonal_(2), 1).tolist() == [[i] for i in range(133)]

    def test_large_counts_are_told_apart(self):
        assert rank_top_k(torch.tensor([[2**24, 2**24 + 1]]), 1).tolist() == [[1]]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_cuda_ranks_as_the_cpu_does(self, dtype):
        generator = torch.Generator().manual_seed(0)
        for n_items in (7, 50, 3416, 60_000):
            scores = torch.randint(-9, 9, (64, n_items), generator=generator).to(dtype) / 3
            scores *= torch.where(torch.rand(64, n_items, generator=generator) < 0.5, 0.0, 1.0)
            exclude = torch.rand(64, n_items, generator=generator) < 0.5
            assert torch.equal(rank_top_k(scores.cuda(), 12).cpu(), rank_top_k(scores, 12))
            on_gpu = rank_top_k(scores.cuda(), 12, exclude.cuda())
            assert torch.equal(on_gpu.cpu(), rank_top_k(scores, 12, exclude))
        with pytest.raises(UserError, match="user 1 of this batch contain NaN"):
            rank_top_k(torch.tensor([[0.0] * 100, [math.nan] + [0.0] * 99]).cuda(), 3)

    def test_does_not_change_its_input(self):
        scores, exclude = torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[False, True, False]])
        assert rank_top_k(scores, 2, exclude).tolist() == [[2, 0]]
        assert scores.tolist() == [[1.0, 2.0, 2.0]]

    def test_non_contiguous_scores(self, small_blocks):
        scores = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)).T
        assert torch.equal(rank_top_k(scores, 5), rank_top_k(scores.contiguous(), 5))

    def test_both_zeros_tie(self):
        assert rank_top_k(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 3).tolist() == [[0, 1, 2]]

    def test_minus_infinity_is_a_score_and_excluded_is_not(self):
        scores = torch.tensor([[-math.inf, 1.0, -math.inf, -math.inf]])
        exclude = torch.tensor([[True, False, False, False]])
        assert rank_top_k(scores, 3, exclude).tolist() == [[1, 2, 3]]
        assert rank_top_k(scores, 4, exclude).tolist() == [[1, 2, 3, -1]]
        assert rank_top_k(scores, 3).tolist() == [[1, 0, 2]]

    def test_more_places_than_items(self):
        assert rank_top_k(torch.tensor([[1.0, 3.0]]), 4).tolist() == [[1, 0, -1, -1]]

    def test_no_users(self):
        assert rank_top_k(torch.zeros(0, 7), 3).shape == (0, 3)

    @pytest.mark.parametrize("n_items", [5, 400])
    def test_nan_is_one_clear_line_with_the_user(self, n_items, small_blocks):
        scores = torch.zeros(70, n_items)
        scores[61, 3] = math.nan
        with pytest.raises(UserError, match=r"user 61 of this batch contain NaN.*diverged") as info:
            rank_top_k(scores, 2)
        assert "\n" not in str(info.value)
        exclude = torch.zeros(70, n_items, dtype=torch.bool)
        exclude[61, 3] = True
        assert (rank_top_k(scores, 2, exclude) >= 0).all()

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="users, items"):
            rank_top_k(torch.zeros(3), 1)
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            rank_top_k(torch.zeros(1, 3), 0)
        with pytest.raises(ValueError, match="exclude must be bool"):
            rank_top_k(torch.zeros(1, 3), 1, torch.zeros(1, 3))


class TestNames:
    def test_parse_and_print(self):
        assert MetricName.parse("ndcg@10") == ("ndcg", 10)
        assert str(MetricName("map", 12)) == "map@12"

    @pytest.mark.parametrize("name", ["auc@5", "recall@5", "", "@5"])
    def test_an_unknown_family_answers_with_those_that_exist(self, name):
        with pytest.raises(UserError) as info:
            RankingMetrics((name,), n_items=3)
        assert repr(name) in str(info.value)
        assert all(family in str(info.value) for family in METRICS)

    @pytest.mark.parametrize("name", ["p", "p@", "p@0", "p@-1", "p@five", "p@1.5", "p@²"])
    def test_a_cut_off_is_a_whole_number_above_0(self, name):
        with pytest.raises(UserError, match="whole number above 0; write for example p@10"):
            MetricName.parse(name)

    def test_every_family_has_a_definition_and_a_function(self):
        assert set(METRICS) == {*metrics_module._PER_USER, "coverage", "popularity"}

    def test_no_metrics(self):
        with pytest.raises(UserError, match="metrics is empty"):
            RankingMetrics((), n_items=3)


# Six items; the ranking is 4, 0, 5, 2, 1, 3. Relevant: 0, 2, 3 (places 2, 4 and 6).
SCORES = torch.tensor([[0.8, 0.3, 0.4, 0.1, 0.9, 0.5]])
RELEVANT = torch.tensor([[True, False, True, True, False, False]])
BY_HAND = {
    "p@1": 0,
    "p@2": 1 / 2,
    "p@5": 2 / 5,
    "p@10": 3 / 10,  # places 7 to 10 do not exist and count as misses
    "r@1": 0,
    "r@2": 1 / 3,  # three relevant items, also where only two fit
    "r@5": 2 / 3,
    "r@6": 1,
    "mrr@1": 0,
    "mrr@5": 1 / 2,
    "hr@1": 0,
    "hr@2": 1,
    "ndcg@2": (1 / math.log2(3)) / (1 + 1 / math.log2(3)),
    "ndcg@5": (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3) + 1 / 2),
    "map@2": (1 / 2) / 2,
    "map@5": (1 / 2 + 2 / 4) / 3,
    "map@12": (1 / 2 + 2 / 4 + 3 / 6) / 3,
}


class TestPerUser:
    @pytest.mark.parametrize("name", BY_HAND)
    def test_by_hand(self, name):
        value = per_user(rank_top_k(SCORES, 12), RELEVANT, [name])[name]
        assert value.dtype == torch.float64
        assert value.tolist() == pytest.approx([BY_HAND[name]], abs=1e-15)

    def test_nan_without_a_relevant_item_and_order_kept(self):
        values = per_user(
            torch.tensor([[0, 1], [1, 0]]),
            torch.tensor([[False, False], [True, True]]),
            ["r@1", "p@2", "mrr@2", "hr@1", "ndcg@2", "map@2"],
        )
        assert list(values) == ["r@1", "p@2", "mrr@2", "hr@1", "ndcg@2", "map@2"]
        for name, value in values.items():
            assert value[0].isnan(), name
            assert value[1] == (0.5 if name == "r@1" else 1), name

    def test_empty_places_are_misses_even_if_item_0_is_relevant(self):
        values = per_user(
            torch.tensor([[2, -1, -1]]), torch.tensor([[True, False, False]]), ["hr@3", "p@3"]
        )
        assert values["hr@3"].item() == 0
        assert values["p@3"].item() == 0

    def test_an_excluded_relevant_item_is_missed_but_counts(self):
        exclude = torch.tensor([[True, False, False, False, False, False]])
        values = per_user(rank_top_k(SCORES, 6, exclude), RELEVANT, ["r@6"])
        assert values["r@6"].item() == pytest.approx(2 / 3)

    def test_wrong_arguments(self):
        top = torch.tensor([[0, 1]])
        with pytest.raises(UserError, match="coverage has no value for one user"):
            per_user(top, torch.ones(1, 3, dtype=torch.bool), ["coverage@1"])
        with pytest.raises(ValueError, match="top has 2 places"):
            per_user(top, torch.ones(1, 3, dtype=torch.bool), ["p@3"])
        with pytest.raises(ValueError, match="relevant must be bool"):
            per_user(top, torch.tensor([[1, 0, -1]]), ["p@1"])


def random_cases(n_cases: int):
    """Draw scores with many ties (and some without), and relevant items; one user each."""
    rng = np.random.default_rng(1)
    for case in range(n_cases):
        n_items = int(rng.integers(2, 30))
        levels = int(rng.choice([1, 3, 10, 10_000]))
        scores = torch.from_numpy(rng.integers(0, levels, (1, n_items))).float()
        relevant = torch.from_numpy(rng.random((1, n_items)) < rng.choice([0.05, 0.3, 0.8]))
        if not relevant.any():
            relevant[0, int(rng.integers(n_items))] = True
        yield case, scores, relevant


def test_agrees_with_torchmetrics_on_1200_random_cases():
    peers = {
        "p": tm.retrieval_precision,
        "r": tm.retrieval_recall,
        "mrr": tm.retrieval_reciprocal_rank,
        "hr": tm.retrieval_hit_rate,
        "ndcg": tm.retrieval_normalized_dcg,
    }
    for case, scores, relevant in random_cases(1200):
        n_items = scores.shape[1]
        k = 1 + case % (n_items + 2)  # beyond the catalogue as well
        names = [f"{family}@{k}" for family in peers]
        values = per_user(rank_top_k(scores, k), relevant, names)
        # torchmetrics has another rule for ties (its NDCG takes their mean), so it gets
        # scores that our rule has put in strict order.
        strict = torch.empty(n_items)
        order = ranking_by_rule(scores.numpy(), np.zeros((1, n_items), bool), n_items)[0]
        strict[order] = torch.arange(n_items, 0, -1).float()
        for family, peer in peers.items():
            expected = peer(strict, relevant[0], top_k=k).item()
            assert values[f"{family}@{k}"].item() == pytest.approx(expected, abs=1e-6), (case, k)


def test_map_is_that_of_kaggle_on_1200_random_cases():
    def apk(actual: list[int], predicted: list[int], k: int) -> float:
        score = n_hits = 0.0
        for place, item in enumerate(predicted[:k]):
            if item in actual:
                n_hits += 1
                score += n_hits / (place + 1)
        return score / min(len(actual), k)

    for case, scores, relevant in random_cases(1200):
        n_items, k = scores.shape[1], 1 + case % 13
        value = per_user(rank_top_k(scores, k), relevant, [f"map@{k}"])[f"map@{k}"].item()
        predicted = ranking_by_rule(scores.numpy(), np.zeros((1, n_items), bool), n_items)[0]
        expected = apk(relevant[0].nonzero()[:, 0].tolist(), predicted, k)
        assert value == pytest.approx(expected, abs=1e-12), case
        if k >= n_items:  # all ranks: the average precision of torchmetrics
            strict = torch.empty(n_items)
            strict[predicted] = torch.arange(n_items, 0, -1).float()
            peer = tm.retrieval_average_precision(strict, relevant[0]).item()
            assert value == pytest.approx(peer, abs=1e-6)


def users(n_users: int, n_items: int = 40, seed: int = 2):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 15, (n_users, n_items), generator=generator).float()
    relevant = torch.rand(n_users, n_items, generator=generator) < 0.04
    exclude = torch.rand(n_users, n_items, generator=generator) < 0.2
    return scores, relevant, exclude


def evaluate(*batches, metrics=DEFAULT_METRICS, n_items=40) -> RankingMetrics:
    metric = RankingMetrics(metrics, n_items=n_items)
    for batch in batches:
        metric.update(*batch)
    return metric


class TestRankingMetrics:
    def test_means_are_over_users_with_a_relevant_item(self):
        scores, relevant, exclude = users(200)
        values = evaluate((scores, relevant, exclude)).compute()
        single = per_user(rank_top_k(scores, 12, exclude), relevant, DEFAULT_METRICS[:-1])
        n_without = int((~relevant.any(1)).sum())
        assert 0 < n_without < 200
        assert (values["n_users"].item(), values["n_users_without_relevant"].item()) == (
            200,
            n_without,
        )
        for name, value in single.items():
            assert values[name].item() == pytest.approx(value.nanmean().item(), rel=1e-12)

    def test_two_users_by_hand_in_both_conventions(self):
        scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [3.0, 2.0, 1.0]])
        relevant = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]]).bool()
        names = ("p@2", "r@2", "mrr@2", "coverage@1", "coverage@2")
        values = evaluate((scores, relevant), metrics=names, n_items=3).compute()
        assert list(values) == [*names, "n_users", "n_users_without_relevant"]
        assert {name: value.item() for name, value in values.items()} == pytest.approx(
            {
                "p@2": 0.5,
                "r@2": 0.75,
                "mrr@2": 0.75,
                "coverage@1": 2 / 3,  # item 1 is first for a user without a relevant item
                "coverage@2": 1,
                "n_users": 4,
                "n_users_without_relevant": 2,
            }
        )
        every = over_all_users(values)
        assert {name: every[name] for name in names} == pytest.approx(
            {"p@2": 0.25, "r@2": 0.375, "mrr@2": 0.375, "coverage@1": 2 / 3, "coverage@2": 1}
        )
        assert every["n_users"] == 4
        assert every["n_users_without_relevant"] == 2

    def test_over_all_users_counts_zeros(self):
        scores, relevant, exclude = users(200)
        every = over_all_users(evaluate((scores, relevant, exclude)).compute())
        single = per_user(rank_top_k(scores, 12, exclude), relevant, DEFAULT_METRICS[:-1])
        for name, value in single.items():
            assert every[name] == pytest.approx(value.nan_to_num(0).mean().item(), rel=1e-12)

    def test_nobody_has_a_relevant_item(self):
        values = evaluate((torch.zeros(3, 40), torch.zeros(3, 40, dtype=torch.bool))).compute()
        assert values["p@5"].isnan()
        assert values["n_users_without_relevant"] == 3
        assert values["coverage@10"].item() == pytest.approx(10 / 40)
        assert over_all_users(values)["p@5"] == 0

    def test_no_users(self):
        batch = torch.zeros(0, 40), torch.zeros(0, 40, dtype=torch.bool)
        values = evaluate(batch).compute()
        assert values["n_users"] == 0
        assert values["p@5"].isnan()
        assert math.isnan(over_all_users(values)["p@5"])

    @pytest.mark.parametrize("sizes", [[1] * 100, [37, 63], [99, 1], [50, 0, 50]])
    def test_batches_do_not_change_the_result(self, sizes):
        data = users(100)
        whole = evaluate(data).compute()
        split = evaluate(*zip(*(part.split(sizes) for part in data), strict=True)).compute()
        for name, value in whole.items():
            assert split[name].item() == pytest.approx(value.item(), rel=1e-14, abs=0), name

    def test_two_processes_give_the_result_of_one(self):
        """Use torchmetrics' own reduction; only the transport between processes is replaced."""
        data = users(101)
        mine, theirs = (tuple(part[sel] for part in data) for sel in (slice(0, 70), slice(70, 101)))
        other = evaluate(theirs)
        others_states = iter([getattr(other, name) for name in other._reductions])
        metric = RankingMetrics(
            n_items=40,
            dist_sync_fn=lambda state, group: [state, next(others_states)],
            distributed_available_fn=lambda: True,
        )
        metric.update(*mine)
        together, alone = metric.compute(), evaluate(data).compute()
        assert together["n_users"] == 101
        for name, value in alone.items():
            assert together[name].item() == pytest.approx(value.item(), rel=1e-14), name

    def test_forward_gives_the_batch_and_keeps_the_sum(self):
        scores, relevant, exclude = users(60)
        metric = RankingMetrics(n_items=40)
        batch = metric(scores[:20], relevant[:20], exclude[:20])
        metric(scores[20:], relevant[20:], exclude[20:])
        assert batch["n_users"] == 20
        assert metric.compute()["n_users"] == 60
        expected = evaluate((scores, relevant, exclude)).compute()["ndcg@10"]
        assert metric.compute()["ndcg@10"].item() == pytest.approx(expected.item(), rel=1e-14)

    def test_reset(self):
        metric = evaluate(users(20))
        metric.reset()
        metric.update(*users(30, seed=3))
        assert metric.compute() == evaluate(users(30, seed=3)).compute()

    @pytest.mark.parametrize("cast", ["to", "half", "float"])
    def test_a_cast_of_the_model_leaves_the_sums_exact(self, cast):
        metric = RankingMetrics(n_items=40)
        model = torch.nn.Sequential(metric)
        model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
        metric.update(*users(600))
        assert metric.sums.dtype == torch.float64
        assert metric.compute() == evaluate(users(600)).compute()

    def test_moves_with_the_model_but_not_to_a_device_without_float64(self, monkeypatch):
        assert RankingMetrics(n_items=40).to("meta").sums.device.type == "meta"
        monkeypatch.setattr(metrics_module, "_DEVICES_WITHOUT_FLOAT64", frozenset({"meta"}))
        assert RankingMetrics(n_items=40).to("meta").sums.device.type == "cpu"

    def test_a_name_given_twice_counts_once(self):
        metric = evaluate(users(5), metrics=("p@1", "p@1", "r@1", "coverage@2", "coverage@2"))
        assert list(metric.compute())[:3] == ["p@1", "r@1", "coverage@2"]

    def test_only_coverage(self):
        metric = evaluate(
            (torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3, dtype=torch.bool)),
            metrics=("coverage@2",),
            n_items=3,
        )
        assert metric.compute()["coverage@2"].item() == pytest.approx(2 / 3)

    def test_empty_places_cover_nothing(self):
        scores, relevant = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
        exclude = torch.tensor([[True, False, True]])
        values = evaluate((scores, relevant, exclude), metrics=("coverage@3",), n_items=3).compute()
        assert values["coverage@3"].item() == pytest.approx(1 / 3)

    def test_wrong_shapes(self):
        metric = RankingMetrics(n_items=40)
        with pytest.raises(ValueError, match=r"scores must be \(users, 40 items\), got \(2, 39\)"):
            metric.update(torch.zeros(2, 39), torch.zeros(2, 39, dtype=torch.bool))
        with pytest.raises(ValueError, match="relevant must be bool"):
            metric.update(torch.zeros(2, 40), torch.zeros(1, 40, dtype=torch.bool))

    def test_nan_leaves_the_sums_as_they_were(self):
        metric = evaluate(users(10))
        before = metric.compute()
        with pytest.raises(UserError, match="NaN"):
            metric.update(torch.full((1, 40), math.nan), torch.ones(1, 40, dtype=torch.bool))
        assert metric.n_users == before["n_users"]


class TestOneRelevantItemAUser:
    """Next-item protocols hold out one item a user; its index must mean the same as a row of a mask."""

    def test_an_index_is_a_mask_with_one_item(self):
        generator = torch.Generator().manual_seed(0)
        scores = torch.randint(0, 9, (200, 30), generator=generator).float()  # many ties
        target = torch.randint(0, 30, (200,), generator=generator)
        exclude = torch.rand(200, 30, generator=generator) < 0.3
        mask = torch.nn.functional.one_hot(target, 30).bool()
        names = ("hr@1", "hr@10", "ndcg@10", "mrr@5", "coverage@3")
        by_index, by_mask = (RankingMetrics(names, n_items=30) for _ in range(2))
        by_index.update(scores, target, exclude)
        by_mask.update(scores, mask, exclude)
        assert by_index.compute() == by_mask.compute()

    def test_no_item_counts_as_a_user_without(self):
        metric = RankingMetrics(("hr@1",), n_items=3)
        metric.update(torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]), torch.tensor([0, -1]))
        assert metric.compute() == {"hr@1": 1, "n_users": 2, "n_users_without_relevant": 1}

    def test_an_empty_place_is_no_hit(self):
        top = torch.tensor([[0, -1]])
        assert per_user(top, torch.tensor([-1]), ["hr@2"])["hr@2"].isnan()
        assert per_user(top, torch.tensor([1]), ["hr@2"])["hr@2"].item() == 0

    @pytest.mark.parametrize("target", [torch.tensor([0.0]), torch.tensor([0, 1])])
    def test_it_must_be_an_index_for_each(self, target):
        with pytest.raises(ValueError, match="must be int64 of shape"):
            per_user(torch.tensor([[0, 1]]), target, ["hr@1"])


class TestPopularity:
    def test_is_the_mean_training_count_of_what_is_recommended(self):
        counts = torch.tensor([10, 0, 4])
        metric = RankingMetrics(("popularity@2",), n_items=3, item_counts=counts)
        scores = torch.tensor([[3.0, 2, 1], [1.0, 2, 3]])
        metric.update(scores[:1], torch.tensor([0]))
        metric.update(scores[1:], torch.tensor([0]))
        assert metric.compute()["popularity@2"].item() == (10 + 0 + 4 + 0) / 4

    def test_needs_the_counts(self):
        with pytest.raises(UserError, match="needs the items' training counts"):
            RankingMetrics(("popularity@2",), n_items=3)
