"""A run resumes with the options and the data of its checkpoint, or says what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import TINY

from recsys_ssm.cli.resolvers import run_folder
from recsys_ssm.errors import UserError
from recsys_ssm.run.assemble import check_name

QUICK = (*TINY, "backbone=mamba", "backbone.d_model=16", "backbone.n_layers=1", "logger=none")


def clicks(path: Path, shift: int = 0) -> None:
    """Write 40 users' walks over 12 items, the items renamed by ``shift``."""
    rows = ["user_id,item_id,timestamp"]
    for user in range(40):
        rows += [f"u{user},i{(user + t) % 12 + shift},{t}" for t in range(6)]
    path.write_text("\n".join(rows) + "\n")


SHOP = ("dataset=interactions", "dataset.interactions=clicks.csv", "backbone=mamba", "logger=none",
        "trainer.enable_progress_bar=false", "dataset.cache_dir=cache")  # fmt: skip


def test_a_changed_option_is_refused_and_a_longer_training_is_not(cli, tmp_path: Path) -> None:
    clicks(tmp_path / "clicks.csv")
    assert cli("train", *SHOP, "trainer.max_epochs=1", "optimizer.lr=0.001").code == 0
    resumed = (*SHOP, "trainer.max_epochs=2", "ckpt_path=last")
    outcome = cli("train", *resumed, "optimizer.lr=0.1")
    assert (
        outcome.code == 1
        and "optimizer.lr=0.1: the checkpoint was trained with 0.001" in outcome.err
    )
    outcome = cli("train", *resumed, "callbacks.early_stopping.patience=3")
    assert outcome.code == 1 and "callbacks.early_stopping.patience=3" in outcome.err
    assert cli("train", *resumed).code == 0
    [run] = tmp_path.glob("runs/*/*/metrics.json")
    assert json.loads(run.read_text())["steps"] == 2


def test_other_items_are_refused(cli, tmp_path: Path) -> None:
    clicks(tmp_path / "clicks.csv")
    assert cli("train", *SHOP, "trainer.max_epochs=1").code == 0
    clicks(tmp_path / "clicks.csv", shift=1)  # as many items, but others
    outcome = cli("train", *SHOP, "trainer.max_epochs=2", "ckpt_path=last")
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "items and split are not those of the training" in outcome.err


@pytest.mark.parametrize(
    "name", ["checkpoints/last.ckpt", "checkpoints/best.ckpt.sha256", "metrics.json", "curves.png"]
)
def test_a_folder_in_place_of_a_file_is_one_line_before_the_training(
    cli, tmp_path: Path, name: str
) -> None:
    """It resumed from the other checkpoint, trained, and then could not write."""
    assert cli("train", *QUICK).code == 0
    [run] = tmp_path.glob("runs/*/*")
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    before = (run / "history.json").read_bytes()
    outcome = cli("train", *QUICK, "trainer.max_steps=12", "ckpt_path=last")
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert f"{name}: a folder where a file of the run is written; move it away" in outcome.err
    assert (run / "history.json").read_bytes() == before


def test_last_is_the_newest_run_and_not_an_older_one(cli, tmp_path: Path) -> None:
    assert cli("train", *QUICK).code == 0
    [finished] = tmp_path.glob("runs/*/*")
    stopped = finished.with_name("9999-01-01_00-00-00")  # stopped before its first validation
    stopped.mkdir()
    (stopped / "config.yaml").write_text((finished / "config.yaml").read_text())
    before = (finished / "config.yaml").read_text()
    outcome = cli("train", *QUICK, "trainer.max_steps=16", "ckpt_path=last")
    assert outcome.code == 1 and "stopped before its first checkpoint" in outcome.err
    assert (finished / "config.yaml").read_text() == before


def test_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    folders = set()
    for _ in range(5):
        run_folder.cache_clear()
        folders.add(run_folder(str(tmp_path), "run", None))
    assert len(folders) == 5 and all(Path(folder).is_dir() for folder in folders)


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a\\b", "x" * 300])
def test_a_name_is_not_a_path(name: str) -> None:
    with pytest.raises(UserError, match="name="):
        check_name(name, "name")


@pytest.mark.parametrize("option", ["name=../../x", "dataset.name=../x", "name=" + "x" * 300])
def test_no_option_leaves_output_root(cli, tmp_path: Path, option: str) -> None:
    (tmp_path / "inside").mkdir()
    outcome = cli("train", *QUICK, option, "output_root=inside/runs")
    assert (
        outcome.code == 1
        and outcome.err.startswith("error: name=")
        and outcome.err.count("\n") == 1
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"inside"}
    assert not any((tmp_path / "inside").iterdir())
