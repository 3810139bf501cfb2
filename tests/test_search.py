"""The search command: its space, its trials as jobs, pruning, and a search that is killed and resumed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import SMALL_MAMBA, TINY

from recsys_ssm.errors import UserError
from recsys_ssm.search import prepare, searched_options
from recsys_ssm.sweeps import status

optuna = pytest.importorskip("optuna", minversion="4")

QUICK = (
    *TINY,
    *SMALL_MAMBA,
    "dataset=spotify",
    "logger=none",
    "trainer.accelerator=cpu",
    "scheduler=none",
)


def jobs_of(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("runs/search/*/*/job_status.json"))


def study_of(root: Path) -> optuna.Study:
    [path] = root.glob("runs/search/*/study.db")
    return optuna.load_study(study_name="search", storage=f"sqlite:///{path}")


def states_of(root: Path) -> list[str]:
    return [trial.state.name for trial in study_of(root).get_trials()]


# ---------------------------------------------------------------------------------------- space

SPACE = {
    "optimizer": {"lr": {"low": 1e-5, "high": 1e-3, "log": True}},
    "scheduler": {"choices": ["none", "cosine"]},
}


def test_a_space_is_flat_options_and_the_command_line_replaces_adds_and_removes() -> None:
    lr, scheduler = SPACE["optimizer"]["lr"], SPACE["scheduler"]
    assert searched_options(SPACE, []) == {"optimizer.lr": lr, "scheduler": scheduler}
    merged = {**SPACE, "optimizer": {"lr": {**lr, "choices": [0.1, 0.2]}}}  # by Hydra
    given = ["search.space.optimizer.lr={choices: [0.1, 0.2]}"]
    assert searched_options(merged, given)["optimizer.lr"] == {"choices": [0.1, 0.2]}
    added = {**SPACE, "backbone": {"d_state": [16, 32]}}
    given = ["++search.space.backbone.d_state=[16,32]", "backbone.n_layers=2"]
    assert searched_options(added, given)["backbone.d_state"] == [16, 32]
    assert searched_options({**SPACE, "scheduler": None}, ["search.space.scheduler=null"]) == {
        "optimizer.lr": lr
    }
    # A fixed option is not searched.
    assert searched_options(SPACE, ["scheduler=cosine"]) == {"optimizer.lr": lr}
    with pytest.raises(UserError, match=r"scheduler: both fixed \(scheduler=none\) and searched"):
        searched_options(SPACE, ["scheduler=none", "++search.space.scheduler=[none]"])
    with pytest.raises(UserError, match=r"nothing to search; give 'search\.space"):
        searched_options(SPACE, ["scheduler=none", "optimizer.lr=1"])


def test_a_search_is_named_after_its_options_and_its_space() -> None:
    name = prepare(["dataset=spotify", "search.n_trials=3", "search.pruner=null"])[-1]
    assert name == "sweep=dataset-spotify"
    assert prepare(["dataset=spotify", "launcher=joblib", "search.n_trials=9"])[-1] == name
    other = prepare(["dataset=spotify", "search.space.backbone.d_state=[16,32]", "seed=1"])
    assert "++search.space.backbone.d_state=[16,32]" in other
    assert other[-1] == "sweep=d_state-16-32-_dataset-spotify_seed-1"
    assert prepare(["sweep=x", "dataset=spotify"]) == ["sweep=x", "dataset=spotify"]


# ------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--multirun"], "--multirun: a search runs many trials by itself"),
        (["test=best"], "test=best: a search looks at validation alone"),
        (["search.n_trials=0"], "search.n_trials=0: expected a whole number above 0"),
        (["search.n_trial=3"], "search.n_trial: no such option; did you mean 'n_trials'"),
        (["search.space.optimizer.lr=3"], "search.space.optimizer.lr=3: neither a range"),
        (["search.sampler={_target_: optuna.samplers.TPE}"], "search.sampler._target_=optuna"),
    ],
)
def test_a_mistake_is_one_line(cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = cli("search", "dataset=spotify", *arguments)
    assert outcome.code == 1 and outcome.err.startswith(f"error: {message}"), outcome.text
    assert outcome.err.count("\n") == 1 and not jobs_of(tmp_path)


def test_a_broken_study_is_one_line(cli, tmp_path: Path) -> None:
    study = tmp_path / "runs" / "search" / "s" / "study.db"
    study.parent.mkdir(parents=True)
    study.write_text("not a database" * 99)
    outcome = cli("search", "dataset=spotify", "sweep=s")
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: runs/search/s/study.db: cannot be read as a study (file")


def test_a_search_without_optuna_says_what_to_install(cli, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    outcome = cli("search", "dataset=spotify")
    assert outcome.code == 1
    assert outcome.err.endswith('not installed; pip install "recsys-ssm[optuna]"\n')


def test_a_failed_trial_counts_as_failed_and_the_best_is_ready_to_train(
    cli, tmp_path: Path
) -> None:
    space = "search.space.backbone.d_model={choices: [16, 7]}"
    grid = "search.sampler={_target_: optuna.samplers.BruteForceSampler}"
    fixed = [each for each in QUICK if not each.startswith("backbone.d_model")]
    # d_model=7 fails: the heads of a transformer do not divide it.
    arguments = [*fixed, "backbone=transformer", "optimizer.lr=1e-4", space, grid]
    arguments.remove("backbone=mamba")
    outcome = cli("search", *arguments, "search.n_trials=2")
    assert outcome.code == 0, outcome.text
    assert "1 of 2 done, 1 failed" in outcome.err and "Traceback" not in outcome.err
    assert outcome.err.count("error (1 trial, runs/search/") == 1
    assert sorted(states_of(tmp_path)) == ["COMPLETE", "FAIL"]
    assert "1 complete, 0 pruned, 1 failed" in outcome.out
    [good] = [job for job in jobs_of(tmp_path) if status.is_finished(job)]
    found = json.loads((good / "metrics.json").read_text())
    assert "metrics" not in found and "test=null" in found["overrides"]
    [line] = [line for line in outcome.out.splitlines() if line.startswith("next")]
    words = shlex.split(line.removeprefix("next").strip())
    assert words[:4] == ["python", "-m", "recsys_ssm.train", "--multirun"]
    assert "backbone.d_model=16" in words and words[-1] == "seed=range(5)"
    assert not any(word.startswith(("search", "test", "sweep")) for word in words)
    # The command does what it says, in the folder that the next line names.
    trained = cli("train", *words[3:-1], "seed=0")
    assert trained.code == 0, trained.text
    [report] = [line for line in outcome.out.splitlines() if line.startswith("then")]
    folder = tmp_path / report.split()[-1]
    assert [status.job_state(path.parent) for path in folder.glob("*/job_status.json")] == [
        "finished"
    ]

    # Another search in the same folder is refused.
    name = f"sweep={good.parent.name}"
    outcome = cli("search", *arguments, name, "seed=1")
    assert outcome.code == 1 and "seed not given then, 1 now" in outcome.err
    assert "give another name with sweep=" in outcome.err


def test_pruned_trials_stop_and_two_run_at_once(cli, tmp_path: Path) -> None:
    long = ("trainer.max_steps=20000", "validations=2000", "launcher.processes=2", "sweep=s")
    pruner = "search.pruner={_target_: optuna.pruners.ThresholdPruner, lower: 2.0}"
    outcome = cli("search", *QUICK, *long, pruner, "search.n_trials=2")
    assert outcome.code == 1 and "2 of 2 done (2 pruned), 0 failed" in outcome.err
    assert "no trial of runs/search/s is complete; all were pruned" in outcome.err
    first, second = (status.read_status(job) for job in jobs_of(tmp_path))
    assert first["state"] == second["state"] == "pruned"
    assert max(first["started"], second["started"]) < min(first["ended"], second["ended"])
    for job in jobs_of(tmp_path):
        assert 1 <= len(status.validations(job, "val/ndcg@10")) < 2000
        assert not status.is_finished(job)
    trials = study_of(tmp_path).get_trials()
    assert [trial.state.name for trial in trials] == ["PRUNED", "PRUNED"]
    assert all(min(trial.intermediate_values) == 1 for trial in trials)
    # They count as done.
    outcome = cli("search", *QUICK, *long, pruner, "search.n_trials=2")
    assert outcome.code == 1 and len(jobs_of(tmp_path)) == 2


def test_a_killed_search_resumes(tmp_path: Path) -> None:
    """Killed in its second trial: the first is kept, the second goes on from its checkpoint, a third is drawn."""
    command = [
        *(sys.executable, "-m", "recsys_ssm.search", *QUICK, "trainer.max_steps=200"),
        *("validations=20", "search.n_trials=3", "search.pruner=null"),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 200
    while len(list(tmp_path.glob("runs/search/*/*/checkpoints/last.ckpt"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert states_of(tmp_path) == ["COMPLETE", "RUNNING"]
    [done] = [job for job in jobs_of(tmp_path) if status.is_finished(job)]
    [cut] = [job for job in jobs_of(tmp_path) if job != done]
    before = (done / "metrics.json").stat().st_mtime_ns

    # Stopped in order, a search says how to go on. Tests that run in a shell's background inherit Ctrl-C ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, inherited)
    while status.read_status(cut).get("attempt") != 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1] == "stopped; the same command resumes the search", err
    assert status.job_state(cut) == "interrupted"

    again = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 0, again.stderr
    assert (done / "metrics.json").stat().st_mtime_ns == before
    assert status.read_status(done)["attempt"] == 1 and status.read_status(cut)["attempt"] == 3
    assert "ckpt_path=last" in status.read_status(cut)["command"]
    trials = study_of(tmp_path).get_trials()
    assert [trial.state.name for trial in trials].count("COMPLETE") == 3
    assert len(jobs_of(tmp_path)) == 3
    assert "(3 complete, 0 pruned, 0 failed;" in again.stdout
    # A resumed job has each validation once, and the very values of one that was not cut short.
    lines = (cut / "validations.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(10, 201, 10))
    values = status.validations(cut, "val/ndcg@10")
    assert max(values) == status.read_status(cut)["objective"]
    [resumed] = [t for t in trials if t.value == max(values) and t.user_attrs["folder"] == cut.name]
    assert list(resumed.intermediate_values.values()) == pytest.approx(values)
