"""Make run folders like those of finished runs in milliseconds: figures are drawn at random, nothing is trained."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import polars as pl
import yaml

from recsys_ssm.reports.shipped import compose_shipped
from recsys_ssm.run.files import write_json, write_table, write_text

LEVELS = {"mamba": 0.9, "transformer": 0.8, "mamba2": 0.85, "hydra": 0.7}
METRICS = ("p@5", "p@10", "r@5", "r@10", "mrr@5", "mrr@10", "hr@1", "hr@5", "hr@10", "ndcg@10")


def fake_run(
    root: Path,
    dataset: str = "spotify",
    backbone: str = "mamba",
    seed: int = 0,
    cell: tuple[int, int] | None = None,
    level: float | None = None,
    generated: bool = False,
    options: dict[str, object] | None = None,
    n_items: int = 50,
    overrides: tuple[str, ...] = (),
    data: dict[str, str] | None = None,
) -> Path:
    """Make a run's folder with everything but checkpoints; its figures lie around ``level``."""
    random = np.random.default_rng([seed, len(backbone), *(cell or ())])
    level = LEVELS[backbone] if level is None else level
    grid = zip(("dataset.k", "dataset.n_messages"), cell or (), strict=False)
    config = copy.deepcopy(compose_shipped(dataset, backbone, tuple(grid)))
    is_next_item = config["dataset"]["_target_"].endswith("Interactions")
    for key, value in {"seed": seed, **(options or {})}.items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    name = f"{dataset}-{backbone}-seed{seed}"
    folder = root / f"{name}-{abs(hash((cell, str(options)))) % 10**6}"
    folder.mkdir(parents=True)
    write_text(folder / "config.yaml", yaml.safe_dump(config))

    # One part that all models of a seed share, and one of each model.
    shared = np.random.default_rng(seed).normal(0, 0.02)
    draw = lambda: float(np.clip(level + shared + random.normal(0, 0.005), 0, 1))  # noqa: E731
    metrics = {metric: draw() for metric in METRICS}
    counts = {"n_users": 100.0, "n_users_without_relevant": 2.0 if dataset == "spotify" else 0.0}
    baselines = {
        "oracle": dict.fromkeys(METRICS, 1.0),
        "popularity": dict.fromkeys(METRICS, 0.3 + shared),
    }
    results = {
        "name": name,
        "dataset": dataset,
        "generated": generated,
        "seed": seed,
        "steps": 5000,
        "train_seconds": 600.0 + seed,
        "parameters": {"backbone_per_tower": 1000, "total": 2100},
        "cost": {
            "seconds_per_step": 0.05,
            "steps_per_second": 20.0,
            "peak_memory_bytes": 2**29,
            "threads": 1,
            "device": "cpu",
            "machine": "A Processor",
        },
        "overrides": [
            f"dataset={dataset}",
            f"backbone={backbone}",
            f"seed={seed}",
            "logger=none",
            *overrides,
        ],
        "versions": {"recsys-ssm": "0.1.0", "torch": "2.13.0"},
        "notes": [],
        "published": {},
        "metrics": metrics | counts,
        "metrics_all_users": {m: v * 0.98 for m, v in metrics.items()} | counts,
        "baselines": baselines,
    }
    if data is not None:
        results["data"] = data
    if is_next_item:
        results["metrics_unfiltered"] = results.pop("metrics_all_users")
        results["parameters"] = {"without_embeddings": 72256, "total": 290944}
        results["latency"] = {"users_1": 0.002, "users_256": 0.3}
    write_json(folder / "metrics.json", results)
    history = [{"step": 1, "train/loss": 1.0}]
    for step in range(250, 5001, 250):
        grown = level * (1 - np.exp(-step / 800)) + shared * 0.5 + random.normal(0, 0.01)
        value = float(np.clip(grown, 0, 1))
        history.append(
            {"step": step, "seconds": step * 0.05, "val/loss": 1 - value}
            | {f"val/{metric}": value for metric in METRICS}
        )
    write_json(folder / "history.json", history)
    likes = np.sort(random.dirichlet(np.ones(n_items)))[::-1]
    n_relevant = random.integers(1, 20, size=100)
    relevant = [random.choice(n_items, n, replace=False, p=likes).tolist() for n in n_relevant]
    recommended = [
        (found + [i for i in range(n_items) if i not in found])[:20]
        if random.random() < level
        else random.permutation(n_items)[:20].tolist()
        for found in relevant
    ]
    users = pl.DataFrame(
        {
            "user": range(100),
            "n_relevant": n_relevant,
            "recommended": recommended,
            "relevant": relevant,
        }
    )
    write_table(folder / "test_users.parquet", users)
    items = pl.DataFrame(
        {"item": [f"i{i}" for i in range(n_items)], "train_count": range(n_items, 0, -1)}
    )
    write_table(folder / "items.parquet", items)
    return folder
