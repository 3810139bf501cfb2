"""Compare this package with RecBole, RecTools and skrecsys: the same data, split, sizes, loss and number of epochs.

    python benchmarks/peers/install.py
    python benchmarks/peers/compare.py --dataset amazon_beauty_2014 --contests sasrec-softmax sasrec-sampled
    python benchmarks/peers/compare.py --dataset ml_100k --contests recbole --epochs 10 --seeds 0 1 2

A contest is a peer and the settings of both sides (see CONTESTS). Each side runs in its own process, one after the
other. The process times its epochs and evaluations by both clocks; reading the data is not timed. All metrics are
computed here, by recsys_ssm.metrics, from the 20 items that each side recommends to each user. A peer's run is reused
if it is there already. Ours is repeated, since the code may have changed, unless --keep is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from install import FOLDER, python_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import config
from timing import machine, table, write_json

from recsys_ssm.metrics import per_user
from recsys_ssm.reports.statistics import estimate, paired_difference
from recsys_ssm.run.assemble import make_data

HERE = Path(__file__).parent
METRICS = ("hr@10", "ndcg@10", "mrr@10")


@dataclass(frozen=True)
class Contest:
    """Options of a peer, and our overrides with the same meaning; ``{name}`` stands for a setting of both."""

    peer: str
    ours: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the peer's script, beside the settings."""
    sequences: int = 128
    """Sequences in a batch: users, or prefixes where prefixes are the samples."""


SETTINGS = {"d_model": 64, "max_length": 50, "dropout": 0.2, "lr": 1e-3}
BOTH = (
    "dataset.max_length={max_length}",
    "dataset.batch_positions={batch_positions}",
    "tokenizer.dropout={dropout}",
    "backbone.d_model={d_model}",
    "backbone.dropout={dropout}",
    "optimizer.lr={lr}",
)
SASREC = ("backbone=transformer", "backbone.dim_feedforward={inner}")
TWO = {"n_layers": 2, "n_heads": 2}
RECTOOLS_ADAM = "optimizer.betas=[0.9,0.98]"

CONTESTS = {
    # The same model to the last parameter. Each sample is a prefix on both sides.
    "recbole": Contest(
        "recbole", (*SASREC, "dataset.objective=last"), {"inner": "{inner}", **TWO}, sequences=2048
    ),
    # The same model. Here every position of a history is a target at once.
    "recbole-positions": Contest(
        "recbole",
        (*SASREC, "dataset.objective=all", "dataset.batch_positions=2048"),
        {"inner": "{inner}", **TWO},
        sequences=2048,
    ),
    # RecTools has the layers of SASRec's authors, we have RecBole's. Widths and numbers are equal.
    "sasrec-softmax": Contest(
        "rectools", (*SASREC, "loss=softmax"), {"layers": "sasrec", "loss": "softmax", **TWO}
    ),
    "sasrec-sampled": Contest(
        "rectools",
        (
            *SASREC,
            "loss=sampled_softmax",
            "loss.negatives=128",
            "loss.shared=false",
            "loss.logq=false",
        ),
        {"layers": "sasrec", "loss": "sampled_softmax", "negatives": 128, **TWO},
    ),
    # As above, but our side shares a batch's negatives among its positions.
    "sasrec-shared": Contest(
        "rectools",
        (*SASREC, "loss=sampled_softmax", "loss.negatives=128", "loss.logq=false"),
        {"layers": "sasrec", "loss": "sampled_softmax", "negatives": 128, **TWO},
    ),
    "sasrec-bce": Contest(
        "rectools",
        (*SASREC, "loss=sampled_bce", "loss.negatives=1", "loss.shared=false"),
        {"layers": "sasrec", "loss": "BCE", "negatives": 1, **TWO},
    ),
    # The same layers. RecTools counts positions from the latest item, we count from the first.
    "ligr": Contest(
        "rectools",
        (
            "backbone=ligr",
            "backbone.n_layers=2",
            "backbone.nhead=2",
            "tokenizer.positions={max_length}",
            "tokenizer.norm=false",
            "tokenizer.init_std={xavier}",
            "loss=softmax",
            RECTOOLS_ADAM,
        ),
        {"layers": "ligr", "loss": "softmax", **TWO},
    ),
    "mamba4rec": Contest(
        "skrecsys", ("backbone=mamba",), {"d_state": 32, "n_layers": 1}, sequences=64
    ),
}


def splits_of(overrides: list[str]) -> Any:
    """Return the data as this package splits it."""
    return make_data(config(overrides)).splits


