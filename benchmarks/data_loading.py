"""Measure what data costs in two-tower training: preparing a dataset, and a batch beside a training step.

    python benchmarks/data_loading.py [--json FILE] [--backbone transformer] [--threads 1] [--workers 2]

For each case: seconds to prepare the dataset; milliseconds of a batch from our loader (a slice of prepared arrays), of
a batch that ``--workers`` processes make ahead, of a batch that ``torch.utils.data.DataLoader`` collates from the same
rows one by one, and of a training step (forward, backward, Adam) of the published model. The bar: a batch costs at
most 5% of a step. All are medians; batches are timed in whole passes, so that an epoch's cost of its order is
included.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from hydra import compose, initialize_config_dir
from torch.utils.data import DataLoader, Dataset

from recsys_ssm.batches import PairBatch
from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.data.two_tower import PairLoader, TwoTowerData
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.assemble import make_data, make_model

BAR = 0.05


class Rows(Dataset):
    """The same pairs as rows, for the loader that collates them."""

    def __init__(self, loader: PairLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return self.loader.pairs.user.numel()

    def __getitem__(self, index: int) -> PairBatch:
        user, item, target = (array[index] for array in self.loader.pairs)
        users, items = self.loader.users, self.loader.items
        return PairBatch(
            type(users)(*(x[user] for x in users)),
            type(items)(*(x[item] for x in items)),
            target,
            user,
            item,
        )


def table_of(rows: int, folder: Path) -> list[str]:
    """Write a shop of ``rows`` interactions as CSV files; return the overrides that read them."""
    rng = np.random.default_rng(0)
    n_users, n_items = rows // 10, 20_000
    pl.DataFrame(
        {
            "user_id": rng.integers(0, n_users, rows),
            "item_id": (rng.pareto(1.2, rows) * 50).astype(int) % n_items,
        }
    ).write_csv(folder / "rows.csv")
    pl.DataFrame(
        {
            "user_id": np.arange(n_users),
            "age": rng.normal(40, 10, n_users),
            "town": rng.integers(0, 500, n_users),
        }
    ).write_csv(folder / "users.csv")
    pl.DataFrame(
        {
            "item_id": np.arange(n_items),
            "price": rng.exponential(20, n_items),
            "kind": rng.integers(0, 50, n_items),
        }
    ).write_csv(folder / "items.csv")
    return [
        "dataset=table",
        *(f"dataset.{what}={folder / what}.csv" for what in ("users", "items")),
        f"dataset.interactions={folder / 'rows.csv'}",
        "dataset.user_numeric=[age]",
        "dataset.user_categorical=[town]",
        "dataset.item_numeric=[price]",
        "dataset.item_categorical=[kind]",
    ]


def milliseconds(call: Callable[[], Any], times: int) -> float:
    """Return the median of ``times`` calls, after one call to warm up."""
    call()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def per_batch(loader: Iterable[PairBatch], batches: int) -> float:
    """Return the milliseconds of a batch, over passes of at most ``batches``."""
    n = sum(1 for _ in islice(loader, batches))
    return milliseconds(lambda: [None for _ in islice(loader, batches)], 3) / n


def measure(
    name: str, overrides: list[str], backbone: str, steps: int, workers: int
) -> dict[str, Any]:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(
            "train", [*overrides, f"backbone={backbone}", "name=benchmark", "output_dir=."]
        )
    start = time.perf_counter()
    data: TwoTowerData = make_data(cfg)
    data.setup()
    prepared = time.perf_counter() - start
    model: Any = make_model(cfg, data)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loader = data.train_dataloader()
    batch = next(iter(loader))

    def step() -> None:
        optimizer.zero_grad()
        model._loss(batch).backward()  # training_step logs to a trainer
        optimizer.step()

    collated = DataLoader(Rows(loader), batch_size=loader.batch_size, shuffle=True)
    batch_ms, step_ms = per_batch(loader, len(loader)), milliseconds(step, steps)
    ahead = data.train_dataloader()
    ahead.num_workers = workers
    return {
        "case": name,
        "backbone": backbone,
        "batch_size": loader.batch_size,
        "pairs": loader.pairs.user.numel(),
        "prepare_s": prepared,
        "batch_ms": batch_ms,
        "worker_batch_ms": per_batch(ahead, 500),
        "collated_batch_ms": per_batch(collated, 50),
        "step_ms": step_ms,
        "share": batch_ms / step_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--backbone", default="mamba")
    parser.add_argument("--rows", type=int, default=1_000_000, help="interactions of the table")
    parser.add_argument(
        "--steps", type=int, default=10, help="training steps to take the median of"
    )
    parser.add_argument("--threads", type=int, help="threads of PyTorch; default: one a core")
    parser.add_argument("--workers", type=int, default=2, help="processes that make batches ahead")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    register_resolvers()

    with tempfile.TemporaryDirectory() as folder:
        table = table_of(args.rows, Path(folder))
        results = [
            measure(name, overrides, args.backbone, args.steps, args.workers)
            for name, overrides in (
                ("spotify", ["dataset=spotify"]),
                (f"table, {args.rows:,} rows", table),
                (f"table, {args.rows:,} rows, batch 1024", [*table, "dataset.batch_size=1024"]),
            )
        ]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"{'case':36} {'prepare':>9} {'batch':>9} {'workers':>9} {'collated':>9} {'step':>10} {'batch/step':>10}"
    )
    for row in results:
        print(
            f"{row['case']:36} {row['prepare_s']:7.2f} s {row['batch_ms']:6.3f} ms "
            f"{row['worker_batch_ms']:6.2f} ms {row['collated_batch_ms']:6.2f} ms "
            f"{row['step_ms']:7.1f} ms {row['share']:10.2%}"
            + ("" if row["share"] <= BAR else f"  above the bar of {BAR:.0%}")
        )
    if args.json:
        machine = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
