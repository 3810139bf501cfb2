"""Time whole training steps (forward, backward, optimizer) of every backbone.

    python benchmarks/train_step.py [--dataset spotify] [--backbones mamba transformer] [--json FILE]

Each backbone has its published setting for the dataset if there is one. Backbones take turns, step by step, on the
same batches. Figures are medians of wall time and of processor time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from configs import config
from timing import let_threads_sleep, machine, table, take_turns, write_json

from recsys_ssm import ops
from recsys_ssm.data.two_tower import TwoTowerData
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.run.assemble import make_data, make_model


def step_of(dataset: str, backbone: str, data: TwoTowerData) -> tuple[Callable[[], None], int]:
    """Return a function that makes the next training step, and the model's number of parameters."""
    torch.manual_seed(0)
    model = make_model(config([f"dataset={dataset}", f"backbone={backbone}"]), data)
    assert isinstance(model, TwoTower), f"{dataset}: not a dataset of two towers"
    optimizer = model.configure_optimizers()
    batches = cycle(list(islice(data.train_dataloader(), 20)))

    def step() -> None:
        loss = model._loss(next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="spotify")
    parser.add_argument(
        "--backbones", nargs="+", default=["mamba", "mamba2", "hydra", "transformer"]
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument(
        "--spin", action="store_true", help="let waiting threads spin as in a user's run"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same as JSON")
    args = parser.parse_args()

    data: Any = make_data(config([f"dataset={args.dataset}"]))
    print(ops.describe_backends())
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        made = {backbone: step_of(args.dataset, backbone, data) for backbone in args.backbones}
        timings = take_turns(
            {name: step for name, (step, _) in made.items()}, args.repetitions, budget=120
        )
        last = timings[args.backbones[-1]].wall
        rows += [
            {
                "backbone": name,
                "threads": threads,
                "parameters": made[name][1],
                "wall ms": timing.wall,
                "cpu ms": timing.cpu,
                f"x {args.backbones[-1]}": timing.wall / last,
            }
            for name, timing in timings.items()
        ]
    print(table(rows))
    if args.json:
        write_json(args.json, {"dataset": args.dataset, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    let_threads_sleep(unless="--spin")
    main()
