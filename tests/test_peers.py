"""Test the benchmarks beside other packages: their settings exist here, lists and costs are read correctly."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from recsys_ssm.metrics import rank_top_k
from recsys_ssm.run.assemble import check_config

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"
if not PEERS.is_dir():
    pytest.skip("benchmarks/ are in the checkout alone", allow_module_level=True)


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    sys.path.insert(0, str(PEERS))
    try:
        import common
        import compare
    finally:
        sys.path.remove(str(PEERS))
    return {"common": common, "compare": compare}


def test_every_contests_overrides_are_options_of_ours(modules: dict[str, ModuleType]) -> None:
    compare = modules["compare"]
    values = compare.SETTINGS | {"inner": 256, "batch_positions": 1000, "xavier": 0.1}
    kinds = {}
    for name, contest in compare.CONTESTS.items():
        overrides = [text.format(**values) for text in (*contest.ours, *compare.BOTH)]
        cfg = compare.config(["dataset=ml_100k", "logger=none", *overrides])
        check_config(cfg)
        assert cfg.backbone.d_model == 64 and cfg.dataset.batch_positions == 1000, name
        kinds[name] = (cfg.loss.kind, cfg.loss.shared, cfg.loss.negatives)
    assert kinds["sasrec-softmax"][0] == kinds["ligr"][0] == kinds["recbole"][0] == "softmax"
    assert kinds["sasrec-sampled"] == ("sampled_softmax", False, 128)
    assert kinds["sasrec-shared"] == ("sampled_softmax", True, 128)
    assert kinds["sasrec-bce"] == ("bce", False, 1)


def test_lists_are_ranked_as_the_metrics_rank(modules: dict[str, ModuleType]) -> None:
    common = modules["common"]
    rng = np.random.default_rng(0)
    events = np.concatenate([rng.permutation(30)[:6] for _ in range(50)])
    data = common.Data(events, np.arange(0, 301, 6), 30)
    scores = rng.integers(0, 4, size=(50, 30)).astype(np.float32)
    lists = common.top_lists(lambda a, b: scores[a:b], data, "test", block=16)
    seen = torch.zeros(50, 30, dtype=torch.bool)
    for user in range(50):
        assert data.history(user, "val").tolist() == events[6 * user : 6 * user + 4].tolist()
        seen[user, data.history(user, "test")] = True
    expected = rank_top_k(torch.from_numpy(scores), common.PLACES, seen)
    assert torch.equal(torch.from_numpy(lists["unseen"]).long(), expected)
    expected = rank_top_k(torch.from_numpy(scores), common.PLACES)
    assert torch.equal(torch.from_numpy(lists["all"]).long(), expected)


def test_training_events_come_in_order(modules: dict[str, ModuleType]) -> None:
    data = modules["common"].Data(np.arange(10), np.array([0, 4, 10]), 10)
    user, item = data.before(2)
    assert user.tolist() == [0, 0, 1, 1, 1, 1]
    assert item.tolist() == [0, 1, 4, 5, 6, 7]


def test_batches_hold_as_many_positions_as_the_peers(modules: dict[str, ModuleType]) -> None:
    """Two users of 4 and 9 events have 2 and 7 for training.

    That is 1 and 6 inputs, or prefixes of 1 and 1 + 2 + … + 6 items.
    """
    compare = modules["compare"]
    data = {"offsets": np.array([0, 4, 13])}
    one, prefixes = compare.CONTESTS["sasrec-softmax"], compare.CONTESTS["recbole"]
    assert compare.batch_positions(one, 1, data, 50) == 4  # 7 in 2 steps
    assert compare.batch_positions(one, 2, data, 5) == 6
    assert compare.batch_positions(prefixes, 4, data, 50) == 11  # 22 in 2 steps


def test_costs_and_times_to_a_level(modules: dict[str, ModuleType]) -> None:
    compare = modules["compare"]

    def record(seed: int, cpu: float, values: list[float], share: float = 1.0) -> dict[str, object]:
        epochs = [
            {"epoch": i, "cpu": cpu, "wall": 2 * cpu, "share": share}
            for i, _ in enumerate(values, 1)
        ]
        metrics = {
            f"{split}/{i}/{name}": {"ndcg@10": value}
            for i, value in enumerate(values, 1)
            for split in ("val", "test")
            for name in ("all", "unseen")
        }
        return {
            "seed": seed,
            "last": len(values),
            "epochs": epochs,
            "evaluations": [{"cpu": cpu / 2}],
            "metrics": metrics,
            "peak_memory_bytes": cpu * 2**20,
        }

    peer = [record(0, 8.0, [0.1, 0.2]), record(1, 8.0, [0.1, 0.4])]
    ours = [record(0, 2.0, [0.1, 0.21]), record(1, 2.0, [0.1, 0.42])]
    found = compare.compared(peer, ours)
    assert found["epoch x"] == found["evaluation x"] == found["memory x"] == 4
    assert found["test unseen off %"] == pytest.approx(5.0)
    assert found["unseen time-to x"] == 4
    worse = [record(0, 2.0, [0.1, 0.19]), ours[1]]
    assert compare.compared(peer, worse)["all time-to x"] == 0  # it never got there
    reached = compare.time_to(ours[1], 0.4, "unseen")
    assert reached == {"epoch": 2, "cpu": 4.0, "wall": 8.0}
    assert compare.row("c", "peer", peer)["epoch cpu s"] == 8.0
    assert compare.row("c", "peer", peer)["test all N@10"] == pytest.approx(0.3)

    half = [record(0, 8.0, [0.1], share=0.5)]
    costs = compare.row("c", "peer", half)
    assert costs["epoch cpu s"] == 16.0 and "test all N@10" not in costs
    assert set(compare.compared(half, ours)) == {"epoch x", "evaluation x", "memory x"}
