from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import SMALL_MAMBA, TINY

QUICK = (*TINY, *SMALL_MAMBA, "logger=none")


@pytest.fixture
def run(cli, tmp_path: Path) -> Path:
    assert cli("train", *QUICK).code == 0
    [folder] = tmp_path.glob("runs/*/*")
    return folder


def results_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_gives_the_same_figures_again(cli, run: Path, tmp_path: Path) -> None:
    outcome = cli("evaluate", f"run={run}", "output_dir=again")
    assert outcome.code == 0, outcome.text
    assert "this run" in outcome.out and "again/metrics.json" in outcome.out
    again, before = results_of(tmp_path / "again"), results_of(run)
    for key in ("metrics", "metrics_all_users", "baselines", "published", "name"):
        assert again[key] == before[key]


def test_a_checkpoint_file_other_users_other_metrics(cli, run: Path, tmp_path: Path) -> None:
    outcome = cli(
        "evaluate",
        f"run={run / 'checkpoints' / 'last.ckpt'}",
        "+dataset.n_test_users=33",
        "metrics=[hr@3]",
        "output_dir=other",
    )
    assert outcome.code == 0, outcome.text
    metrics = results_of(tmp_path / "other")["metrics"]
    assert metrics["n_users"] == 33 and set(metrics) == {
        "hr@3",
        "n_users",
        "n_users_without_relevant",
    }


def test_mistakes_are_one_line(cli, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk" / "checkpoints").mkdir(parents=True)
    (tmp_path / "junk" / "checkpoints" / "best.ckpt").write_bytes(b"junk")
    (tmp_path / "junk" / "config.yaml").write_text((run / "config.yaml").read_text())
    for arguments, message in [
        (["run=nowhere"], "run=nowhere: no checkpoints/best.ckpt in it"),
        (["run=empty"], "run=empty: no checkpoints/best.ckpt in it"),
        (["run=junk"], "best.ckpt: not a readable checkpoint"),
        ([f"run={run}", "checkpoint=middle"], "checkpoint=middle"),
        ([f"run={run}", "+dataset.n_userss=3"], "dataset.n_userss: no such option"),
        ([f"run={run}", "metrics=[x@1]"], "unknown metric 'x@1'"),
        ([], "error: run: not given, and it has no default; add run=…"),
    ]:
        outcome = cli("evaluate", *arguments)
        assert outcome.code == 1 and message in outcome.err, outcome.err
        assert "Traceback" not in outcome.text and outcome.err.count("\n") == 1


def test_another_dataset_than_the_trained_one(cli, run: Path, tmp_path: Path) -> None:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("recsys_ssm.data.spotify.SpotifyData", "recsys_ssm.data.vaccine.VaccineData")
    )
    outcome = cli("evaluate", f"run={run}")
    assert outcome.code == 1 and "no such option" in outcome.err
