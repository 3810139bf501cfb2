"""Jobs are found again: finished ones are skipped, interrupted ones resumed, failed ones run again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
from small import SMALL_MAMBA, TINY

from recsys_ssm.reports.collect import collect
from recsys_ssm.sweeps import identity, jobs, status
from recsys_ssm.sweeps.progress import results_by_setting

QUICK = (*TINY, *SMALL_MAMBA, "dataset=spotify", "logger=none")


def jobs_of(root: Path) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(root.glob("multirun/*/*"))
        if (path / "job_status.json").exists()
    }


def metrics_of(root: Path) -> dict[str, dict]:
    return {
        name: json.loads((path / "metrics.json").read_text())["metrics"]
        for name, path in jobs_of(root).items()
    }


def is_running(job: Path) -> bool:
    return status.job_state(job) == "running"


def run_sweep(cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "recsys_ssm.train", "--multirun", *QUICK, *arguments],
        check=False,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def test_workers_are_sent_a_task_without_what_runs_it() -> None:
    task = cloudpickle.loads(cloudpickle.dumps(jobs.Task("train", lambda cfg: sys.stdin)))
    assert task.command == "train" and not hasattr(task, "single")


def test_what_is_finished_is_left_and_what_failed_done_again(cli, tmp_path: Path) -> None:
    own = tmp_path / "mine" / "dataset" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [spotify, _self_]\nthreshold: 0.1\n")
    overrides = (*QUICK, "seed=0,1", "dataset=own")
    # Seed 1 fails: a file of its folder cannot be written.
    job = identity.job_folder("spotify-mamba-seed1", [*QUICK, "seed=1", "dataset=own"])
    folder = tmp_path / "runs" / "multirun" / identity.sweep_name(overrides) / job
    (folder / "config.yaml").mkdir(parents=True)
    first = cli("train", "--multirun", "--config-dir", "mine", *overrides)
    assert first.code == 1 and "1 of 2 done, 1 failed" in first.err
    assert "error (seed=1): cannot write" in first.err and "Traceback" not in first.err
    found = status.read_status(folder)
    assert found["state"] == "failed" and found["exit_code"] == 1
    assert "seed=1" in found["overrides"] and "config.yaml" in found["error"]

    [done] = [path for path in jobs_of(tmp_path / "runs").values() if path != folder]
    before = (done / "metrics.json").stat().st_mtime_ns
    (folder / "config.yaml").rmdir()
    own.write_text("defaults: [spotify, _self_]\nthreshold: 0.2\n")
    second = cli("train", "--multirun", "--config-dir", "mine", *overrides)
    assert second.code == 0, second.text
    assert "2 of 2 done, 0 failed" in second.err and "best val/ndcg@10" in second.err
    assert (
        "± 95 %" in second.out
        and f"next: python -m recsys_ssm.report {folder.parent.relative_to(tmp_path)}\n"
        in second.out
    )
    assert (done / "metrics.json").stat().st_mtime_ns == before
    assert status.read_status(done)["attempt"] == 1
    assert status.read_status(folder)["attempt"] == 2
    # The finished one was made with another option: kept, and said so.
    assert "dataset.threshold 0.1 then, 0.2 now" in second.text


def test_a_killed_job_takes_nothing_down_and_goes_on(tmp_path: Path) -> None:
    """Killed as by a lack of memory: the others go on; the same command again goes on with it."""
    arguments = ["seed=0,1", "trainer.max_steps=150", "validations=15"]
    process = subprocess.Popen(
        [sys.executable, "-m", "recsys_ssm.train", "--multirun", *QUICK, *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not (found := list(tmp_path.glob("runs/multirun/*/*/checkpoints/last.ckpt"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    victim = found[0].parent.parent
    os.kill(status.read_status(victim)["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "1 of 2 done, 1 failed" in err and "killed by SIGKILL (out of memory?)" in err
    run_sweep(tmp_path, *arguments)
    assert "ckpt_path=last" in status.read_status(victim)["command"]
    [seed] = [a for a in status.read_status(victim)["overrides"] if a.startswith("seed=")]
    run_sweep(tmp_path, seed, *arguments[1:], "output_root=whole")
    whole = metrics_of(tmp_path / "whole")
    assert len(whole) == 1 and whole.items() <= metrics_of(tmp_path / "runs").items()


def test_a_job_ends_when_its_sweep_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "recsys_ssm.train",
            "--multirun",
            *QUICK,
            "trainer.max_steps=100000",
        ],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while not (found := list(tmp_path.glob("runs/multirun/*/*/config.yaml"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    job = found[0].parent
    assert status.job_state(job) == "running"
    with jobs.lock_folder(job, wait_s=0.5) as lock:
        assert lock is None  # and no other sweep begins it meanwhile
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while status.job_state(job) != "interrupted":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_killed_ten_times_ends_as_one_that_was_not(tmp_path: Path) -> None:
    arguments = [
        "seed=range(6)",
        "head.loss=mse,bce",
        "trainer.max_steps=200",
        "validations=10",
        "launcher=joblib",
        "launcher.processes=2",
    ]
    moments = random.Random(0)
    finished: dict[str, tuple[int, int]] = {}

    def look() -> dict[str, tuple[int, int]]:
        return {
            name: ((job / "metrics.json").stat().st_mtime_ns, status.read_status(job)["attempt"])
            for name, job in jobs_of(tmp_path / "runs").items()
            if status.is_finished(job)
        }

    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-m", "recsys_ssm.train", "--multirun", *QUICK, *arguments],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # A moment that is random however slow the machine is: so many jobs on, and a little more.
        enough = len(finished) + moments.randrange(2)
        while len(look()) < enough and process.poll() is None:
            time.sleep(0.1)
        time.sleep(moments.uniform(0, 12))
        process.kill()  # its workers are left behind
        process.wait()
        deadline = time.monotonic() + 100
        while any(map(is_running, jobs_of(tmp_path / "runs").values())):
            assert time.monotonic() < deadline, "jobs outlive their sweep"
            time.sleep(0.2)
        now = look()
        assert finished.items() <= now.items(), "a finished job ran again"
        finished = now
    run_sweep(tmp_path, *arguments)
    assert finished.items() <= look().items(), "a finished job ran again"
    run_sweep(tmp_path, *arguments, "output_root=whole")
    disturbed, whole = metrics_of(tmp_path / "runs"), metrics_of(tmp_path / "whole")
    assert len(whole) == 12 and disturbed == whole
    assert finished, "killed too early each time to tell anything"


def test_jobs_that_read_other_data_are_not_joined(cli, tmp_path: Path) -> None:
    """A sweep is run again after its file has changed."""

    def write(step: int) -> None:
        rows = [f"u{u},i{(u + step * t) % 9},{t}" for u in range(30) for t in range(5)]
        (tmp_path / "clicks.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")

    sweep = (
        "--multirun",
        "sweep=daily",
        "dataset=interactions",
        "dataset.interactions=clicks.csv",
        *SMALL_MAMBA,
        "logger=none",
        "trainer.max_epochs=1",
    )
    write(1)
    assert cli("train", *sweep, "seed=0").code == 0
    write(2)
    outcome = cli("train", *sweep, "seed=0")
    assert outcome.code == 0 and "clicks.csv has changed since" in outcome.text
    outcome = cli("train", *sweep, "seed=0,1")
    assert outcome.code == 1 and "clicks.csv: has changed since the sweep's job" in outcome.err
    [kept] = tmp_path.glob("runs/multirun/daily/*/metrics.json")
    # Jobs that were joined by an earlier version are shown apart.
    other = kept.parent.with_name("joined_by_hand")
    shutil.copytree(kept.parent, other)
    for name, key in (("metrics.json", "data"),):
        content = json.loads((other / name).read_text())
        content[key] = dict.fromkeys(content[key], "0" * 64)
        content["seed"] = 1
        (other / name).write_text(json.dumps(content))
    results = results_by_setting(kept.parents[1], "val/ndcg@10", "max")
    assert [len(result.values) for result in results] == [1, 1]
    assert {"data of clicks.csv"} == set().union(*(result.options for result in results))
    cells = collect([kept.parents[1]]).cells
    assert [cell.n for cell in cells] == [1, 1]
    assert all("data of clicks.csv" in cell.task.label for cell in cells)
