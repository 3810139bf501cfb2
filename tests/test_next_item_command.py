"""Next-item recommendation through the doors: a file of interactions in, a table and a run's folder out."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

N_ITEMS = 15
SMALL = (
    "backbone.d_model=16",
    "trainer.max_epochs=2",
    "dataset.max_length=8",
    "dataset.batch_positions=128",
    "trainer.enable_progress_bar=false",
    "logger=none",
)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    generator = random.Random(0)
    rows = []
    for user in range(40):
        start = generator.randrange(N_ITEMS)
        rows += [(f"u{user}", f"i{(start + t) % N_ITEMS}", t) for t in range(4 + user % 6)]
    path = tmp_path / "mine.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    return path


def train(cli, csv: Path, *options: str):
    return cli("train", "dataset=interactions", f"dataset.interactions={csv}", *SMALL, *options)


def only_run(folder: Path) -> Path:
    [run] = folder.glob("runs/*/*")
    return run


@pytest.mark.parametrize("backbone", ["mamba", "mamba2", "hydra", "transformer", "ligr"])
def test_every_backbone_ends_with_the_table(cli, csv: Path, tmp_path: Path, backbone: str) -> None:
    extra = ("backbone.headdim=8",) if backbone in ("mamba2", "hydra") else ()
    outcome = train(cli, csv, f"backbone={backbone}", *extra)
    assert outcome.code == 0, outcome.text
    for word in ("this", "allowed", "popularity", "repeat", "ndcg@20", "coverage@10"):
        assert word in outcome.out
    run = only_run(tmp_path)
    results = json.loads((run / "metrics.json").read_text())
    assert results["metrics"]["n_users"] == 40
    assert set(results["latency"]) == {"users_1", "users_256"}
    assert results["latency"]["users_1"] > 0
    embeddings = (N_ITEMS + 1) * 16 + (8 * 16 if backbone in ("transformer", "ligr") else 0)
    parameters = results["parameters"]
    assert parameters["total"] - parameters["without_embeddings"] == embeddings
    users = pl.read_parquet(run / "test_users.parquet")
    assert users.height == 40 and (users["n_relevant"] == 1).all()
    assert pl.read_parquet(run / "items.parquet")["train_count"].sum() > 0


def test_evaluate_gives_the_same_figures_and_other_metrics(cli, csv, tmp_path: Path) -> None:
    assert train(cli, csv).code == 0
    run = only_run(tmp_path)
    outcome = cli("evaluate", f"run={run}", "output_dir=again")
    assert outcome.code == 0, outcome.text
    before = json.loads((run / "metrics.json").read_text())
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    for key in ("metrics", "metrics_unfiltered", "baselines"):
        assert again[key] == before[key]
    outcome = cli("evaluate", f"run={run}", "output_dir=other", "metrics=[hr@3]")
    assert outcome.code == 0, outcome.text
    other = json.loads((tmp_path / "other" / "metrics.json").read_text())
    assert set(other["metrics"]) == {"hr@3", "n_users", "n_users_without_relevant"}
    # Other items: another catalogue.
    csv.write_text(csv.read_text() + "u0,new,99\n")
    outcome = cli("evaluate", f"run={run}", "output_dir=third")
    assert outcome.code == 1 and "differ from those of the training" in outcome.err


def test_mistakes_are_one_line(cli, csv: Path) -> None:
    for options, message in [
        (
            ["backbone=hydra", "backbone.headdim=8", "dataset.objective=all"],
            "sees the whole history",
        ),
        (["backbone=transformer", "backbone.causal=false"], "sees the whole history"),
        (["backbone=mamba2", "backbone.headdim=64"], "backbone: headdim=64 does not divide"),
        (["task=two_tower"], "task=two_tower needs users and items with features"),
        (["head=two_tower"], "head._target_=recsys_ssm.models.heads.TowerHead: not a NextItemHead"),
        (["loss.kind=hinge"], "loss.kind='hinge'"),
        (["dataset.max_length=0"], "dataset.max_length=0"),
        (["tokenizer.positions=2"], "tokenizer.positions=2"),
        (["dataset.item=article"], "no column 'article'"),
    ]:
        outcome = train(cli, csv, *options)
        assert outcome.code == 1, options
        assert message in outcome.err and "Traceback" not in outcome.text
        assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    outcome = train(cli, csv, "monitor=val/nothing", "trainer.max_epochs=1")
    assert outcome.code == 1 and "Traceback" not in outcome.text
    assert "monitor=val/nothing: validation has no such value; choose from val/cov" in outcome.err
    outcome = cli("train", "dataset=spotify", "task=next_item", "logger=none")
    assert outcome.code == 1 and "task=next_item needs a dataset of histories" in outcome.err


def test_two_processes_give_the_figures_of_one(cli, csv: Path, tmp_path: Path) -> None:
    data = ("dataset=interactions", f"dataset.interactions={csv}")
    two = ("trainer.strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    done = subprocess.run(
        [sys.executable, "-m", "recsys_ssm.train", *data, *SMALL, *two, "backbone.d_state=8"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path)
    assert cli("evaluate", f"run={run}", "output_dir=alone").code == 0
    together, alone = (
        json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "alone")
    )
    assert together["metrics"]["n_users"] == 40
    for key in ("metrics", "metrics_unfiltered"):
        assert together[key] == pytest.approx(alone[key], rel=1e-12)
    assert pl.read_parquet(run / "test_users.parquet").height == 40


def test_metrics_without_the_monitored_one(cli, csv: Path, tmp_path: Path) -> None:
    """Early stopping and the best checkpoint go by ndcg@10 all the same."""
    assert train(cli, csv, "metrics=[hr@20,map@12]", "trainer.max_epochs=1").code == 0
    results = json.loads((only_run(tmp_path) / "metrics.json").read_text())
    assert {"hr@20", "map@12", "ndcg@10"} <= set(results["metrics"])
    assert "hr@5" not in results["metrics"]


def test_a_run_may_end_before_its_first_validation(cli, csv: Path, tmp_path: Path) -> None:
    outcome = train(cli, csv, "trainer.max_steps=1", "output_dir=short")
    assert outcome.code == 0, outcome.text
    assert json.loads((tmp_path / "short" / "metrics.json").read_text())["steps"] == 1


def test_the_same_seed_gives_the_same_digits(cli, csv: Path, tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        outcome = train(cli, csv, f"seed={seed}", f"output_dir=run{len(found)}")
        assert outcome.code == 0, outcome.text
        results = json.loads((tmp_path / f"run{len(found)}" / "metrics.json").read_text())
        found.append(results["metrics"])
    assert found[0] == found[1] and found[0] != found[2]


def test_resumed_after_a_stop_it_is_the_undisturbed_run(cli, csv: Path, tmp_path: Path) -> None:
    options = ("trainer.max_epochs=4", "loss=sampled_softmax", "loss.negatives=5")
    assert train(cli, csv, *options, "output_dir=whole").code == 0
    assert train(cli, csv, *options, "output_dir=half", "trainer.max_epochs=2").code == 0
    outcome = train(cli, csv, *options, "output_dir=rest", "ckpt_path=half/checkpoints/last.ckpt")
    assert outcome.code == 0, outcome.text
    whole, rest = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "rest")
    )
    assert whole["metrics"] == rest["metrics"] and whole["steps"] == rest["steps"]
