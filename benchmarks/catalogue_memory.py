"""Measure the memory of a training step with a large catalogue: the whole softmax over a million items.

    python benchmarks/catalogue_memory.py [--items 1000000] [--positions 4096] [--json FILE]

The figure is the peak memory of whole steps (forward, backward, Adam) in this process, less weights, their gradient
and Adam's two moments. Beside it stands the memory that all logits of the batch would take at once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from configs import config
from timing import let_threads_sleep, machine, peak_memory, table, write_json

from recsys_ssm.batches import SequenceBatch
from recsys_ssm.run.assemble import make_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--backbone", default="mamba2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same as JSON")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    cfg = config(["dataset=amazon_beauty_2014", f"backbone={args.backbone}"])
    splits: Any = SimpleNamespace(
        histories=None,
        item_ids=range(args.items),
        item_schema=None,
        items=None,
        item_counts=torch.ones(args.items, dtype=torch.long),
        repeat_share=0.0,
    )
    data: Any = SimpleNamespace(splits=splits, max_length=64, objective="all", name="random")
    model = make_model(cfg, data)
    optimizer: Any = model.configure_optimizers()
    rows = max(1, args.positions // 64)
    item = torch.randint(args.items, (rows, 65))
    batch = SequenceBatch(
        item=item[:, :-1],
        seq_idx=torch.zeros(rows, 64, dtype=torch.long),
        position=torch.arange(64).expand(rows, -1),
        target=item[:, 1:],
    )
    seconds = []

    def steps() -> None:
        for _ in range(2):  # Adam allocates its moments in the first step
            start = time.perf_counter()
            loss, _ = model._loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)

    mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    peak = peak_memory(steps)
    row = {
        "items": args.items,
        "positions": rows * 64,
        "weights MiB": mib,
        "peak beyond weights, gradient, moments MiB": None if peak is None else peak - 3 * mib,
        "all logits MiB": rows * 64 * args.items * 4 / 2**20,
        "s a step": seconds[-1],
    }
    print(table([row]))
    if args.json:
        write_json(args.json, {"machine": machine(), "table": [row]})


if __name__ == "__main__":
    let_threads_sleep()
    main()
