"""Measure H&M in full size: reading, training by backbone, and the best 12 articles for customers.

    python benchmarks/hm_full.py FOLDER [--backbones identity mamba …] [--steps 200] [--users 16384] [--json FILE]

FOLDER has the three files, official or generated in the official size (docs/hm.md). Training is a step of the model and
of its optimizer with the batch that the loader makes, by the wall clock and by this process's CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from configs import config
from timing import machine, write_json

from recsys_ssm.batches import Selection
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.run.assemble import make_data, make_model


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Clock:
    """Measure seconds of the wall clock and of the process."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def train(model: TwoTower, data: Any, steps: int) -> tuple[float, float]:
    """Return interactions for each second of the wall clock and of the process."""
    model.loss.set_item_counts(data.item_counts())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    batches = iter(data.train_dataloader())
    clock = Clock()
    for step in range(steps + 10):
        if step == 10:
            clock = Clock()
        optimizer.zero_grad(set_to_none=True)
        model._loss(next(batches)).backward()
        optimizer.step()
    return tuple(steps * data.batch_size / seconds for seconds in clock.stop())  # type: ignore[return-value]


def recommend(model: TwoTower, data: Any, users: int) -> tuple[float, float]:
    """Return customers for each second of the wall clock and of the process."""
    model.eval()
    model.selection = Selection(k=12, filter_seen=False)
    with model.inference():
        model.on_predict_start()
        clock, done = Clock(), 0
        for batch in data.predict_dataloader():
            model.predict_step(batch)
            done += len(batch.user_index)
            if done >= users:
                break
        rates = tuple(done / seconds for seconds in clock.stop())
        model.on_predict_end()
    return rates  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--backbones", nargs="+", default=["identity", "mamba", "mamba2"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--users", type=int, default=16_384)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    common = ["experiment=two_tower/hm_full", f"dataset.root={options.folder}"]
    clock = Clock()
    data = make_data(config([*common, "dataset.eval_batch_size=512"]))
    n_users = data.splits.users.n_rows
    wall, cpu = clock.stop()
    read = {"users": n_users, "wall s": wall, "CPU s": cpu, "peak GiB": peak_gib()}
    print(json.dumps(read), flush=True)
    rows = []
    for backbone in options.backbones:
        torch.manual_seed(0)
        model = make_model(config([*common, f"backbone={backbone}"]), data)
        assert isinstance(model, TwoTower)
        trained, ranked = train(model, data, options.steps), recommend(model, data, options.users)
        rows.append(
            {
                "backbone": backbone,
                "interactions / s": trained[0],
                "interactions / CPU s": trained[1],
                "customers / s": ranked[0],
                "customers / CPU s": ranked[1],
                "minutes for all": n_users / ranked[0] / 60,
                "peak GiB": peak_gib(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        write_json(options.json, {"machine": machine(), "read": read, "rows": rows})


if __name__ == "__main__":
    main()
