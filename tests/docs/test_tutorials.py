"""The tutorials do what they say, from the first line to the last."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

Run = Callable[[Path], Path]


@pytest.fixture
def tutorials(repository: Path) -> Path:
    return repository / "docs" / "tutorials"


def results(folder: Path, pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


@pytest.mark.slow
def test_paper_tables(run_page: Run, tutorials: Path) -> None:
    folder = run_page(tutorials / "paper_tables.md")
    (single,) = results(folder, "runs/spotify-mamba-seed0/*/metrics.json")
    assert single["steps"] == 40
    assert single["metrics"]["ndcg@10"] > single["baselines"]["random"]["ndcg@10"]
    jobs = results(folder, "runs/multirun/table/*/metrics.json")
    assert sorted(job["seed"] for job in jobs) == [0, 0, 1, 1]
    # The seeds that were finished were not run again.
    statuses = results(folder, "runs/multirun/table/*/job_status.json")
    assert [status["attempt"] for status in statuses] == [1] * 4
    report = (folder / "runs/multirun/table/report/report.md").read_text()
    for expected in ("FT-Mamba", "FT-Transformer", "max_steps"):
        assert expected in report
    output = (folder / "output.txt").read_text()
    assert "task/two_tower" in output and "| dataset/spotify" in output  # --info defaults
    assert "report.html" in output


def test_own_events(run_page: Run, tutorials: Path) -> None:
    folder = run_page(tutorials / "own_events.md")
    (run,) = results(folder, "runs/shop-mamba2-seed0/*/metrics.json")
    assert run["metrics"]["ndcg@10"] > 2 * run["baselines"]["popularity"]["ndcg@10"]
    (again,) = results(folder, "runs/evaluate/*/metrics.json")
    assert again["metrics"]["ndcg@3"] <= run["metrics"]["ndcg@5"]
    top = pl.read_csv(folder / "top.csv")
    assert top["user"].n_unique() == 300 and top.height == 3000
    new = pl.read_csv(folder / "new_top.csv")
    assert new["user"].to_list() == ["newcomer"] * 3
    assert not {"a3", "a4"} & set(new["item"])
    # The checkpoint that Python loads recommends what the command did.
    output = (folder / "output.txt").read_text()
    assert [re.findall(r"┆ 1    ┆ (a\d+) ", output)[-1]] == new["item"].to_list()[:1]


@pytest.mark.slow
def test_new_backbone(run_page: Run, tutorials: Path) -> None:
    folder = run_page(tutorials / "new_backbone.md")
    jobs = results(folder, "runs/multirun/gru/*/metrics.json")
    assert sorted(job["seed"] for job in jobs) == [0, 0, 1, 1, 2, 2]
    assert len(results(folder, "runs/evaluate/*/metrics.json")) == 1
    assert len(list(folder.glob("runs/spotify-gru-seed0/*/metrics.json"))) == 1
    huber = (next(folder.glob("runs/spotify-mamba-seed0/*/config.yaml"))).read_text()
    assert "my_losses.Huber" in huber and "delta: 0.5" in huber
    report = (folder / "runs/multirun/gru/report/report.md").read_text()
    assert re.search(r"\| Gru \|.*\n", report)
    assert "Mamba4Rec" in report
