"""Names and hashes of sweeps and jobs, and the one list of options that a result does not depend on."""

from __future__ import annotations

import shlex
from pathlib import Path

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import open_dict

from recsys_ssm.cli.command import complete, open_options
from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.instantiate import plain
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.reports import archive
from recsys_ssm.reports.collect import Cell, Run, Setting, Task
from recsys_ssm.run.settings import settings
from recsys_ssm.sweeps import identity


def test_a_job_is_what_it_does_not_how_it_is_said() -> None:
    plain = identity.job_hash(["optimizer.lr=0.0001", "seed=1", "metrics=[p@5,r@5]"])
    assert plain == identity.job_hash(["seed=1", "metrics=[p@5, r@5]", "optimizer.lr=1e-4"])
    elsewhere = ["launcher=joblib", "launcher.threads=2", "sweep=x", "logger=csv", "output_root=/x"]
    assert plain == identity.job_hash(
        ["seed=1", "optimizer.lr=1e-4", "metrics=[p@5,r@5]", *elsewhere, "logger.mode=offline"]
    )
    added = identity.job_hash(["+optimizer.eps=1", "seed=1"])
    assert added == identity.job_hash(["seed=1", "optimizer.eps=1"])
    assert added == identity.job_hash(["++optimizer.eps=2", "seed=1", "++optimizer.eps=1"])
    assert identity.job_hash(["a={b: 1, c: 2}"]) == identity.job_hash(["++a={c: 2, b: 1}"])
    assert identity.job_hash(["~a"]) not in (identity.job_hash(["a=null"]), identity.job_hash([]))
    others = (["seed=2"], ["optimizer.lr=1e-3"], ["+optimizer.eps=1"], ["backbone=mamba2"])
    for other in (*others, ["trainer.devices=2"], ["test=null"], ["callbacks=early_stopping"]):
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


# ------------------------------------------------------------------------------ one list, three uses

BASE = ("dataset=spotify", "backbone=mamba", "optimizer.lr=3e-4")
ELSEWHERE = (
    "ckpt_path=last",
    "launcher=joblib",
    "launcher.threads=2",
    "logger=csv",
    "name=mine",
    "output_root=/elsewhere",
    "sweep=x",
    "tags=[a,b]",
    "trainer.enable_progress_bar=false",
    "callbacks.learning_rate_monitor.logging_interval=epoch",
)
MACHINE = ("trainer.accelerator=cpu", "trainer.log_every_n_steps=5", "trainer.deterministic=false")
MEASURED = ("metrics=[p@5]", "test=last")
RESULT = (
    "seed=3",
    "monitor=val/p@5",
    "trainer.max_steps=7",
    "trainer.devices=2",
    "callbacks=early_stopping",
    "callbacks.checkpoint=null",
    "backbone.d_model=16",
)


def hash_of(*overrides: str) -> str:
    return identity.job_hash(overrides)


def settings_of(*overrides: str) -> dict[str, object]:
    register_resolvers()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = hydra.compose("train", open_options([*overrides, "output_dir=."]))
    with open_dict(cfg):
        cfg.name = str(overrides)  # needs a running Hydra
    return settings(plain(complete(cfg)))


def command_of(*overrides: str) -> str | None:
    run = Run(Path(), {"seed": 0, "overrides": list(overrides)}, {}, Task("a"), Setting())
    return archive.command(Cell(run.task, "mamba", run.setting, [run]))


@pytest.mark.parametrize("override", ELSEWHERE)
def test_where_a_run_is_kept_matters_to_no_use(override: str) -> None:
    assert hash_of(*BASE, override) == hash_of(*BASE)
    assert command_of(*BASE, override) == command_of(*BASE)
    assert settings_of(*BASE, override) == settings_of(*BASE)


def test_a_published_command_has_no_places_and_is_quoted() -> None:
    kept = [*BASE, "dataset.filter='a b'"]
    command = command_of(
        *kept, *ELSEWHERE, *MACHINE, "dataset.root=/mine", "seed=0", "hydra.verbose=1"
    )
    assert command is not None and shlex.split(command) == [
        *("python", "-m", "recsys_ssm.train", "--multirun"),
        *kept,
        "seed=range(1)",
    ]
    # With `+` before them, too.
    assert command_of(*BASE, "+ckpt_path=last", "++tags=[x]") == command_of(*BASE)


@pytest.mark.parametrize("override", MACHINE)
def test_a_machine_makes_another_job_of_the_same_setting(override: str) -> None:
    assert hash_of(*BASE, override) != hash_of(*BASE)
    assert settings_of(*BASE, override) == settings_of(*BASE)


@pytest.mark.parametrize("override", MEASURED)
def test_what_is_measured_is_part_of_job_and_command(override: str) -> None:
    assert hash_of(*BASE, override) != hash_of(*BASE)
    assert override in shlex.split(command_of(*BASE, override) or "")
    assert settings_of(*BASE, override) == settings_of(*BASE)


@pytest.mark.parametrize("override", RESULT)
def test_what_a_result_depends_on_is_part_of_every_use(override: str) -> None:
    assert hash_of(*BASE, override) != hash_of(*BASE)
    if not override.startswith("seed="):  # a cell names its seeds itself
        assert override in shlex.split(command_of(*BASE, override) or "")
        assert settings_of(*BASE, override) != settings_of(*BASE)


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=range(3)", "backbone=mamba,hydra", "metrics=[p@5,r@5]"],
        ["seed=1,2", "~callbacks.early_stopping", "+a={b: [1, 2]}", "name='a b','c d'"],
        ["a=choice(1,2.5,x)", "b=range(0,1,step=0.25)", "c=7"],
    ],
)
def test_the_jobs_of_a_sweep_are_those_that_hydra_runs(overrides: list[str]) -> None:
    parsed = OverridesParser.create().parse_overrides(overrides)
    [expected] = BasicSweeper.split_arguments(parsed, None)
    assert list(map(list, identity.jobs_of_sweep(overrides) or [])) == [
        list(job) for job in expected
    ]


def test_jobs_that_only_hydra_knows() -> None:
    assert identity.jobs_of_sweep(["dataset=glob(*)"]) is None
    assert identity.jobs_of_sweep(["a=interval(0,1)"]) is None
