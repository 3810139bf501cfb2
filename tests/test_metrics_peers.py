"""Test that ranking and metrics equal RecTools' and RecBole's on the same scores, ties included.

The numbers come from the peers' own code, by scripts/make_metric_fixtures.py: 1,500 cases each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys_ssm.metrics import RankingMetrics, per_user, rank_top_k

FIXTURES = Path(__file__).parent / "fixtures"
PEERS = ("rectools", "recbole")


def read(peer: str) -> dict[int, dict[str, np.ndarray]]:
    """Read the cases by number of items."""
    found: dict[int, dict[str, np.ndarray]] = {}
    with np.load(FIXTURES / f"metrics_{peer}.npz", allow_pickle=False) as archive:
        for key in archive.files:
            n_items, name = key.split("/")
            found.setdefault(int(n_items), {})[name] = archive[key]
    for n_items, case in found.items():
        for name in ("relevant", "excluded"):
            case[name] = np.unpackbits(case[name], axis=1, count=n_items).astype(bool)
    return found


CASES = {peer: read(peer) for peer in PEERS}


def given(case: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.from_numpy(case["scores"]).to(dtype),
        torch.from_numpy(case["relevant"]),
        torch.from_numpy(case["excluded"]),
    )


@pytest.mark.parametrize("peer", PEERS)
def test_there_are_enough_cases_and_most_have_ties_at_a_cut(peer: str) -> None:
    cases = CASES[peer].values()
    assert sum(len(case["scores"]) for case in cases) >= 1000
    tied = 0
    for case in cases:
        ordered = -np.sort(-case["scores"].astype(int), axis=1)
        tied += sum(
            any(len(row) > k and row[k - 1] == row[k] for k in (1, 5, 10)) for row in ordered
        )
    assert tied > 500


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("n_items", [7, 40, 150])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_each_users_metrics(peer: str, n_items: int, dtype: torch.dtype) -> None:
    case = CASES[peer][n_items]
    scores, relevant, excluded = given(case, dtype)
    names = [name for name in case if "@" in name and not name.startswith("coverage")]
    assert len(names) >= 10
    found = per_user(rank_top_k(scores, 10, excluded), relevant, names)
    for name in names:
        expected = torch.from_numpy(case[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("n_items", [7, 40, 150])
def test_coverage(n_items: int) -> None:
    case = CASES["rectools"][n_items]
    names = [f"coverage@{k}" for k in (1, 5, 10)]
    metrics = RankingMetrics(names, n_items=n_items)
    metrics.update(*given(case, torch.float32))
    for name in names:
        assert metrics.compute()[name].item() == pytest.approx(float(case[name]), abs=1e-12)
