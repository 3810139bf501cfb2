"""MamRec through the commands: trained, tested again, recommends, killed and resumed, swept and reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from kill import kill_after_checkpoint

pytest.importorskip("transformers", reason="the extra text is not installed")

BASE = (
    "experiment=text/mamrec", "dataset=shop", "dataset.n_customers=40", "dataset.n_items=24", "dataset.mean_orders=6",
    "dataset.batch_positions=64", "logger=none", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
    "text.vocabulary=400", "text.d_model=16", "text.n_layers=1",
)  # fmt: skip


def only(folder: Path) -> Path:
    [run] = folder.glob("text/*/metrics.json")
    return run.parent


def test_a_run_is_trained_tested_again_and_recommends(cli: Callable, tmp_path: Path) -> None:
    outcome = cli("train", *BASE, "trainer.max_epochs=1", "name=text")
    assert outcome.code == 0, outcome.text
    run = only(tmp_path / "runs")
    results = json.loads((run / "metrics.json").read_text())
    assert set(results["latency"]) == {"users_1", "users_256"}
    assert set(results["parameters"]) == {"total", "without_embeddings"}
    outcome = cli("evaluate", f"run={run}", "output_dir=again")
    assert outcome.code == 0, outcome.text
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    for key in ("metrics", "metrics_unfiltered", "baselines"):
        assert again[key] == results[key]
    outcome = cli("recommend", f"run={run}", "k=3", "output=three.csv")
    assert outcome.code == 0, outcome.text
    table = pl.read_csv(tmp_path / "three.csv")
    assert table["user"].n_unique() >= 20 and table["rank"].max() == 3


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_figures(cli: Callable, tmp_path: Path) -> None:
    base = [*BASE, "trainer.max_epochs=6", "name=text"]
    kill_after_checkpoint(tmp_path, base)
    assert cli("train", *base, "ckpt_path=last").code == 0
    assert cli("train", *base, "output_dir=whole").code == 0
    resumed = json.loads((only(tmp_path / "runs") / "metrics.json").read_text())
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    for key in ("metrics", "metrics_unfiltered", "steps"):
        assert resumed[key] == whole[key]


@pytest.mark.slow
def test_a_sweep_is_reported(cli: Callable, tmp_path: Path) -> None:
    outcome = cli("train", "--multirun", "seed=0,1", *BASE, "trainer.max_epochs=1", "sweep=both")
    assert outcome.code == 0, outcome.text
    outcome = cli("report", "runs/multirun")
    assert outcome.code == 0, outcome.text
    text = (tmp_path / "runs" / "multirun" / "report" / "report.md").read_text()
    assert "MamRec" in text, text
