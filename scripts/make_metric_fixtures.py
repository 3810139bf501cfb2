"""Write random cases, and their metrics by a peer's own code, to tests/fixtures/metrics_<peer>.npz.

    <folder>/rectools/bin/python scripts/make_metric_fixtures.py rectools
    <folder>/recbole/bin/python scripts/make_metric_fixtures.py recbole

The environments are those of benchmarks/peers/install.py. Scores are small integers, so most cases have ties. NumPy
ranks the items that the peer is given: by score, equal scores by index. The file holds only numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
CUTS = (1, 5, 10)
SIZES = {7: 500, 40: 500, 150: 500}  # items -> cases; each case is a user
WORST = 10  # most relevant items of a user

Cases = dict[str, np.ndarray]


def make_cases(rng: np.random.Generator, n_items: int, n_users: int, *, exclude: bool) -> Cases:
    """Draw scores with few, some or hardly any ties, 1 to 10 relevant items, and up to half of the rest excluded."""
    levels = rng.choice([2, 5, 100], size=(n_users, 1))
    scores = rng.integers(0, levels, size=(n_users, n_items)).astype(np.int8)
    order = rng.random((n_users, n_items)).argsort(1).argsort(1)
    relevant = order < rng.integers(1, min(WORST, n_items) + 1, size=(n_users, 1))
    share = rng.choice([0.0, 0.2, 0.5], size=(n_users, 1)) if exclude else 0.0
    excluded = rng.random((n_users, n_items)) < share
    return {"scores": scores, "relevant": relevant, "excluded": excluded}


def rank(cases: Cases) -> list[np.ndarray]:
    """Rank each user's items, best first, without the excluded ones."""
    rankings = []
    for scores, excluded in zip(cases["scores"], cases["excluded"], strict=True):
        order = np.lexsort((np.arange(scores.size), -scores.astype(int)))
        rankings.append(order[~excluded[order]])
    return rankings


def rectools(cases: Cases) -> dict[str, np.ndarray]:
    import pandas as pd
    from rectools import Columns
    from rectools.metrics import MAP, MRR, NDCG, CatalogCoverage, HitRate, Precision, Recall

    rankings = rank(cases)
    n_users, n_items = cases["scores"].shape
    rows = [
        (user, item, place) for user, r in enumerate(rankings) for place, item in enumerate(r, 1)
    ]
    reco = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Rank])
    owner, item = cases["relevant"].nonzero()
    interactions = pd.DataFrame({Columns.User: owner, Columns.Item: item})
    expected = {}
    for k in CUTS:
        metrics = {
            f"p@{k}": Precision(k=k),
            f"r@{k}": Recall(k=k),
            f"hr@{k}": HitRate(k=k),
            f"mrr@{k}": MRR(k=k),
            f"ndcg@{k}": NDCG(k=k, divide_by_achievable=True),
        }
        if k >= WORST:  # RecTools divides by the relevant items, we divide by at most k
            metrics[f"map@{k}"] = MAP(k=k)
        for name, metric in metrics.items():
            values = metric.calc_per_user(reco, interactions)
            expected[name] = values.reindex(range(n_users)).to_numpy()
        coverage = CatalogCoverage(k=k, normalize=True).calc(reco, range(n_items))
        expected[f"coverage@{k}"] = np.array(coverage)
    return expected


def recbole(cases: Cases) -> dict[str, np.ndarray]:
    from recbole.config import Config
    from recbole.evaluator import metrics

    config = Config(
        model="Pop",
        dataset="ml-100k",
        config_dict={"topk": list(CUTS), "metrics": ["Hit"], "use_gpu": False},
    )
    hit = np.stack(
        [relevant[r] for r, relevant in zip(rank(cases), cases["relevant"], strict=True)]
    )
    n_relevant = cases["relevant"].sum(1)
    expected = {}
    for name, kind, given in (
        ("p", metrics.Precision, (hit,)),
        ("r", metrics.Recall, (hit, n_relevant)),
        ("hr", metrics.Hit, (hit,)),
        ("mrr", metrics.MRR, (hit,)),
        ("ndcg", metrics.NDCG, (hit, n_relevant)),
        ("map", metrics.MAP, (hit, n_relevant)),
    ):
        values = kind(config).metric_info(*given)
        for k in CUTS:
            if k <= hit.shape[1]:
                expected[f"{name}@{k}"] = values[:, k - 1].astype(np.float64)
    return expected


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=["rectools", "recbole"])
    peer = parser.parse_args().peer
    rng = np.random.default_rng(0)
    stored = {}
    for n_items, n_users in SIZES.items():
        cases = make_cases(rng, n_items, n_users, exclude=peer == "rectools")
        expected = {"rectools": rectools, "recbole": recbole}[peer](cases)
        for name, array in (cases | expected).items():
            stored[f"{n_items}/{name}"] = (
                np.packbits(array, axis=1) if array.dtype == bool else array
            )
    path = FIXTURES / f"metrics_{peer}.npz"
    np.savez_compressed(path, **stored)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
