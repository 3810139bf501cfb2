"""Measure recommendations to users whose events come one by one: events a second, and the cost of an event by place.

    python benchmarks/streaming.py [--backbones mamba mamba2 mamba3 transformer] [--threads 1] [--events 100000]

Models have random weights, d_model 64 and 12,000 items, and the layers of Mamba4Rec, 2Mamba4Rec, Mamba-3 and SASRec
(``conf/preset``). "events a second": each of 256 users has one more event and gets the best 10 items of the whole
catalogue, with and without the items that they had. "full pass": the same answers by ``NextItem.recommend``, which
reads the latest 50 events again. The bar: at least 5,000 events a second.

"event 10" and "event N" are milliseconds of one more event of one user with its top 10, after so many events.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from timing import let_threads_sleep, machine, table, write_json

from recsys_ssm import NextItem, StreamingRecommender
from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.ops import describe_backends
from recsys_ssm.paths import CONF_DIR

N_ITEMS, N_USERS, K, WINDOW = 12_000, 256, 10, 50


def model_of(backbone: str) -> NextItem:
    """Return a model with random weights as ``conf/preset`` names it for next items."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", ["dataset=ml_100k", f"backbone={backbone}"])
    options = {part: OmegaConf.to_container(cfg[part]) for part in ("backbone", "tokenizer")}
    torch.manual_seed(0)
    model = NextItem(
        item_ids=[f"i{number}" for number in range(N_ITEMS)],
        max_length=WINDOW,
        backbone=options["backbone"],
        tokenizer=options["tokenizer"],
        item_counts=torch.ones(N_ITEMS, dtype=torch.int64),
    )
    return model.eval()


def item(rng: random.Random) -> str:
    return f"i{rng.randrange(N_ITEMS)}"


def rates(model: NextItem, rounds: int) -> dict[str, float]:
    """Return events a second, each with its user's top 10."""
    rng = random.Random(0)
    users = [f"u{row}" for row in range(N_USERS)]
    stream = StreamingRecommender(model)
    histories = [[item(rng) for _ in range(WINDOW)] for _ in users]
    for user, history in zip(users, histories, strict=True):
        stream.add((user, each) for each in history)
    stream.best(users, K)
    spent: dict[str, list[np.ndarray]] = {
        "stream": [], "stream, seen left out": [], "full pass": []
    }  # fmt: skip
    for _ in range(rounds):
        for name, filter_seen in (("stream", False), ("stream, seen left out", True)):
            start = _clocks()
            stream.add([(user, item(rng)) for user in users])
            stream.best(users, K, filter_seen=filter_seen)
            spent[name].append(_clocks() - start)
        start = _clocks()
        model.best_or_popular(model.known_items(histories), K, filter_seen=False)
        spent["full pass"].append(_clocks() - start)
    found = {}
    for name, both in spent.items():
        wall, cpu = np.median(both, axis=0)
        found |= {f"{name}, events/s": N_USERS / wall, f"{name}, events/CPU s": N_USERS / cpu}
    return found


def _clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def costs(model: NextItem, events: int, rounds: int) -> dict[str, float]:
    """Return milliseconds of one more event of one user, after 10 and after ``events``."""
    rng = random.Random(0)
    found = {}
    streams = {}
    for place in (10, events):
        stream = streams[place] = StreamingRecommender(model)
        while (n := stream.histories.length("u")) < place - rounds // 2:
            stream.add(("u", item(rng)) for _ in range(min(1000, place - rounds // 2 - n)))
            stream.best(["u"], K, filter_seen=False)
    times: dict[int, list[np.ndarray]] = {place: [] for place in streams}
    for _ in range(rounds):
        for place, stream in streams.items():
            start = _clocks()
            stream.add([("u", item(rng))])
            stream.best(["u"], K, filter_seen=False)
            times[place].append(1e3 * (_clocks() - start))
    for place, spent in times.items():
        wall, cpu = np.median(spent, axis=0)
        found |= {f"event {place:,}, ms": wall, f"event {place:,}, CPU ms": cpu}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbones", nargs="+", default=["mamba", "mamba2", "mamba3", "transformer"]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    register_resolvers()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for backbone in args.backbones:
        model = model_of(backbone)
        state = StreamingRecommender(model).state_size
        row = {"backbone": backbone, "numbers of a state": state, **rates(model, args.rounds)}
        if state:
            row |= costs(model, args.events, args.rounds)
        rows.append(row)
        print(table(rows), flush=True)
    if args.json:
        facts = {"machine": machine(), "backends": describe_backends()}
        write_json(args.json, {**facts, "rows": rows})


if __name__ == "__main__":
    let_threads_sleep()
    main()
