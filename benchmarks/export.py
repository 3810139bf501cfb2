"""Compare exported ONNX models with the models themselves on every test user, and time both for one user.

    python benchmarks/export.py RUN [RUN ...] [--lengths 200] [--json FILE]

For each run's folder, in batches of 1 and of 256: the largest difference of scores; the users whose ten items differ;
and those whose items differ only in the order of ties, which are items whose scores differ by at most a millionth in
float64. Then the same for histories cut to each length from 1 on, and the median time of a call for one user.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from timing import machine, write_json

from recsys_ssm.batches import Ragged
from recsys_ssm.exporting.formats import METADATA, export_model
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.run.trained import load_model, make_data, open_run

K = 10


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def padded(histories: list[list[int]]) -> np.ndarray:
    rows = np.full((len(histories), max(map(len, histories))), -1)
    for row, history in zip(rows, histories, strict=True):
        row[: len(history)] = history
    return rows


TIE = 1e-6
"""Largest difference of two scores of a tie, relative to scores above 1."""


class Difference:
    """Collect differences between lists of items and their scores."""

    def __init__(self) -> None:
        self.score, self.lists, self.ties, self.users = 0.0, 0, 0, 0

    def add(
        self,
        found: tuple[Any, Any],
        expected: tuple[Any, Any],
        query: torch.Tensor,
        catalogue: torch.Tensor,
    ) -> None:
        items, scores = (np.asarray(x) for x in found)
        want, want_scores = (np.asarray(x) for x in expected)
        left = want >= 0
        gap = np.abs(scores - want_scores)[left]
        self.score = max(self.score, float(gap.max(initial=0)))
        self.users += len(want)
        for row in np.flatnonzero((items != want).any(1)):
            one, other = (
                (catalogue[at[row]].double() @ query[row].double()).numpy() for at in (items, want)
            )
            distinct = len(set(items[row])) == len(items[row])
            near = np.abs(one - other) <= TIE * np.maximum(1, np.abs(other))
            if distinct and (items[row] >= 0).all() and near.all():
                self.ties += 1
            else:
                self.lists += 1

    def row(self, name: str) -> dict[str, Any]:
        return {
            f"users, {name}": self.users,
            f"other lists, {name}": self.lists,
            f"ties in another order, {name}": self.ties,
            f"score gap, {name}": self.score,
        }


def median_ms(call: Callable[[], Any], repeat: int = 200) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[repeat // 2]


def next_item(model: NextItem, data: Any, folder: Path, lengths: int) -> dict[str, Any]:
    seen: list[Ragged] = [batch.seen for batch in data.test_dataloader()]
    histories = [
        ragged.values[a:b].tolist()
        for ragged in seen
        for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)
    ]
    session = session_of(export_model(model, folder, "onnx")[0])
    stored = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert stored["item_ids"] == model.item_ids
    k = np.array(K)

    def run(some: list[list[int]]) -> tuple[Any, Any]:
        items, scores, _ = session.run(None, {"history": padded(some), "k": k})
        return items, scores

    row: dict[str, Any] = {}
    with model.inference():
        catalogue = model._items()
    for name, size, users in (("256", 256, histories), ("1", 1, histories)):
        found = Difference()
        for start in range(0, len(users), size):
            block = users[start : start + size]
            expected = model.candidates(block, K, filter_seen=model.filter_seen)
            found.add(run(block), expected, model._query(block), catalogue)
        row.update(found.row(f"batch {name}"))
    found = Difference()
    longest = max(histories, key=len)
    for length in range(1, lengths + 1):
        some = [history[:length] for history in histories[:4]]
        some.append((longest * (lengths // len(longest) + 1))[:length])
        expected = model.candidates(some, K, filter_seen=model.filter_seen)
        found.add(run(some), expected, model._query(some), catalogue)
    row.update(found.row(f"lengths 1-{lengths}"))
    one = [sorted(histories, key=len)[len(histories) // 2]]
    row["median length"] = len(one[0])
    row["ours ms"] = median_ms(lambda: model.candidates(one, K, filter_seen=model.filter_seen))
    row["onnxruntime ms"] = median_ms(lambda: run(one))
    return row


def two_tower(model: TwoTower, data: Any, folder: Path) -> dict[str, Any]:
    splits = data.splits
    users = splits.users.rows(splits.test_ranking.user)
    graph, items = (session_of(path) for path in export_model(model, folder, "onnx"))
    mean, std = (
        np.array([getattr(field, name) for field in model.user_schema.numeric])
        for name in ("mean", "std")
    )
    given = {}
    if model.user_schema.numeric:
        given["numeric"] = users.numeric.double().numpy() * std + mean
    if model.user_schema.categorical:
        given["categorical"] = users.categorical.numpy()
    catalogue = model.item_embeddings()
    vectors = model._encode(model.user_tower, users)
    k = np.array(K)

    def run(a: int, b: int) -> tuple[Any, Any]:
        inputs = {name: x[a:b] for name, x in given.items()}
        seen = np.full((len(next(iter(inputs.values()))), 1), -1)
        return tuple(graph.run(["items", "scores"], {**inputs, "seen": seen, "k": k}))

    row: dict[str, Any] = {}
    for size in (256, 1):
        found = Difference()
        for a in range(0, len(vectors), size):
            expected = model.best_items(vectors[a : a + size], catalogue, K, None)
            found.add(run(a, a + size), expected, vectors[a : a + size], catalogue)
        row.update(found.row(f"batch {size}"))
    raw = {}
    if model.item_schema.numeric:
        mean, std = (
            np.array([getattr(field, name) for field in model.item_schema.numeric])
            for name in ("mean", "std")
        )
        raw["numeric"] = model.items.numeric.double().numpy() * std + mean
    if model.item_schema.categorical:
        raw["categorical"] = model.items.categorical.numpy()
    (vector,) = items.run(None, raw)
    row["gap of item vectors"] = float(np.abs(vector - catalogue.numpy()).max())
    first = users.rows(slice(0, 1))
    row["ours ms"] = median_ms(
        lambda: model.best_items(model._encode(model.user_tower, first), catalogue, K, None)
    )
    row["onnxruntime ms"] = median_ms(lambda: run(0, 1))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--lengths", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.runs:
        run = open_run(name)
        model, _ = load_model(run)
        data = make_data(run, {})
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(model, NextItem):
                row = next_item(model, data, Path(folder), options.lengths)
            else:
                assert isinstance(model, TwoTower)
                row = two_tower(model, data, Path(folder))
        rows.append({"run": run.name, **row})
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        write_json(options.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
