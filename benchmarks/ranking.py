"""Time the ranking of the catalogue for many users: our kernel, plain PyTorch, and product with topk.

    python benchmarks/ranking.py [--shapes 512,12101,64 …] [--threads 1 2] [--json FILE]

A shape is users, items and vector size. The ranking has 20 places, and 8 items of each user are left out. "product
alone" is ``query @ items.T`` without a ranking, and GFLOP/s count the product. Vectors are random.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timing import let_threads_sleep, machine, peak_memory, table, take_turns, write_json
from torch import Tensor

from recsys_ssm.ops import describe_backends
from recsys_ssm.ops.rank_products import _by_user, _reference, rank_products

SHAPES = ("1,12101,64", "256,12101,64", "4096,12101,64", "256,1000000,64")
PLACES, SEEN = 20, 8


def topk(query: Tensor, items: Tensor, user: Tensor, item: Tensor) -> Tensor:
    scores = query @ items.T
    scores[user, item] = -torch.inf
    return scores.topk(PLACES).indices


def measure(shape: str, threads: int, repetitions: int, budget: float) -> list[dict[str, Any]]:
    n_users, n_items, dim = map(int, shape.split(","))
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    query, items = (torch.randn(n, dim, generator=generator) for n in (n_users, n_items))
    user = torch.arange(n_users).repeat_interleave(SEEN)
    item = torch.randint(n_items, (user.numel(),), generator=generator)
    pairs = _by_user(user, item, n_users, n_items)
    contenders = {
        "rank_products": lambda: rank_products(
            query, items, PLACES, (user, item), everything=False
        ),
        "plain PyTorch": lambda: _reference(query, items, PLACES, pairs, False),
        "product, topk": lambda: topk(query, items, user, item),
        "product alone": lambda: query @ items.T,
    }
    with torch.no_grad():
        times = take_turns(contenders, repetitions, budget)
        return [
            {
                "users, items, size": shape,
                "threads": threads,
                "contender": name,
                "ms": timing.wall,
                "CPU ms": timing.cpu,
                "x": timing.wall / times["rank_products"].wall,
                "GFLOP/s": 2e-6 * n_users * n_items * dim / timing.wall,
                "peak MiB": peak_memory(contenders[name]),
            }
            for name, timing in times.items()
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--budget", type=float, default=10, help="seconds a contender, about")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        for threads in args.threads:
            rows += measure(shape, threads, args.repetitions, args.budget)
    print(table(rows))
    if args.json:
        facts = {"machine": machine(), "backends": describe_backends()}
        write_json(args.json, {**facts, "rows": rows})


if __name__ == "__main__":
    let_threads_sleep()
    main()