def export(dataset: str, folder: Path, n_users: int) -> tuple[list[str], Path, dict[str, Any]]:
    """Write the exchange file; return the overrides that name the data, the file, and its content.

    With ``n_users`` above 0, a file of the first ``n_users`` users is written first, and both sides read it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"dataset={dataset}"]
    splits = splits_of(overrides)
    if n_users:
        events, offsets = splits.histories
        dataset = f"{dataset}-{n_users}"
        text = folder / f"{dataset}.txt"
        rows = (
            f"{user} {' '.join(map(str, events[offsets[user] : offsets[user + 1]]))}\n"
            for user in range(n_users)
        )
        text.write_text("".join(rows))
        overrides = [
            "dataset=interactions",
            f"dataset.interactions={text}",
            "dataset.format=sequences",
        ]
        splits = splits_of(overrides)
    events, offsets = (np.asarray(array) for array in splits.histories)
    if np.diff(offsets).min() < 3:
        raise SystemExit(
            f"dataset={dataset}: a user has fewer than 3 events; choose another dataset, or fewer --users"
        )
    path = folder / f"{dataset}.npz"
    data = {"events": events, "offsets": offsets, "n_items": len(splits.item_ids)}
    np.savez(path, **data)
    return overrides, path, data


def batch_positions(contest: Contest, sequences: int, data: dict[str, Any], max_length: int) -> int:
    """Return the positions that a peer's batch holds beside padding, for equally many steps an epoch."""
    trained = np.diff(data["offsets"]) - 2
    if contest.peer == "recbole":
        sizes = [np.minimum(np.arange(1, n), max_length) for n in trained]
        lengths = np.concatenate(sizes)
    else:
        lengths = np.minimum(trained - 1, max_length)
        lengths = lengths[lengths > 0]
    steps = math.ceil(lengths.size / sequences)
    return math.ceil(lengths.sum() / steps)


def flags(options: dict[str, Any]) -> list[str]:
    """Return options as command-line flags."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def run(command: list[str], out: Path, niceness: int, again: bool) -> dict[str, Any]:
    """Run one side; if not ``again``, read the files of its last run if there are any."""
    key = hashlib.sha256(json.dumps([part for part in command if "--out" not in part]).encode())
    out = out / key.hexdigest()[:12]
    if again or not (out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        environment.pop("GOMP_SPINCOUNT", None)
        at = command.index("--") if "--" in command else len(command)
        full = [*command[:at], f"--out={out}", *command[at:]]
        print("$", *full, flush=True)
        with (out / "log.txt").open("w") as log:
            subprocess.run(
                ["nice", "-n", str(niceness), *full],
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                # RecBole writes logs to its working folder.
                cwd=HERE.parents[1] if command[0] == sys.executable else out,
                env=environment,
            )
        (out / "done").touch()
    return json.loads((out / "run.json").read_text()) | {"folder": str(out)}


def measured(record: dict[str, Any], data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return metrics by split, epoch and list: ``val/10/unseen`` and so on."""
    last = data["offsets"][1:]
    targets = {"val": data["events"][last - 2], "test": data["events"][last - 1]}
    found = {}
    for path in sorted(Path(record["folder"]).glob("*_*.npz")):
        split, epoch = path.stem.split("_")
        with np.load(path, allow_pickle=False) as lists:
            for name in lists.files:
                top = torch.from_numpy(lists[name].astype(np.int64))
                target = torch.from_numpy(targets[split].astype(np.int64))
                values = per_user(top, target, METRICS)
                found[f"{split}/{epoch}/{name}"] = {m: float(v.mean()) for m, v in values.items()}
    return found


def whole(records: list[dict[str, Any]]) -> bool:
    """Return True if all epochs were run in full, so that the metrics may be compared."""
    return all(epoch["share"] == 1 for record in records for epoch in record["epochs"])


