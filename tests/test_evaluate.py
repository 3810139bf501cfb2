from __future__ import annotations

import json
import subprocess
import sys
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


def test_a_checkpoint_file_and_other_metrics(cli, run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    outcome = cli("evaluate", f"run={checkpoint}", "metrics=hr@3", "output_dir=other")
    assert outcome.code == 0, outcome.text
    metrics = results_of(tmp_path / "other")["metrics"]
    assert set(metrics) == {"hr@3", "n_users", "n_users_without_relevant"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("dataset.n_test_users=33", "dataset.n_test_users=33: the run was trained with 20"),
        ("dataset.seed=7", "dataset.seed=7: the run was trained with 0"),
    ],
)
def test_users_that_were_trained_on_are_not_tested(
    cli, run: Path, tmp_path: Path, option: str, message: str
) -> None:
    outcome = cli("evaluate", f"run={run}", option, "output_dir=other")
    assert outcome.code == 1 and message in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "other" / "metrics.json").exists()


def test_a_run_by_its_name_and_the_newest_one(cli, run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "best.ckpt").unlink()
    for given in ("last", run.parent.name, f"runs/{run.parent.name}"):
        outcome = cli("evaluate", f"run={given}", f"output_dir={given}-out")
        assert outcome.code == 0, outcome.text
        assert (
            "no best.ckpt in it, last.ckpt is used" in outcome.out and str(run.name) in outcome.out
        )
    outcome = cli("evaluate", "run=last", "output_root=elsewhere")
    assert outcome.code == 1 and "run=last: no trained run under elsewhere" in outcome.err


def test_an_own_backbone_is_imported_if_the_user_names_it(cli, tmp_path: Path) -> None:
    (tmp_path / "my_gru.py").write_text(
        "from recsys_ssm.models.backbones.mamba import Mamba\n\nclass Gru(Mamba):\n    pass\n"
    )
    own = ("import=my_gru", "backbone._target_=my_gru.Gru", "name=own")
    assert cli("train", *QUICK, *own).code == 0
    for command, options in (("evaluate", ()), ("recommend", ("users=none.csv",))):
        script = f"from recsys_ssm.{command} import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", script, "run=own", *options],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and "import=my_gru" in done.stderr
        assert done.stderr.count("\n") == 1
    for name in ("my_gru", "my_gru.py"):
        outcome = cli("evaluate", "run=own", f"import={name}", f"output_dir=out-{name}")
        assert outcome.code == 0, outcome.text
    outcome = cli("evaluate", "run=own", "import=nowhere")
    assert outcome.code == 1 and "import=nowhere: cannot be imported" in outcome.err


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
