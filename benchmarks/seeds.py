"""Measure seeds that are trained at once against single runs, with the published recipe.

    python benchmarks/seeds.py [--dataset spotify] [--backbones mamba transformer] [--seeds 1 2 4 8] [--json FILE]

A step is batch, forward, backward and optimizer. The contenders take turns: single runs with all threads, and K seeds
at once with the same threads. A third contender, the other way to use the cores, is one single run per thread, side by
side. Prints medians of wall time and of processor time, per seed and step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from timing import Timing, let_threads_sleep, machine, table, take_turns, write_json

from recsys_ssm.batched_seeds.data import SeedsData
from recsys_ssm.batched_seeds.model import Seeds
from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.data.two_tower import TwoTowerData
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.assemble import make_data, make_model


def config(dataset: str, backbone: str, seed: int = 0) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(
            "train",
            [
                f"dataset={dataset}",
                f"backbone={backbone}",
                f"seed={seed}",
                "name=benchmark",
                "output_dir=.",
            ],
        )


def single_step(cfg: DictConfig, data: TwoTowerData) -> Callable[[], None]:
    """Return a function that makes the next step of a single run."""
    model = make_model(cfg, data)
    return _step(model, model._loss, iter(data.train_dataloader()))


def seeds_step(cfg: DictConfig, parts: list[TwoTowerData]) -> Callable[[], None]:
    """Return a function that makes the next step of all the parts' seeds at once."""
    models = Seeds([make_model(cfg, data) for data in parts], range(len(parts)))
    return _step(
        models, lambda batch: models(batch).sum(), iter(SeedsData(parts).train_dataloader())
    )


def _step(model: Any, loss_of: Callable[[Any], torch.Tensor], batches: Iterator[Any]) -> Any:
    optimizer = model.configure_optimizers()
    again = cycle(islice(batches, 200))

    def step() -> None:
        optimizer.zero_grad()
        loss_of(next(again)).backward()
        optimizer.step()

    return step


def side_by_side(
    dataset: str, backbone: str, n_processes: int, barrier: Any, steps: int, seconds: Any
) -> None:
    """Time single-thread steps between two barriers, in one process of :func:`processes`."""
    torch.set_num_threads(1)
    cfg = config(dataset, backbone)
    step = single_step(cfg, make_data(cfg))
    for _ in range(3):
        step()
    barrier.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    cpu = time.process_time() - cpu
    barrier.wait()
    seconds.put((1e3 * (time.perf_counter() - wall) / steps / n_processes, 1e3 * cpu / steps))


def processes(dataset: str, backbone: str, n_processes: int, steps: int) -> Timing:
    """Time single runs side by side, in processes of one thread each: milliseconds per seed and step."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(n_processes), context.Queue()
    arguments = (dataset, backbone, n_processes, barrier, steps, seconds)
    runs = [context.Process(target=side_by_side, args=arguments) for _ in range(n_processes)]
    for run in runs:
        run.start()
    found = [seconds.get() for _ in runs]
    for run in runs:
        run.join()
    return Timing(*(statistics.mean(each) for each in zip(*found, strict=True)), steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="spotify")
    parser.add_argument("--backbones", nargs="+", default=["mamba", "transformer"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--no-processes", action="store_true", help="leave out the last contender")
    parser.add_argument(
        "--spin",
        action="store_true",
        help="let threads spin as the commands do, in place of sleeping",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same as JSON")
    args = parser.parse_args()

    rows = []
    torch.set_num_threads(args.threads)
    for backbone in args.backbones:
        cfg = config(args.dataset, backbone)
        parts = [make_data(config(args.dataset, backbone, seed)) for seed in range(max(args.seeds))]
        steps = {"single": single_step(cfg, parts[0])}
        steps |= {f"K={n}": seeds_step(cfg, parts[:n]) for n in args.seeds}
        timings = take_turns(steps, args.repetitions, budget=60)
        if not args.no_processes:
            timings["processes of one thread"] = processes(
                args.dataset, backbone, args.threads, args.repetitions
            )
        for name, timing in timings.items():
            n = int(name[2:]) if name.startswith("K=") else 1
            rows.append(
                {
                    "backbone": backbone,
                    "": name,
                    "wall ms": timing.wall / n,
                    "cpu ms": timing.cpu / n,
                    "x wall": timings["single"].wall / (timing.wall / n),
                    "x cpu": timings["single"].cpu / (timing.cpu / n),
                }
            )
    print(table(rows))
    if args.json:
        write_json(
            args.json,
            {
                "dataset": args.dataset,
                "threads": args.threads,
                "machine": machine(),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    let_threads_sleep(unless="--spin")
    main()
