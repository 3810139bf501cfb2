"""Test with fewer users than processes: a process without users takes part in the sums all the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small import SMALL_MAMBA, TINY


def write_rows(path: Path) -> None:
    rows = [f"u{u},i{t},{t}" for u in range(100) for t in range(2)]  # too few to be evaluated
    rows += [f"one,i{t},{t}" for t in range(6)]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("dataset", ["two_tower", "next_item"])
def test_one_user_and_two_processes(tmp_path: Path, dataset: str) -> None:
    write_rows(tmp_path / "few.csv")
    options = {
        "two_tower": [*TINY, "dataset.n_test_users=1", "dataset.n_val_users=1"],
        "next_item": [
            "dataset=interactions",
            "dataset.interactions=few.csv",
            "trainer.max_epochs=1",
        ],
    }[dataset]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=none"]
    done = subprocess.run(
        [sys.executable, "-m", "recsys_ssm.train", *options, *SMALL_MAMBA, *ddp],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = tmp_path.glob("runs/*/*/metrics.json")
    assert json.loads(path.read_text())["metrics"]["n_users"] == 1
