"""Make a function of a config a command: ``main = command("train")(train)``."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from recsys_ssm.cli.errors import explain, is_users
from recsys_ssm.cli.help import help_text
from recsys_ssm.cli.resolvers import register_resolvers, run_folder
from recsys_ssm.instantiate import import_modules, with_defaults
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.assemble import as_list
from recsys_ssm.sweeps.identity import sweep_name
from recsys_ssm.sweeps.jobs import Task, end_with_parent
from recsys_ssm.sweeps.progress import SweepProgress, end_progress

log = logging.getLogger(__name__)


_NOISE = (
    "💡 Tip",
    "GPU available",
    "TPU available",
    "`Trainer.fit` stopped",
    "`weights_only` was not set",
    "Initializing distributed",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint at",
    "-" * 20,
    "distributed_backend=",
)
"""Beginnings of lines that Lightning logs in each run."""


def quiet_dependencies() -> None:
    """Print other packages' messages once, in the run's log too, without those a user cannot act upon."""
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
    ):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.fabric.utilities.distributed",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).addFilter(
            lambda record: not record.getMessage().lstrip().startswith(_NOISE)
        )
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    # A resumed run goes on in its own folder.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # What is logged once an epoch is reduced over the processes already.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.* when logging on epoch level")
    # Batches are slices of arrays in memory: there are no worker processes to add.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # A process may have none of the users; the sums of the others are gathered all the same.
    warnings.filterwarnings(
        "ignore", message="The ``compute`` method of metric .* was called before"
    )
    # A size of 0 is refused, or is meant.
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors is a no-op")
    # The curves have their own interval.
    warnings.filterwarnings("ignore", message="The number of training batches .* logging interval")
    # Early stopping ends it.
    warnings.filterwarnings("ignore", message="`max_epochs` was not set")


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make ``task(cfg)`` a command: Hydra composes ``conf/<config_name>.yaml``, mistakes become one clear line.

    A user's mistake (an option, a file) exits with 1 and no traceback; a defect of ours keeps its traceback. The jobs
    of a multirun are processes of their own (:mod:`recsys_ssm.sweeps.jobs`): one that fails keeps its message or
    traceback in its folder, the others go on, and the exit code is 1 as well.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        failures: list[Exception] = []
        started: list[Path] = []

        def guarded(cfg: DictConfig) -> Any:
            started[:] = [Path(HydraConfig.get().runtime.output_dir)]
            try:
                import_modules(as_list(cfg.get("import")))
                return task(complete(cfg))
            except Exception as error:
                failures.append(error)
                if is_users(error):
                    discard_empty(Path(HydraConfig.get().runtime.output_dir))
                    return None  # reported below; raised here, Hydra would add lines of its own
                raise

        def main() -> None:
            if not {"--help", "-h"}.isdisjoint(sys.argv[1:]):
                print(help_text(config_name))
                return
            end_with_parent()
            failures.clear()
            run_folder.cache_clear()
            register_resolvers()
            quiet_dependencies()
            arguments = open_options(quoted(overrides_last(sys.argv[1:])))
            sys.argv[1:] = arguments
            name_sweep(config_name)
            shows_config = not {"--cfg", "-c"}.isdisjoint(arguments)
            try:
                with _raw_hydra_errors(), _completed_output() if shows_config else nullcontext():
                    hydra.main(
                        version_base="1.3", config_path=str(CONF_DIR), config_name=config_name
                    )(Task(config_name, guarded))()
            except KeyboardInterrupt:
                if SweepProgress.current is not None:
                    sys.exit(
                        "stopped; the same command again continues the jobs that are not finished"
                    )
                sys.exit(_after_stop(started))
            except Exception as error:
                if not (is_users(error) or error in failures):
                    raise
                if not failures:  # before any job began
                    failures.append(error)
            finally:
                failed_jobs = end_progress()
            for overrides, message, folder in failed_jobs:
                print(f"error ({overrides}): {message} [{folder}]", file=sys.stderr)
            if failures:
                if not is_users(failures[0]):
                    raise failures[0]
                print(f"error: {explain(failures[0], config_name)}", file=sys.stderr)
            if failures or failed_jobs:
                sys.exit(1)

        return main

    return decorate


def _after_stop(folders: Sequence[Path]) -> str:
    """Return what to do after Ctrl-C, for a run in the last of these folders."""
    kept = [folder / "checkpoints" / name for folder in folders for name in _CHECKPOINTS]
    if any(path.is_file() for path in kept):
        return "stopped; the same command with ckpt_path=last continues from the last validation"
    return "stopped, with nothing to continue from; run the same command again"


_CHECKPOINTS = ("last.ckpt", "best.ckpt")


def discard_empty(folder: Path) -> None:
    """Remove the folder of a run that ended before it wrote anything: it holds Hydra's own files alone."""
    if not (folder / ".hydra").is_dir() or folder.resolve() == Path.cwd():
        return
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    if any(path.parts[0] != ".hydra" and path.suffix != ".log" for path in files):
        return
    shutil.rmtree(folder, ignore_errors=True)
    for parent in folder.parents[:2]:  # the run's name, output_root
        with contextlib.suppress(OSError):  # not empty
            if parent.resolve() != Path.cwd():
                parent.rmdir()


