"""Compare the figures and final weights of two versions of the package, run by run.

    python scripts/same_figures.py record CHECKOUT figures.json      # run every case in a checkout
    python scripts/same_figures.py compare before.json after.json    # name every difference; exit 1 if there is one

A case is a command line; where an option has another name in the newer version, both spellings stand here. Times,
paths and versions are left out of the comparison. Every case runs on one thread, so that sums have one order.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMON = ["logger=none", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
INCIDENTAL = {"train_seconds", "cost", "latency", "versions", "checkpoint", "overrides", "notes", "published",
              "published_label", "name", "data", "filter_seen"}  # fmt: skip

SHORT = ["trainer.max_steps=120", "validations=3"]
EPOCH = ["trainer.max_epochs=1"]

# name -> (commands as of 0.1.0, commands since), each a list of argument lists run in one output folder.
Commands = list[list[str]]
CASES: dict[str, tuple[Commands, Commands | None]] = {
    "spotify mamba": ([["dataset=spotify", "backbone=mamba", *SHORT]], None),
    "spotify transformer, cosine": (
        [["dataset=spotify", "backbone=transformer", "scheduler=cosine", *SHORT]],
        None,
    ),
    "hm mamba": (
        [["dataset=hm", "backbone=mamba", "dataset.source=generated", "dataset.generator.n_customers=4000",
          "dataset.generator.n_transactions=40000", *SHORT]],
        None,
    ),
    "vaccine mamba2": ([["dataset=vaccine", "backbone=mamba2", "dataset.n_users=5000", *SHORT]], None),
    "vaccine hydra 50/100": (
        [["dataset=vaccine", "backbone=hydra", "dataset.k=50", "dataset.n_messages=100", "dataset.n_users=5000",
          *SHORT]],
        None,
    ),
    "spotify identity, softmax": (
        [["dataset=spotify", "backbone=identity", "head.loss=softmax", "tokenizer.init=uniform", *SHORT]],
        [["dataset=spotify", "backbone=identity", "loss=in_batch_softmax", "tokenizer.init=uniform", *SHORT]],
    ),
    "ml_100k mamba": ([["dataset=ml_100k", "backbone=mamba", *EPOCH]], None),
    "ml_100k mamba2": ([["dataset=ml_100k", "backbone=mamba2", *EPOCH]], None),
    "ml_100k hydra": ([["dataset=ml_100k", "backbone=hydra", *EPOCH]], None),
    "ml_100k transformer": ([["dataset=ml_100k", "backbone=transformer", *EPOCH]], None),
    "ml_100k ligr": ([["dataset=ml_100k", "backbone=ligr", *EPOCH]], None),
    "next_item/best": (
        [["experiment=next_item/best", "dataset=ml_100k", "trainer.max_epochs=7"]],
        None,
    ),
    "sweep": (
        [["--multirun", "seed=0,1", "dataset=spotify", "backbone=mamba", "trainer.max_steps=40", "validations=2"]],
        None,
    ),
    "resumed": (
        [["dataset=spotify", "backbone=mamba", "trainer.max_steps=40", "validations=2"],
         ["dataset=spotify", "backbone=mamba", "trainer.max_steps=80", "validations=4", "ckpt_path=last"]],
        None,
    ),
    "resumed, epochs": (
        [["dataset=ml_100k", "backbone=mamba2", "trainer.max_epochs=1"],
         ["dataset=ml_100k", "backbone=mamba2", "trainer.max_epochs=2", "ckpt_path=last"]],
        None,
    ),
    "table": (
        [["dataset=table", "backbone=mamba", "dataset.interactions=sales.csv", "dataset.users=users.csv",
          "dataset.user_numeric=[age]", "dataset.user_categorical=[town]", "dataset.time=timestamp",
          "trainer.max_steps=60", "validations=2"]],
        [["dataset=table", "backbone=mamba", "dataset.interactions=sales.csv", "dataset.users=users.csv",
          "dataset.user_numeric=[age]", "dataset.user_categorical=[town]", "dataset.timestamp=timestamp",
          "trainer.max_steps=60", "validations=2"]],
    ),
    "interactions": (
        [["dataset=interactions", "backbone=mamba", "dataset.interactions=sales.csv", "dataset.items=items.csv",
          "dataset.item_numeric=[price]", "dataset.item_categorical=[kind]", *EPOCH]],
        None,
    ),
    "seeds at once": (
        [["dataset=spotify", "backbone=mamba", "train.seeds=2", "trainer.max_steps=40", "validations=2"]],
        [["@recsys_ssm.batched_seeds", "dataset=spotify", "backbone=mamba", "seeds=2", "trainer.max_steps=40",
          "validations=2"]],
    ),
}  # fmt: skip


def write_tables(folder: Path) -> None:
    """Write a small shop: 120 users, 60 items, 12 purchases each, in the order of time."""
    towns, kinds = ("Ulm", "Bonn", "Kiel"), ("tea", "mug", "pot")
    sales = ["user_id,item_id,timestamp"]
    for user in range(120):
        for event in range(12):
            item = (user * 7 + event * (1 + user % 5)) % 60
            sales.append(f"u{user},i{item},{1_600_000_000 + event * 1000 + user}")
    (folder / "sales.csv").write_text("\n".join(sales) + "\n")
    users = ["user_id,age,town", *(f"u{u},{20 + u % 50},{towns[u % 3]}" for u in range(120))]
    (folder / "users.csv").write_text("\n".join(users) + "\n")
    items = ["item_id,price,kind", *(f"i{i},{1 + i % 9},{kinds[i % 3]}" for i in range(60))]
    (folder / "items.csv").write_text("\n".join(items) + "\n")


def weights(checkpoint: Path) -> dict[str, str]:
    """Return a hash for each parameter and buffer of a checkpoint."""
    import torch

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    return {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, tensor in state.items()
        if tensor.numel()
    }


def figures(folder: Path) -> dict[str, Any]:
    """Return the figures and the hashes of the weights of every run under a folder."""
    found: dict[str, Any] = {}
    paths = sorted(folder.rglob("metrics.json"), key=lambda path: path.stat().st_mtime_ns)
    for number, path in enumerate(paths):
        metrics = {k: v for k, v in json.loads(path.read_text()).items() if k not in INCIDENTAL}
        key = f"{metrics.get('seed', number)}"
        found[key] = {"metrics": metrics}
        for which in ("best", "last"):
            checkpoint = path.parent / "checkpoints" / f"{which}.ckpt"
            if checkpoint.is_file():
                found[key][which] = weights(checkpoint)
    return found


def record(checkout: Path, output: Path, since: bool, only: str | None) -> None:
    """Run every case with the package of a checkout and write what it found."""
    results: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }
    for name, (before, after) in CASES.items():
        if (only is not None and only not in name) or (only is None and name in results):
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_tables(Path(folder))
            for arguments in (after or before) if since else before:
                module = "recsys_ssm.train"
                if arguments[0].startswith("@"):
                    module, arguments = arguments[0][1:], arguments[1:]
                command = [sys.executable, "-m", module, *arguments, *COMMON]
                done = subprocess.run(  # noqa: PLW1510
                    command, cwd=folder, env=environment, capture_output=True, text=True
                )
                if done.returncode:
                    print(f"{name}: {' '.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr)
                    break
            results[name] = figures(Path(folder) / "runs")
        output.write_text(json.dumps(results, indent=1, sort_keys=True))
        print(f"{name}: {len(results[name])} runs", flush=True)


def differences(before: Any, after: Any, where: str) -> list[str]:
    """Name every value that differs or that only one side has."""
    if isinstance(before, dict) and isinstance(after, dict):
        empty = hashlib.sha256(b"").hexdigest()[:16]  # a parameter without values
        before = {name: value for name, value in before.items() if value != empty}
        return [
            line
            for key in sorted(before.keys() | after.keys())
            for line in differences(before.get(key), after.get(key), f"{where} / {key}")
        ]
    return (
        [] if before == after else [f"{where}: {str(before)[:60]} before, {str(after)[:60]} after"]
    )


def main() -> None:
    match sys.argv[1:]:
        case ["record", checkout, output, *rest]:
            only = next((word for word in rest if not word.startswith("--")), None)
            record(Path(checkout).resolve(), Path(output), "--before" not in rest, only)
        case ["compare", before, after]:
            first, second = (json.loads(Path(path).read_text()) for path in (before, after))
            found = differences(first, second, "")
            print("\n".join(found) or f"{len(first)} cases: the same figures and weights")
            sys.exit(bool(found))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
