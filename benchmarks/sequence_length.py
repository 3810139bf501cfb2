"""Time training steps of the next-item models with long histories.

    python benchmarks/sequence_length.py [--lengths 50 200 1000] [--rows 16] [--json FILE]

Each row is one history of the given length over ML-1M's 3,416 items. Models are those of `dataset=ml_1m`, with a
target at every position and the softmax over all items. They take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from configs import config
from timing import let_threads_sleep, machine, peak_memory, table, take_turns, write_json

from recsys_ssm.batches import SequenceBatch
from recsys_ssm.run.assemble import make_model

N_ITEMS = 3416


def step_of(backbone: str, length: int, rows: int) -> Callable[[], None]:
    """Return a function that makes a training step."""
    cfg = config(
        [
            "dataset=ml_1m",
            f"backbone={backbone}",
            f"dataset.max_length={length}",
            f"dataset.batch_positions={length}",
        ]
    )
    splits: Any = SimpleNamespace(
        histories=None,
        item_ids=[str(i) for i in range(N_ITEMS)],
        item_schema=None,
        items=None,
        item_counts=torch.ones(N_ITEMS, dtype=torch.long),
        repeat_share=0.0,
    )
    data: Any = SimpleNamespace(splits=splits, max_length=length, objective="all", name="random")
    torch.manual_seed(0)
    model = make_model(cfg, data)
    optimizer: Any = model.configure_optimizers()
    item = torch.randint(N_ITEMS, (rows, length + 1))
    batch = SequenceBatch(
        item=item[:, :-1],
        seq_idx=torch.zeros(rows, length, dtype=torch.long),
        position=torch.arange(length).expand(rows, -1),
        target=item[:, 1:],
    )

    def step() -> None:
        loss, _ = model._loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[50, 200, 1000])
    parser.add_argument("--backbones", nargs="+", default=["mamba", "mamba2", "transformer"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same as JSON")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    steps = {
        (backbone, length): step_of(backbone, length, args.rows)
        for length in args.lengths
        for backbone in args.backbones
    }
    timings = take_turns(
        {f"{backbone} {length}": step for (backbone, length), step in steps.items()},
        args.repetitions,
        budget=60,
    )
    rows = []
    for (backbone, length), step in steps.items():
        timing, first = timings[f"{backbone} {length}"], timings[f"{backbone} {args.lengths[0]}"]
        rows.append(
            {
                "backbone": backbone,
                "length": length,
                "wall ms": timing.wall,
                "cpu ms": timing.cpu,
                f"x length {args.lengths[0]}": timing.cpu / first.cpu,
                "peak MiB": peak_memory(step),
            }
        )
    print(table(rows))
    if args.json:
        write_json(
            args.json,
            {"rows": args.rows, "threads": args.threads, "machine": machine(), "table": rows},
        )


if __name__ == "__main__":
    let_threads_sleep()
    main()