def complete(cfg: DictConfig) -> DictConfig:
    """Return a config in which every part names all its options, defaults of its class included."""
    filled = OmegaConf.create(with_defaults(OmegaConf.to_container(cfg, resolve=False)))
    OmegaConf.set_struct(filled, True)
    return filled


@contextlib.contextmanager
def _completed_output() -> Iterator[None]:
    """Print the config that Hydra shows (``--cfg``) with the defaults of its classes filled in."""
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured):
        yield
    text = captured.getvalue()
    header, _, body = text.partition("\n") if text.startswith("# @package") else ("", "", text)
    shown = OmegaConf.create(body)
    if not isinstance(shown, DictConfig):
        print(text, end="")
        return
    hydra_node = shown.pop("hydra", None)
    filled = OmegaConf.create(with_defaults(OmegaConf.to_container(shown, resolve=False)))
    if hydra_node is not None:
        filled = OmegaConf.merge({"hydra": hydra_node}, filled)
    print(f"{header}\n" * bool(header) + OmegaConf.to_yaml(filled), end="")


_CLOSED = frozenset({"debug", "experiment", "launcher", "preset", "recipe", "task"})


def open_options(arguments: list[str]) -> list[str]:
    """Let every argument of a class be given, also if no config names it: ``trainer.limit_val_batches=2``.

    Hydra adds an option that is not in the config only with ``++``. Names and types are checked against the class.
    """
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()} | {"model"}
    return [
        f"++{argument}"
        if "." in (key := argument.partition("=")[0]) and key.partition(".")[0] in groups - _CLOSED
        else argument
        for argument in arguments
    ]


def quoted(arguments: list[str]) -> list[str]:
    """Put values that Hydra's grammar cannot read in quotes: ``dataset.interactions=date=2024-05-01/clicks.csv``."""
    parser = OverridesParser.create()
    result = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and value and not argument.startswith("-") and value[0] not in "[{\"'":
            try:
                parser.parse_override(argument)
            except HydraException:
                escaped = value.replace("\\", "\\\\").replace("'", "\\'")
                with contextlib.suppress(HydraException):
                    parser.parse_override(candidate := f"{key}='{escaped}'")
                    argument = candidate
        result.append(argument)
    return result


_TAKES_A_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
                  "--package", "-p", "--experimental-rerun")  # fmt: skip


def overrides_last(arguments: list[str]) -> list[str]:
    """Move ``option=value`` behind all flags: argparse refuses such words on both sides of a flag."""
    flags: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        is_value = bool(flags) and flags[-1] in _TAKES_A_VALUE
        is_override = not argument.startswith("-") and ("=" in argument or argument.startswith("~"))
        (overrides if is_override and not is_value else flags).append(argument)
    return [*flags, *overrides]


def name_sweep(config_name: str) -> None:
    """Name a multirun (option ``sweep``) after its options: the same command has the same name."""
    arguments = sys.argv[1:]
    is_sweep = not {"--multirun", "-m"}.isdisjoint(arguments)
    named = any(argument.startswith("sweep=") for argument in arguments)
    config = OmegaConf.load(CONF_DIR / f"{config_name}.yaml")
    if is_sweep and not named and "sweep" in config:
        sys.argv.append(f"sweep={sweep_name(arguments)}")


@contextlib.contextmanager
def _raw_hydra_errors() -> Iterator[None]:
    """Make Hydra raise errors, where it would print its own short form and exit."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
