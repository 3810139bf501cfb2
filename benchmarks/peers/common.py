"""Share the tools of the peers' scripts: the exchange file, clocks, and lists of recommended items.

This module runs in every peer's environment, so it needs numpy and the standard library only.

The exchange file (.npz, written by compare.py) holds the data as this package splits it: `events` (E,), catalogue
indices, user after user in order of time; `offsets` (U+1,); and `n_items`. Each user's last event is the test, the one
before it the validation, and the rest is training data.

A peer's script writes to its folder `run.json` (epochs and evaluations with wall and CPU seconds, peak memory) and, for
each evaluation, `<split>_<epoch>.npz`. This holds the K best items of every user, best first, as catalogue indices:
once over all items (`all`), and once without the items that the user had already (`unseen`). -1 is an empty place.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PLACES = 20


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Parse the settings that all peers take; ``defaults`` adds options or changes defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="exchange file, of compare.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = {
        "epochs": 1,
        "evaluate_every": 0,  # epochs; 0: after the last one only
        "batches": 0,  # of each epoch, to time it by a part; 0: all
        "seed": 0,
        "threads": 1,
        "max_length": 50,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 2,
        "dropout": 0.2,
        "lr": 1e-3,
        "batch_size": 128,
    } | defaults
    for name, default in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


@dataclass
class Data:
    """Content of the exchange file."""

    events: np.ndarray
    offsets: np.ndarray
    n_items: int

    @classmethod
    def read(cls, path: Path) -> Data:
        """Read an exchange file."""
        with np.load(path, allow_pickle=False) as archive:
            return cls(archive["events"], archive["offsets"], int(archive["n_items"]))

    @property
    def n_users(self) -> int:
        return self.offsets.size - 1

    def history(self, user: int, split: str) -> np.ndarray:
        """Return the items of ``user`` before the target of ``split`` (``val`` or ``test``)."""
        return self.events[
            self.offsets[user] : self.offsets[user + 1] - (2 if split == "val" else 1)
        ]

    def before(self, held_out: int) -> tuple[np.ndarray, np.ndarray]:
        """Return users and items of all events but each user's last ``held_out``, in order."""
        sizes = np.diff(self.offsets) - held_out
        place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        user = np.repeat(np.arange(self.n_users), sizes)
        return user, self.events[self.offsets[user] + place]


@dataclass
class Run:
    """Measurements of a run, for ``run.json``."""

    peer: str
    args: argparse.Namespace
    packages: tuple[str, ...]
    epochs: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def epoch(self, number: int, loss: float, took: dict[str, float], n_batches: int) -> None:
        """Add an epoch; its ``share`` is the part of its ``n_batches`` that was run."""
        share = min(1.0, self.args.batches / n_batches) if self.args.batches else 1.0
        self.epochs.append({"epoch": number, "loss": loss, "share": share, **took})
        print(self.epochs[-1], flush=True)

    def save(self, split: str, epoch: int, top: dict[str, np.ndarray]) -> None:
        """Write the recommended items of an evaluation."""
        np.savez_compressed(
            self.args.out / f"{split}_{epoch}.npz",
            **{name: places.astype(np.int32) for name, places in top.items()},
        )

    def write(self) -> None:
        """Write ``run.json``."""
        settings = {name: value for name, value in vars(self.args).items() if name != "out"}
        record = {
            "peer": self.peer,
            "versions": {package: version(package) for package in self.packages}
            | {"python": platform.python_version()},
            "settings": settings | {"data": str(self.args.data.name)},
            "epochs": self.epochs,
            "evaluations": self.evaluations,
            "peak_memory_bytes": peak_memory_bytes(),
            "notes": self.notes,
        }
        (self.args.out / "run.json").write_text(json.dumps(record, indent=2) + "\n")


def peak_memory_bytes() -> int:
    """Return the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Measure the ``wall`` and ``cpu`` seconds of the block, in a dict that is filled when it ends."""
    found: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found["wall"], found["cpu"] = time.perf_counter() - wall, time.process_time() - cpu


def top_lists(
    scores_of: Callable[[int, int], np.ndarray], data: Data, split: str, block: int = 1024
) -> dict[str, np.ndarray]:
    """Return the best items of every user, over all items and over items the user has not had.

    Args:
        scores_of: Function from users ``start`` to ``stop`` to their scores (stop - start, I) by catalogue index.
        data: The histories.
        split: Split whose target ends a user's history.
        block: Users at a time.
    """
    everything, unseen = [], []
    for start in range(0, data.n_users, block):
        stop = min(start + block, data.n_users)
        scores = np.array(scores_of(start, stop), dtype=np.float32)
        everything.append(_best(scores))
        for row, user in enumerate(range(start, stop)):
            scores[row, data.history(user, split)] = -np.inf
        unseen.append(_best(scores))
    return {"all": np.concatenate(everything), "unseen": np.concatenate(unseen)}


def _best(scores: np.ndarray) -> np.ndarray:
    """Return the best items (U, PLACES); of equal scores the lower index is first, and -1 stands for -inf."""
    k = min(PLACES, scores.shape[1])
    # All items that tie with the k-th are kept until the order is known.
    cut = np.partition(scores, -k, axis=1)[:, -k, None]
    top = np.full((len(scores), PLACES), -1, dtype=np.int32)
    for row, enough in enumerate(scores >= cut):
        item = np.flatnonzero(enough)
        item = item[np.argsort(-scores[row, item], kind="stable")][:k]
        top[row, : item.size] = np.where(np.isneginf(scores[row, item]), -1, item)
    return top
