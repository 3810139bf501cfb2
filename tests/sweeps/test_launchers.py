"""Every launcher composes, fits the cores, and runs a sweep."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig
from small import SMALL_MAMBA, TINY

from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.sweeps import identity, status

QUICK = (*TINY, *SMALL_MAMBA, "dataset=spotify", "logger=none")


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


@pytest.mark.parametrize(
    "launcher",
    [
        "joblib",
        pytest.param("submitit_local", marks=pytest.mark.slow),
        pytest.param("ray", marks=pytest.mark.slow),
    ],
)
def test_launchers(tmp_path: Path, launcher: str) -> None:
    pytest.importorskip("hydra_plugins.hydra_" + launcher.partition("_")[0] + "_launcher")
    # A process of its own: launchers leave processes and threads behind.
    arguments = [*QUICK, f"launcher={launcher}", "launcher.processes=2", "seed=0,1"]
    done = subprocess.run(
        [sys.executable, "-m", "recsys_ssm.train", "--multirun", *arguments],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [path.parent for path in tmp_path.glob("runs/multirun/*/*/job_status.json")]
    assert [status.job_state(job) for job in jobs] == ["finished", "finished"]


def test_a_launcher_that_is_not_installed(cli) -> None:
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        pytest.skip("Ray's launcher is installed")
    outcome = cli("train", "--multirun", "launcher=ray", "seed=0,1")
    assert outcome.code == 1
    assert outcome.err == 'error: ray: not installed; pip install "recsys-ssm[ray]"\n'


def test_a_cluster_that_is_not_there_is_one_line(cli, monkeypatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # where no srun is
    outcome = cli("train", "--multirun", "launcher=submitit_slurm", "seed=0,1", "logger=none")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith(
        "error: the launcher submitit cannot start jobs: Could not detect"
    )
    assert "Traceback" not in outcome.err
