"""Sweeps: jobs are found again, what is finished is left, what is killed takes nothing down with it."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import hydra
import pytest
from omegaconf import DictConfig, open_dict
from small import SMALL_MAMBA, TINY

from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.files import write_json
from recsys_ssm.sweeps import identity, jobs, progress, status

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


# -------------------------------------------------------------------------------------------- names


def test_a_job_is_what_it_does_not_how_it_is_said() -> None:
    plain = identity.job_hash(["optimizer.lr=0.0001", "seed=1", "metrics=[p@5,r@5]"])
    assert plain == identity.job_hash(["seed=1", "metrics=[p@5, r@5]", "optimizer.lr=1e-4"])
    elsewhere = ["launcher=joblib", "launcher.threads=2", "sweep=x", "logger=csv", "output_root=/x"]
    assert plain == identity.job_hash(
        ["seed=1", "optimizer.lr=1e-4", "metrics=[p@5,r@5]", *elsewhere, "logger.mode=offline"]
    )
    for other in (["seed=2"], ["optimizer.lr=1e-3"], ["+optimizer.eps=1"], ["backbone=mamba2"]):
        assert identity.job_hash(["seed=1", *other]) != identity.job_hash(["seed=1"])
    # A folder's name is safe whatever the run's name is.
    assert identity.job_folder("my run/ü:1", ["seed=1"]).startswith("my-run-ü-1-")


def test_a_sweep_is_called_after_its_options_so_that_more_seeds_join_it() -> None:
    name = identity.sweep_name(["--multirun", "seed=range(3)", "dataset=spotify", "backbone=a,b"])
    assert name == "backbone-a-b_dataset-spotify"
    assert name == identity.sweep_name(
        ["backbone=a,b", "seed=range(100)", "-m", "dataset=spotify", "launcher=ray", "logger=csv"]
    )
    assert identity.sweep_name(["seed=1,2", "hydra.verbose=true"]) == "default"
    long = identity.sweep_name([f"option_{i}=1" for i in range(30)])
    assert len(long) <= 60 and long != identity.sweep_name([f"option_{i}=1" for i in range(31)])


def test_cores_are_not_oversubscribed() -> None:
    for count in range(1, 9):
        assert identity.processes_for(count) * count <= max(count, identity.cores())
        assert identity.threads_for(count) * count <= max(count, identity.cores())
    assert identity.processes_for(1) == identity.threads_for(1) == identity.cores()


def test_workers_are_sent_a_task_without_what_runs_it() -> None:
    task = cloudpickle.loads(cloudpickle.dumps(jobs.Task("train", lambda cfg: sys.stdin)))
    assert task.command == "train" and not hasattr(task, "single")


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra.compose("train", [*overrides, "sweep=x"], return_hydra_config=True)


@pytest.mark.parametrize(
    "path", sorted((CONF_DIR / "launcher").glob("*.yaml")), ids=lambda p: p.stem
)
def test_launchers_compose_and_fit_the_cores(path: Path) -> None:
    assert path.read_text().startswith("# @package _global_\n# ")
    plugin = {"joblib": "joblib", "submitit": "submitit", "ray": "ray"}.get(
        path.stem.partition("_")[0]
    )
    if plugin:
        pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    cfg = composed(f"launcher={path.stem}")
    if path.stem != "submitit_slurm":  # other machines' cores
        assert cfg.launcher.processes * cfg.launcher.threads <= identity.cores()
    if path.stem == "joblib":
        assert composed("launcher=joblib", "launcher.processes=3").hydra.launcher.n_jobs == 3


@pytest.mark.parametrize("backbone", ["mamba", "transformer"])
@pytest.mark.parametrize(
    "path", sorted((CONF_DIR / "experiment" / "paper").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_papers_experiments_follow_the_recipes(path: Path, backbone: str) -> None:
    cfg = composed(f"experiment=paper/{path.stem}", f"backbone={backbone}")
    assert cfg.dataset.name == path.stem and "paper" in cfg.tags
    recipe = composed(f"dataset={path.stem}", f"backbone={backbone}")
    assert cfg.optimizer == recipe.optimizer and cfg.trainer.max_steps == 5000


# ---------------------------------------------------------------------------------------- statuses


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
    times = {"started": jobs._iso(began + 1), "ended": jobs._iso(began + 31), "seconds": 30}
    for i, value in enumerate([0.5, 0.75, None]):
        job = make_job(tmp_path / f"job{i}-0000000{i}", state="finished", objective=value, **times)
        write_json(job / "metrics.json", {})
    make_job(tmp_path / "job-00000003", state="failed", **times)
    make_job(tmp_path / "old-00000004", state="failed", started=jobs._iso(1), ended="")
    alive = {"host": os.uname().nodename, "pid": os.getpid()}
    make_job(
        tmp_path / "on-00000005", state="running", started=jobs._iso(time.time() - 10), **alive
    )
    hashes = {f"0000000{i}" for i in range(8)}
    summary = progress.summarize(tmp_path, hashes, 8, "max", began)
    assert summary.done == 3 and summary.running == 1
    assert [job.name for job in summary.failed] == ["job-00000003"]
    assert summary.best == ("job1", 0.75)
    assert summary.seconds_left == pytest.approx(4 * 30 - 10, abs=2)
    line = summary.line("mine", "val/ndcg@10")
    assert line.startswith(
        "sweep mine: 3 of 8 done, 1 failed, 1 running, 2 min left, best val/ndcg"
    )
    assert progress.summarize(tmp_path, hashes, 8, "min", began).best == ("job0", 0.5)
    # What other sweeps left in the folder does not count.
    assert progress.summarize(tmp_path, {"00000001"}, 1, "max", began).done == 1
    assert progress.summarize(tmp_path, None, None, "max", began + 50).done == 0


def test_a_search_has_the_trials_left_that_it_lacks(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    assert progress.trials_left(20, storage, "study") == 20
    (tmp_path / "optuna.db").touch()
    assert progress.trials_left(20, storage, "study") == 20


def test_a_search_goes_on_with_what_was_cut_short_and_draws_other_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    cfg = composed("search=optuna", f"output_root={tmp_path}")
    with open_dict(cfg):
        cfg.hydra.sweep.dir = str(tmp_path)
    progress.resume_search(cfg)  # there is no study yet
    assert cfg.hydra.sweeper.sampler.seed == 0 and not (tmp_path / "optuna.db").exists()

    states = optuna.trial.TrialState
    study = optuna.create_study(study_name="x", storage=cfg.hydra.sweeper.storage)
    spaces = {"optimizer.lr": optuna.distributions.LogUniformDistribution(1e-5, 1e-3)}
    for state in (states.COMPLETE, states.FAIL, states.RUNNING):
        trial = study.ask(spaces)
        if state != states.RUNNING:
            study.tell(trial, 0.5 if state == states.COMPLETE else None, state)
    study.ask()  # killed before anything was drawn
    progress.resume_search(cfg)
    study = optuna.load_study("x", cfg.hydra.sweeper.storage)  # as another process sees it
    found = study.get_trials()
    fail = states.FAIL
    assert [t.state for t in found] == [states.COMPLETE, fail, fail, fail, states.WAITING]
    assert study.ask(spaces).params == found[2].params
    assert cfg.hydra.sweeper.sampler.seed == 4
    assert progress.trials_left(6, cfg.hydra.sweeper.storage, "x") == 5

    # A job that runs is another sweep's: its trial is left to it.
    alive = {"host": os.uname().nodename, "pid": os.getpid()}
    make_job(tmp_path / "on-00000005", state="running", **alive)
    monkeypatch.setattr(progress, "_LOCK_WAIT_S", 0.1)
    progress.resume_search(cfg)
    study = optuna.load_study("x", cfg.hydra.sweeper.storage)
    assert study.get_trials()[4].state == states.RUNNING


# ----------------------------------------------------------------------------------------- for real


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
    assert (done / "metrics.json").stat().st_mtime_ns == before
    assert status.read_status(done)["attempt"] == 1
    assert status.read_status(folder)["attempt"] == 2
    # The finished one was made with another option: kept, and said so.
    assert "dataset.threshold 0.1 then, 0.2 now" in second.text


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_launchers(tmp_path: Path, launcher: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_" + launcher.partition("_")[0] + "_launcher")
    run_sweep(tmp_path, f"launcher={launcher}", "launcher.processes=2", "seed=0,1")
    jobs = jobs_of(tmp_path / "runs")
    assert len(metrics_of(tmp_path / "runs")) == len(jobs) == 2
    assert {status.read_status(job)["state"] for job in jobs.values()} == {"finished"}


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


def test_a_killed_job_takes_nothing_down_and_goes_on(tmp_path: Path) -> None:
    """Killed as by a lack of memory: the others go on; the same command again goes on with it."""
    arguments = ["seed=0,1", "trainer.max_steps=300", "validations=15"]
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
    run_sweep(tmp_path, *arguments, "output_root=whole")
    assert metrics_of(tmp_path / "runs") == metrics_of(tmp_path / "whole")


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
    with jobs.lock_folder(job) as lock:
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


def test_a_search_whose_trials_all_fail_says_so_in_lines(cli) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    failing = ("head.loss=none_such", "search=optuna", "search.n_trials=1")
    outcome = cli("train", "--multirun", *QUICK, *failing)
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "none_such" in outcome.err and "no trial of the search is complete" in outcome.err


@pytest.mark.parametrize(
    ("option", "extra"), [("launcher=ray", "ray"), ("search=optuna", "optuna")]
)
def test_a_launcher_that_is_not_installed(cli, option: str, extra: str) -> None:
    plugin = {"ray": "hydra_ray_launcher", "optuna": "hydra_optuna_sweeper"}[extra]
    if importlib.util.find_spec(f"hydra_plugins.{plugin}"):
        pytest.skip(f"{plugin} is installed")
    outcome = cli("train", "--multirun", option, "seed=0,1")
    assert outcome.code == 1
    assert outcome.err == f'error: {extra}: not installed; pip install "recsys-ssm[{extra}]"\n'


def test_a_cluster_that_is_not_there_is_one_line(cli, monkeypatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # where no srun is
    outcome = cli("train", "--multirun", "launcher=submitit_slurm", "seed=0,1", "logger=none")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith(
        "error: the launcher submitit cannot start jobs: Could not detect"
    )
    assert "Traceback" not in outcome.err


def test_a_search_remembers_its_trials(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    run_sweep(tmp_path, "search=optuna", "search.n_trials=1")
    assert len(jobs_of(tmp_path / "runs")) == 1
    run_sweep(tmp_path, "search=optuna", "search.n_trials=2")  # one more
    assert len(jobs_of(tmp_path / "runs")) == 2
    said = run_sweep(tmp_path, "search=optuna", "search.n_trials=2")
    assert len(jobs_of(tmp_path / "runs")) == 2 and "0 failed" in said
