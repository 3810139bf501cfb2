"""A few events, and what a dataset makes of them: helpers of the tests of next-item data."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from recsys_ssm.data.interactions import Interactions

ROWS = [
    # user, item, rating, timestamp; u1's rows are not in the order of time, several times are equal
    ("u1", "c", 5, 30),
    ("u1", "a", 4, 10),
    ("u2", "b", 3, 10),
    ("u1", "d", 5, 30),
    ("u1", "b", 1, 20),
    ("u2", "a", 5, 10),
    ("u2", "d", 4, 10),
    ("u3", "e", 2, 40),
    ("u3", "a", 2, 50),
]
"""By user and time: u1 a b c d, u2 b a d, u3 e a."""


def frame(rows=ROWS) -> pl.DataFrame:
    return pl.DataFrame(rows, ["user_id", "item_id", "rating", "timestamp"], orient="row")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def lines(rows=ROWS, separator=",", header="") -> str:
    return header + "".join(separator.join(map(str, row)) + "\n" for row in rows)


def splits_of(path, **options):
    return Interactions(interactions=path, **options).splits


def histories(splits) -> dict[str, list[str]]:
    events, offsets = splits.histories
    return {
        user: [splits.item_ids[i] for i in events[offsets[u] : offsets[u + 1]]]
        for u, user in enumerate(splits.user_ids)
    }


def held_out(splits, part) -> dict[str, tuple[str, list[str]]]:
    """Target and history of each user."""
    events, offsets = splits.histories
    return {
        splits.user_ids[int(u)]: (
            splits.item_ids[events[at]],
            [splits.item_ids[i] for i in events[offsets[u] : at]],
        )
        for u, at in zip(*getattr(splits, part), strict=True)
    }


def trained(splits) -> dict[str, list[str]]:
    events, offsets = splits.histories
    return {
        user: [splits.item_ids[i] for i in events[offsets[u] : splits.train_stop[u]]]
        for u, user in enumerate(splits.user_ids)
    }


IN_ORDER = {"u1": list("abcd"), "u2": list("bad"), "u3": list("ea")}


def timed(tmp_path, rows) -> Path:
    return write(tmp_path / "x.csv", lines(rows, header="user_id,item_id,timestamp\n"))
