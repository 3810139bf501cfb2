"""Language models as recommenders through the commands: train, test again, recommend, stop, sweep and report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from kill import kill_after_checkpoint

for package in ("transformers", "peft", "bm25s"):
    pytest.importorskip(package, reason="the extra text is not installed")

SHOP = (
    "dataset=shop", "dataset.n_customers=40", "dataset.n_items=24", "dataset.mean_orders=6",
    "logger=none", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
)  # fmt: skip
SMALL = ("dataset.batch_samples=64", "text.vocabulary=400", "text.d_model=16", "text.n_layers=1")
GPT4REC = ("experiment=text/gpt4rec", *SHOP, *SMALL, "model.n_queries=2", "model.query_tokens=8")
LLAMAREC = (
    "experiment=text/llamarec",
    *SHOP,
    *SMALL,
    "retriever=runs/first",
    "model.title_tokens=8",
)


@pytest.fixture
def retrieved(cli: Callable) -> None:
    """Train a retriever in ``runs/first``."""
    options = ("backbone=mamba", "backbone.d_model=16", "trainer.max_epochs=2", "name=first")
    assert cli("train", *SHOP, *options).code == 0


def only(folder: Path, name: str) -> Path:
    [run] = folder.glob(f"{name}/*/metrics.json")
    return run.parent


@pytest.mark.parametrize("options", [GPT4REC, LLAMAREC], ids=["gpt4rec", "llamarec"])
def test_a_run_is_trained_tested_again_and_recommends(
    cli: Callable, retrieved: None, tmp_path: Path, options: tuple[str, ...]
) -> None:
    outcome = cli("train", *options, "trainer.max_epochs=1", "name=text")
    assert outcome.code == 0, outcome.text
    assert "items: titles of 24 of 24 items" in outcome.text
    assert ("Two stages: the target of" in outcome.text) == ("retriever=runs/first" in options)
    run = only(tmp_path / "runs", "text")
    results = json.loads((run / "metrics.json").read_text())
    assert results["metrics"]["n_users"] == 40
    assert set(results["latency"]) == {"users_1", "users_256"}
    outcome = cli("evaluate", f"run={run}", "output_dir=again")
    assert outcome.code == 0, outcome.text
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    for key in ("metrics", "metrics_unfiltered", "baselines"):
        assert again[key] == results[key]
    outcome = cli("recommend", f"run={run}", "k=3", "output=three.csv")
    assert outcome.code == 0, outcome.text
    table = pl.read_csv(tmp_path / "three.csv")
    assert table["user"].n_unique() >= 20 and table["rank"].max() == 3
    users = pl.read_parquet(run / "test_users.parquet")
    assert users.height == 40
    if "retriever=runs/first" in options:
        first = json.loads((only(tmp_path / "runs", "first") / "metrics.json").read_text())
        assert results["baselines"]["retriever"] == first["metrics"]
        assert results["two_stages"]["share"] == pytest.approx(first["metrics"]["hr@20"])
        # The retriever travels in the checkpoint.
        (tmp_path / "runs" / "first").rename(tmp_path / "moved")
        assert cli("evaluate", f"run={run}", "output_dir=alone").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [GPT4REC, LLAMAREC], ids=["gpt4rec", "llamarec"])
def test_a_killed_run_goes_on_to_the_same_figures(
    cli: Callable, retrieved: None, tmp_path: Path, options: tuple[str, ...]
) -> None:
    base = [*options, "trainer.max_epochs=6", "name=text"]
    kill_after_checkpoint(tmp_path, base)
    assert cli("train", *base, "ckpt_path=last").code == 0
    assert cli("train", *base, "output_dir=whole").code == 0
    resumed = json.loads((only(tmp_path / "runs", "text") / "metrics.json").read_text())
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    for key in ("metrics", "metrics_unfiltered", "steps"):
        assert resumed[key] == whole[key]
    last = [
        (folder / "history.json").read_text()
        for folder in (only(tmp_path / "runs", "text"), tmp_path / "whole")
    ]
    losses = [[each.get("train/loss") for each in json.loads(text)] for text in last]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_sweep_is_reported_in_cells(cli: Callable, retrieved: None, tmp_path: Path) -> None:
    outcome = cli(
        "train", "--multirun", "seed=0,1", *LLAMAREC, "trainer.max_epochs=1", "sweep=both"
    )
    assert outcome.code == 0, outcome.text
    outcome = cli(
        "train", *GPT4REC, "trainer.max_epochs=1", "name=other", "output_root=runs/multirun"
    )
    assert outcome.code == 0, outcome.text
    outcome = cli("report", "runs/multirun")
    assert outcome.code == 0, outcome.text
    text = (tmp_path / "runs" / "multirun" / "report" / "report.md").read_text()
    assert "Gpt4Rec" in text and "LlamaRec" in text, text
    assert "settings of backbones: 2" in text, "two seeds of one retriever are one cell"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("experiment=text/gpt4rec", *SHOP, "text.model=./gone"),
            "text.model=./gone: no such folder",
        ),
        (
            ("experiment=text/gpt4rec", *SHOP, "text.model=openai/x"),
            "text.revision=None: not a folder",
        ),
        (("experiment=text/gpt4rec", *SHOP, "text.modle=tiny"), "did you mean 'model'"),
        (("experiment=text/llamarec", *SHOP), "retriever: not set, and LlamaRec"),
        (
            ("experiment=text/llamarec", *SHOP, "retriever=no"),
            "retriever=no: no checkpoints/best.ckpt in it",
        ),
        (("experiment=text/gpt4rec", *SHOP, "retriever=no"), "Gpt4Rec ranks the whole catalogue"),
        (
            ("experiment=text/gpt4rec", "dataset=amazon_beauty_2014", *SHOP[4:]),
            "dataset.item_title: not set, and language models read the titles",
        ),
    ],
)
def test_mistakes_are_one_line(
    cli: Callable,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setenv("RECSYS_SSM_DATA", str(shared_data))
    outcome = cli("train", *options)
    assert outcome.code == 1 and message in outcome.err, outcome.text
    assert len(outcome.err.strip().splitlines()) == 1 and "Traceback" not in outcome.text


def test_a_retriever_of_another_split_is_refused(
    cli: Callable, retrieved: None, tmp_path: Path
) -> None:
    """It may have been trained on the items that are tested here."""
    outcome = cli("train", *LLAMAREC, "dataset.split=time", "trainer.max_epochs=1")
    assert outcome.code == 1 and "the data's split are not those of the training" in outcome.err


def test_a_retriever_that_has_not_finished_is_refused(
    cli: Callable, retrieved: None, tmp_path: Path
) -> None:
    (only(tmp_path / "runs", "first") / "metrics.json").unlink()
    outcome = cli("train", *LLAMAREC, "trainer.max_epochs=1")
    assert outcome.code == 1 and "has not finished; continue it" in outcome.err, outcome.text
    assert len(outcome.err.strip().splitlines()) == 1