def row(contest: str, side: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a line of the table: medians of the costs, means of the metrics over seeds."""
    last = {}
    for split in ("val", "test") if whole(records) else ():
        for name in ("unseen", "all"):
            values = [r["metrics"].get(f"{split}/{r['last']}/{name}") for r in records]
            if None not in values:
                last[f"{split} {name}"] = statistics.mean(v["ndcg@10"] for v in values)
    epochs = [epoch for record in records for epoch in record["epochs"]]
    ranked = [e for record in records for e in record["evaluations"]]
    # The first epoch warms up. It is used only if there is no other.
    later = [epoch for epoch in epochs if epoch["epoch"] > 1] or epochs
    return {
        "contest": contest,
        "side": side,
        "epochs": records[0]["last"],
        "epoch cpu s": statistics.median(epoch["cpu"] / epoch["share"] for epoch in later),
        "epoch wall s": statistics.median(epoch["wall"] / epoch["share"] for epoch in later),
        "evaluation cpu s": statistics.median(e["cpu"] for e in ranked),
        "peak MiB": max(record["peak_memory_bytes"] for record in records) / 2**20,
        **{f"{name} N@10": value for name, value in last.items()},
    }


def best_validation(record: dict[str, Any], name: str) -> float:
    """Return the highest NDCG@10 of a run's validations."""
    return max(
        values["ndcg@10"]
        for key, values in record["metrics"].items()
        if key.startswith("val/") and key.endswith(f"/{name}")
    )


def time_to(record: dict[str, Any], level: float, name: str) -> dict[str, float] | None:
    """Return the cost of the epochs until the validation's NDCG@10 reached ``level``; None if it never did."""
    spent = {"cpu": 0.0, "wall": 0.0}
    for epoch in record["epochs"]:
        for clock in spent:
            spent[clock] += epoch[clock]
        values = record["metrics"].get(f"val/{epoch['epoch']}/{name}")
        if values is not None and values["ndcg@10"] >= level:
            return {"epoch": epoch["epoch"], **spent}
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="ml_100k")
    parser.add_argument("--users", type=int, default=0, help="use the first N users; 0: all")
    parser.add_argument("--contests", nargs="+", choices=CONTESTS, default=["sasrec-softmax"])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--evaluate-every", type=int, default=0, help="0: after the last epoch")
    parser.add_argument(
        "--batches", type=int, default=0, help="time an epoch by its first N batches; 0: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help=f"settings to change: {', '.join(SETTINGS)}, sequences (in a batch)",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of install.py")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: within --folder")
    parser.add_argument("--keep", action="store_true", help="reuse our runs that are there already")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    runs = (args.runs or args.folder.expanduser() / "runs").absolute()
    changed = {n: json.loads(v) for n, v in (pair.split("=", 1) for pair in args.set)}
    overrides, path, data = export(args.dataset, runs, args.users)
    rows, comparisons, details = [], [], []
    for name in args.contests:
        contest = CONTESTS[name]
        settings = SETTINGS | changed
        sequences = settings.pop("sequences", contest.sequences)
        common = {
            "data": path,
            "epochs": args.epochs,
            "evaluate_every": args.evaluate_every,
            "batches": args.batches,
            "threads": args.threads,
        }
        values = settings | {
            "inner": 4 * settings["d_model"],
            "batch_positions": batch_positions(contest, sequences, data, settings["max_length"]),
            "xavier": math.sqrt(2 / (data["n_items"] + 1 + settings["d_model"])),
        }
        sides: dict[str, list[dict[str, Any]]] = {contest.peer: [], "recsys_ssm": []}
        for seed in args.seeds:
            peer = [
                str(python_of(args.folder, contest.peer)),
                str(HERE / f"{contest.peer}_model.py"),
            ]
            own = {"batch_size": sequences, "seed": seed}
            peer += [text.format(**values) for text in flags(settings | contest.options)]
            peer += flags(common | own)
            ours = [sys.executable, str(HERE / "ours_model.py"), *flags(common | {"seed": seed})]
            ours += ["--", *overrides]
            ours += [text.format(**values) for text in (*BOTH, *contest.ours)]
            for side, command in ((contest.peer, peer), ("recsys_ssm", ours)):
                # Contests with the same settings share a peer's run.
                label = side if side == contest.peer else f"{name}-{side}"
                again = side != contest.peer and not args.keep
                record = run(command, runs / f"{path.stem}-{label}-{seed}", args.nice, again)
                record |= {"seed": seed, "last": record["epochs"][-1]["epoch"]}
                record["metrics"] = measured(record, data)
                sides[side].append(record)
        rows += [row(name, side, records) for side, records in sides.items()]
        comparisons.append({"contest": name, **compared(sides[contest.peer], sides["recsys_ssm"])})
        details.append({"contest": name, "settings": values, "sides": sides})
    print(table(rows))
    print(table(comparisons))
    if args.json:
        found = {"dataset": args.dataset, "users": args.users, "machine": machine(), "rows": rows}
        write_json(args.json, found | {"comparisons": comparisons, "runs": details})


def compared(peer: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many times cheaper ours is, and the difference of its NDCG@10 in percent of the peer's.

    ``time-to``: ratio of CPU seconds of training until the peer's own best validation, for the worst seed; 0: ours
    never reached it.
    """

    def cost(records: list[dict[str, Any]], kind: str) -> float:
        return statistics.median(
            each["cpu"] / each.get("share", 1) for record in records for each in record[kind]
        )

    def peak(records: list[dict[str, Any]]) -> float:
        return max(record["peak_memory_bytes"] for record in records)

    found: dict[str, Any] = {
        "epoch x": cost(peer, "epochs") / cost(ours, "epochs"),
        "evaluation x": cost(peer, "evaluations") / cost(ours, "evaluations"),
        "memory x": peak(peer) / peak(ours),
    }
    for name in ("unseen", "all") if whole([*peer, *ours]) else ():
        split = "test" if f"test/{peer[0]['last']}/{name}" in peer[0]["metrics"] else "val"

        def values(records: list[dict[str, Any]], at: str) -> dict[int, float]:
            key = at.format
            return {r["seed"]: r["metrics"][key(r["last"])]["ndcg@10"] for r in records}

        at = f"{split}/{{}}/{name}"
        theirs = values(peer, at)
        mean = estimate(list(theirs.values())).mean or math.nan
        off = paired_difference(values(ours, at), theirs)
        found[f"{split} {name} off %"] = 100 * off.mean / mean
        found[f"{name} ± %"] = 100 * off.half_width / mean
        # For each seed, the cost of both sides until the peer's best validation.
        ratios = []
        for theirs_run, our_run in zip(peer, ours, strict=True):
            level = best_validation(theirs_run, name)
            reached = time_to(our_run, level, name)
            ratios.append(
                time_to(theirs_run, level, name)["cpu"] / reached["cpu"] if reached else 0
            )
        found[f"{name} time-to x"] = min(ratios)
    return found


if __name__ == "__main__":
    main()
