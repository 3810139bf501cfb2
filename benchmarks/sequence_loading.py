"""Measure what data costs in next-item training: preparing a file, and an epoch's batches beside its training steps.

    python benchmarks/sequence_loading.py [--datasets amazon_beauty_2014 …] [--rows 2000000] [--json FILE]

For each dataset and objective: seconds to prepare it and to load it from the cache; milliseconds of an epoch's order
and of a batch; the share of positions that is padding, packed here and padded to the longest window of the batch as
elsewhere; a batch as PyTorch's DataLoader collates it, sample by sample; and a training step of the configured model.
The bars: loading costs at most 5% of a step, padding is below 3%. A generated file of ``--rows`` events shows how the
cost of preparing grows, in seconds and in peak memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from timing import let_threads_sleep, machine, peak_memory, table, take_turns, write_json
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.data.sequences import SequenceLoader
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.assemble import make_data, make_model

BAR_TIME, BAR_PADDING = 0.05, 0.03


class Samples(Dataset):
    """The same windows one at a time, for the loader that collates and pads them."""

    def __init__(self, loader: SequenceLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader.windows)

    def __getitem__(self, index: int) -> torch.Tensor:
        start, stop = self.loader.windows.at(np.array([index]))
        return torch.from_numpy(self.loader.events[start[0] : stop[0] + 1].astype(np.int64))


def padded(samples: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    item = pad_sequence(samples, batch_first=True, padding_value=-1)
    return item[:, :-1], item[:, 1:]


def measure(dataset: str, objective: str, backbone: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        overrides = [f"dataset={dataset}", f"backbone={backbone}", "name=benchmark"]
        overrides += [f"dataset.objective={objective}", "output_dir=."]
        cfg = compose("train", overrides)
    with tempfile.TemporaryDirectory() as folder:
        OmegaConf.update(cfg, "dataset.cache_dir", folder, force_add=True)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            data: Interactions = make_data(cfg)
            data.setup()
            seconds.append(time.perf_counter() - start)
        loader = data.train_dataloader()
        batches = list(islice(loader, 100))
        batch = batches[0]
        valid = sum(int((one.item >= 0).sum()) for one in batches)
        windows_a_batch = len(loader.windows) // len(loader)
        collated = DataLoader(
            Samples(loader), batch_size=windows_a_batch, shuffle=True, collate_fn=padded
        )
        padding = [(int((item >= 0).sum()), item.numel()) for item, _ in islice(collated, 20)]
        model = make_model(cfg, data)
        optimizer: Any = model.configure_optimizers()
        at = loader._begin(np.random.default_rng(0))

        def step() -> None:
            optimizer.zero_grad()
            model._loss(batch)[0].backward()  # training_step logs to a trainer
            optimizer.step()

        times = take_turns(
            {
                "order": lambda: loader._begin(np.random.default_rng(0)),
                "20 batches": lambda: [at(i) for i in range(min(20, len(loader)))],
                "collated batch": lambda: next(iter(collated)),
                "step": step,
            },
            repetitions=9,
            budget=10,
        )
    epoch_ms = times["order"].cpu + times["20 batches"].cpu / min(20, len(loader)) * len(loader)
    histories = list(islice(data.test_dataloader(), 20))
    cells = sum(one.item.numel() for one in histories)
    return {
        "dataset": dataset,
        "objective": objective,
        "prepare s": seconds[0],
        "again s": seconds[1],
        "batches": len(loader),
        "items a batch": valid / len(batches),
        "order ms": times["order"].cpu,
        "batch ms": times["20 batches"].cpu / min(20, len(loader)),
        "collated ms": times["collated batch"].cpu,
        "step ms": times["step"].cpu,
        "share of a step": epoch_ms / len(loader) / times["step"].cpu,
        "padding": loader.padding_share,
        "padding collated": 1 - sum(n for n, _ in padding) / sum(n for _, n in padding),
        "padding ranking": 1 - sum(int((one.item >= 0).sum()) for one in histories) / cells,
    }


def measure_large(n: int) -> dict[str, Any]:
    """Prepare a CSV of ``n`` events, five to a thousand a user, every prefix a sample."""
    rng = np.random.default_rng(0)
    n_users = n // 100
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.csv"
        pl.DataFrame(
            {
                "user_id": rng.integers(0, n_users, n) + 10**12,
                "item_id": (rng.pareto(1.2, n) * 50).astype(int) % 100_000,
                "timestamp": rng.integers(1_500_000_000, 1_600_000_000, n),
            }
        ).write_csv(path)
        seconds: dict[str, float] = {}

        def prepare(what: str) -> Interactions:
            start = time.perf_counter()
            data = Interactions(interactions=path, k_core=5, objective="last", cache_dir=folder)
            next(iter(data.train_dataloader()))
            seconds[what] = time.perf_counter() - start
            return data

        peak = peak_memory(lambda: prepare("first batch s"))
        again = peak_memory(lambda: prepare("again s"))
        return {
            "events": n,
            "samples": len(prepare("again s").train_dataloader().windows),
            "file MB": path.stat().st_size / 1e6,
            **seconds,
            "peak MiB": peak,
            "again peak MiB": again,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="*", default=["amazon_beauty_2014", "ml_100k"])
    parser.add_argument("--objectives", nargs="*", default=["all", "last"])
    parser.add_argument("--backbone", default="mamba")
    parser.add_argument(
        "--rows", type=int, default=2_000_000, help="events of the generated file; 0: none"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    let_threads_sleep()
    torch.set_num_threads(args.threads)
    register_resolvers()

    results = [
        measure(dataset, objective, args.backbone)
        for dataset in args.datasets
        for objective in args.objectives
    ]
    print(table(results))
    for row in results:
        for column, bar in (("share of a step", BAR_TIME), ("padding", BAR_PADDING)):
            if row[column] > bar:
                print(f"{row['dataset']}, {row['objective']}: {column} above the bar of {bar:.0%}")
    large = [measure_large(args.rows)] if args.rows else []
    if large:
        print(table(large))
    if args.json:
        write_json(args.json, {"machine": machine(), "datasets": results, "large": large})


if __name__ == "__main__":
    main()
