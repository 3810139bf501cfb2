"""States of jobs, the line of a sweep and its table."""

from __future__ import annotations

import math
import os
import subprocess
import time
from pathlib import Path

import pytest

from recsys_ssm.run.files import write_json
from recsys_ssm.sweeps import jobs, progress, status


def make_job(folder: Path, **status: object) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "job_status.json", status)
    return folder


def test_what_became_of_a_job(tmp_path: Path) -> None:
    host, gone = os.uname().nodename, subprocess.Popen(["true"])
    gone.wait()
    running = {"state": "running", "host": host, "pid": os.getpid()}
    assert status.job_state(make_job(tmp_path / "a", **running)) == "running"
    assert (
        status.job_state(make_job(tmp_path / "b", **running | {"pid": gone.pid})) == "interrupted"
    )
    assert status.job_state(make_job(tmp_path / "c", state="failed")) == "failed"
    assert status.job_state(tmp_path / "none") == "missing"
    (tmp_path / "b" / "metrics.json").write_text('{"metrics": {"p@5": 0.')
    assert status.job_state(tmp_path / "b") == "interrupted"  # half a file is no result
    write_json(tmp_path / "b" / "metrics.json", {"metrics": {}})
    assert status.job_state(tmp_path / "b") == "finished"
    (tmp_path / "c" / "job_status.json").write_text("{")
    assert status.job_state(tmp_path / "c") == "missing"


def test_the_line_of_a_sweep(tmp_path: Path) -> None:
    began = time.time() - 100
    times = {"started": jobs.iso_time(began + 1), "ended": jobs.iso_time(began + 31), "seconds": 30}
    for i, value in enumerate([0.5, 0.75, None]):
        job = make_job(tmp_path / f"job{i}-0000000{i}", state="finished", objective=value, **times)
        write_json(job / "metrics.json", {})
    make_job(tmp_path / "job-00000003", state="failed", **times)
    make_job(tmp_path / "old-00000004", state="failed", started=jobs.iso_time(1), ended="")
    alive = {"host": os.uname().nodename, "pid": os.getpid()}
    make_job(
        tmp_path / "on-00000005", state="running", started=jobs.iso_time(time.time() - 10), **alive
    )
    hashes = {f"0000000{i}" for i in range(8)}
    summary = progress.summarize(tmp_path, hashes, 8, "max", began)
    assert summary.done == 3 and summary.running == 1
    assert [job.name for job in summary.failed] == ["job-00000003"]
    assert summary.best == ("job1", 0.75) and summary.pruned == 0
    assert summary.seconds_left == pytest.approx(4 * 30 - 10, abs=2)
    line = summary.line("mine", "val/ndcg@10")
    assert line.startswith(
        "sweep mine: 3 of 8 done, 1 failed, 1 running, 2 min left, best val/ndcg"
    )
    assert progress.summarize(tmp_path, hashes, 8, "min", began).best == ("job0", 0.5)
    # What other sweeps left in the folder does not count.
    assert progress.summarize(tmp_path, {"00000001"}, 1, "max", began).done == 1
    assert progress.summarize(tmp_path, None, None, "max", began + 50).done == 0


def test_a_pruned_job_is_done_without_a_value(tmp_path: Path) -> None:
    make_job(tmp_path / "a-00000001", state="pruned", seconds=3, started=jobs.iso_time(time.time()))
    summary = progress.summarize(tmp_path, {"00000001"}, 2, "max", 0.0)
    assert (summary.done, summary.pruned, summary.failed, summary.best) == (0, 1, [], None)
    line = summary.line("mine", "val/loss", kind="search")
    assert line == "search mine: 1 of 2 done (1 pruned), 0 failed"


def finished(folder: Path, value: float, *overrides: str, **results: object) -> None:
    make_job(folder, state="finished", objective=value, monitor="m", overrides=list(overrides))
    write_json(folder / "metrics.json", results)


def test_the_table_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        finished(tmp_path / f"a{seed}", value, "d=x", "lr=0.1", f"seed={seed}", "logger=csv")
        finished(tmp_path / f"b{seed}", value + 1, f"seed={seed}", "lr=0.2", "d=x", "loss=mse")
    finished(tmp_path / "c", 0.5, "d=x", "lr=0.1", "loss=mse", "seed=0", metrics={"p@5": 1.0})
    make_job(tmp_path / "failed", state="failed", objective=9.0, monitor="m")
    best, second, third = progress.results_by_setting(tmp_path, "m", "max")
    assert best.options == {"lr": "0.2", "loss": "'mse'"} and len(best.values) == 3
    assert best.mean == pytest.approx(1.2)
    # Student's t of two degrees of freedom, 4.3027, times .1 / sqrt(3)
    assert best.half_width == pytest.approx(0.248414, abs=1e-6)
    assert second.options == {"lr": "0.1", "loss": "'mse'"} and math.isnan(second.half_width)
    assert third.options == {"lr": "0.1"}
    assert progress.results_by_setting(tmp_path, "m", "min")[0] == third
    progress.print_sweep(tmp_path, "m", "max")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["mse", "0.2", "1.2000", "0.2484", "3"] in rows
    assert ["mse", "0.1", "0.5000", "–", "1"] in rows
    assert ["default", "0.1", "0.2000", "0.2484", "3"] in rows
    assert out.endswith(f"next: python -m recsys_ssm.report {tmp_path}\n")
    progress.print_sweep(tmp_path, "other", "max")
    assert capsys.readouterr().out == ""


def test_validations_of_a_running_job(tmp_path: Path) -> None:
    assert status.validations(tmp_path, "m") == []
    lines = ['{"step": 10, "m": 0.5}', '{"step": 20, "m": 0.25}', '{"step": 20, "m": 0.75}']
    half = '{"step": 30, "m"'
    (tmp_path / "validations.jsonl").write_text("\n".join([*lines, '{"step": 5}', half]))
    assert status.validations(tmp_path, "m") == [0.5, 0.75]


def test_a_job_whose_process_is_gone_is_not_left_running(tmp_path: Path) -> None:
    """After Ctrl-C of a sweep with joblib, whose workers are killed, job_status.json had "running" for good."""
    host, ended = os.uname().nodename, subprocess.Popen(["true"])
    ended.wait()
    for name, pid in (("gone", ended.pid), ("alive", os.getpid())):
        make_job(tmp_path / name, state="running", host=host, pid=pid, attempt=2)
    status.settle(tmp_path)
    found = status.read_status(tmp_path / "gone")
    assert found["state"] == "interrupted" and found["attempt"] == 2
    assert status.read_status(tmp_path / "alive")["state"] == "running"
