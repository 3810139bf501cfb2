"""What the doors share: composing configs, errors for people, objects from config nodes."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recsys_ssm import sweeps
from recsys_ssm.errors import UserError
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.specs import check_arguments, import_target, suggest

log = logging.getLogger(__name__)


def register_resolvers() -> None:
    """Interpolations the configs use beside OmegaConf's own."""
    OmegaConf.register_new_resolver("every", _every, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("job_folder", sweeps.job_folder, replace=True)
    OmegaConf.register_new_resolver("cores", sweeps.cores, replace=True)
    OmegaConf.register_new_resolver("processes_for", sweeps.processes_for, replace=True)
    OmegaConf.register_new_resolver("threads_for", sweeps.threads_for, replace=True)
    OmegaConf.register_new_resolver("trials_left", sweeps.trials_left, replace=True)
    OmegaConf.register_new_resolver("first", _first, replace=True)
    OmegaConf.register_new_resolver("if_none", _if_none, replace=True)


def quiet_dependencies() -> None:
    """Lightning's messages once and in the run's log too, without those that nobody here can act upon."""
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
    ):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: (
            not record.getMessage().startswith(("💡 Tip", "TPU available", "`Trainer.fit` stopped"))
        )
    )
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    # A resumed run goes on in its own folder.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # What is logged once an epoch is reduced over the processes already.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.* when logging on epoch level")
    # Batches are slices of arrays in memory: there are no worker processes to add.
    warnings.filterwarnings("ignore", message=".*does not have many workers")


def _first(*values: Any) -> Any:
    """The first that is not null."""
    return next((value for value in values if value is not None), None)


def _if_none(given: Any, value: Any) -> Any:
    """A value that has a meaning only where another is null."""
    return value if given is None else None


def _every(max_steps: int, times: int) -> int:
    """Steps between ``times`` validations spread over ``max_steps``."""
    return (
        max(1, int(max_steps) // max(1, int(times)))
        if _is_int(max_steps) and int(max_steps) > 0
        else 1000
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.lstrip("-").isdecimal())


def name_of_seeds(name: str, seed: Any, n_seeds: Any) -> str:
    """What a run of several seeds at once is called: ``…-seeds0-3`` for ``…-seed0``; any other, ``name``."""
    if not (isinstance(seed, int) and isinstance(n_seeds, int) and n_seeds > 1):
        return name  # what is wrong with them is said later
    return f"{name.removesuffix(f'-seed{seed}')}-seeds{seed}-{seed + n_seeds - 1}"


@functools.cache  # one folder a run, however often Hydra and Lightning's launcher resolve it
def _run_folder(root: str, name: str, ckpt_path: str | None, seed: int, n_seeds: int) -> str:
    """A new folder for a run; for ``ckpt_path=last`` that of the newest run of this name that left a checkpoint."""
    folder = Path(root) / name_of_seeds(name, seed, n_seeds)
    if ckpt_path == "last":
        # Folders are named after their time, so the last by name is the newest.
        earlier = sorted(path.parent.parent for path in folder.glob("*/checkpoints/last.ckpt"))
        if earlier:
            return str(earlier[-1])
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    taken = (f"{stamp}{suffix}" for suffix in ("", *(f"_{i}" for i in range(1, 1000))))
    return str(next(folder / name for name in taken if not (folder / name).exists()))


def door(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make ``task(cfg)`` a command: Hydra composes ``conf/<config_name>.yaml``, mistakes become one clear line.

    A user's mistake (an option, a file) exits with 1 and no traceback; a defect of ours keeps its traceback. The jobs
    of a multirun are processes of their own (:mod:`recsys_ssm.sweeps`): one that fails keeps its message or traceback
    in its folder, the others go on, and the exit code is 1 as well.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        failures: list[Exception] = []

        def guarded(cfg: DictConfig) -> Any:
            try:
                return task(cfg)
            except Exception as error:
                failures.append(error)
                if _is_users(error):
                    return None  # told below; raised here, Hydra would add lines of its own
                raise

        def main() -> None:
            sweeps.end_with_parent()
            failures.clear()
            _run_folder.cache_clear()
            register_resolvers()
            quiet_dependencies()
            sys.argv[1:] = overrides_last(sys.argv[1:])
            name_sweep(config_name)
            try:
                with _raw_hydra_errors():
                    hydra.main(
                        version_base="1.3", config_path=str(CONF_DIR), config_name=config_name
                    )(sweeps.Task(config_name, guarded))()
            except KeyboardInterrupt:
                if sweeps.SweepProgress.current is not None:
                    sys.exit("stopped; the same command again goes on with what is not finished")
                sys.exit(
                    "stopped; the same command with ckpt_path=last goes on from the last validation"
                )
            except Exception as error:
                if not (_is_users(error) or error in failures):
                    raise
                if not failures:  # before any job began
                    failures.append(error)
            finally:
                failed_jobs = sweeps.end_progress()
            for overrides, message, folder in failed_jobs:
                print(f"error ({overrides}): {message} [{folder}]", file=sys.stderr)
            if failures:
                if not _is_users(failures[0]):
                    raise failures[0]
                print(f"error: {explain(failures[0], config_name)}", file=sys.stderr)
            if failures or failed_jobs:
                sys.exit(1)

        return main

    return decorate


_TAKES_A_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
                  "--package", "-p", "--experimental-rerun")  # fmt: skip


def overrides_last(arguments: list[str]) -> list[str]:
    """The command line with ``option=value`` behind all flags: argparse refuses such words on both sides of a flag."""
    flags: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        is_value = bool(flags) and flags[-1] in _TAKES_A_VALUE
        is_override = not argument.startswith("-") and ("=" in argument or argument.startswith("~"))
        (overrides if is_override and not is_value else flags).append(argument)
    return [*flags, *overrides]


def name_sweep(config_name: str) -> None:
    """Give a multirun of a door that has the option ``sweep`` a name of its own, the same for the same command."""
    arguments = sys.argv[1:]
    is_sweep = not {"--multirun", "-m"}.isdisjoint(arguments)
    named = any(argument.startswith("sweep=") for argument in arguments)
    config = OmegaConf.load(CONF_DIR / f"{config_name}.yaml")
    if is_sweep and not named and "sweep" in config:
        sys.argv.append(f"sweep={sweeps.sweep_name(arguments)}")


@contextlib.contextmanager
def _raw_hydra_errors() -> Iterator[None]:
    """Hydra prints its own short form of any error and exits; with this set it raises the error itself."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


USERS = (
    UserError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
    PermissionError,
    NotADirectoryError,
    FileExistsError,
)
"""What a user's mistake raises, in our code and in what it calls."""


def _is_users(error: BaseException) -> bool:
    return (
        isinstance(error, USERS)
        or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS))
        or sweeps.all_failed(error)
        or sweeps.launcher_of(error) is not None
    )


def explain(error: BaseException, config_name: str | None = None) -> str:
    """An error as a line for people; for an option that does not exist, with what does."""
    if isinstance(error, OSError) and error.strerror:  # Hydra's "no such config" is an OSError too
        return f"{error.filename}: {error.strerror}; choose another folder with output_root="
    if sweeps.all_failed(error):
        return "no trial of the search is complete; the same command again goes on with others"
    text = str(error).strip()
    if launcher := sweeps.launcher_of(error):
        return f"the launcher {launcher} cannot start jobs: {text.partition(chr(10))[0]}"
    if plugin := re.search(r"Could not find 'hydra/\w+/((joblib|submitit|ray|optuna)\w*)'", text):
        return f'{plugin[1]}: not installed; pip install "recsys-ssm[{plugin[2]}]"'
    if missing := re.match(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]}: not given, and there is no default; add {missing[1]}=…"
    if unread := re.match(r"LexerNoViableAltException: ([^=\s]+)=(.*)", text):
        option, value = unread.groups()
        return f"{option}={value}: cannot be read; put it in quotes twice: {option}=\"'{value}'\""
    if unknown := re.search(r"Could not (?:override|append to config\..*?) '([^']+)'", text):
        path = unknown[1].partition("@")[0]
        parent, _, name = path.rpartition(".")
        known = _known(config_name, parent) if config_name else []
        return f"{path}: no such option; {suggest(name, known)}"
    text = re.sub(r"^In '[^']*': ", "", text.partition("Config search path:")[0])
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()).replace(":;", ":")


def _known(config_name: str, parent: str) -> list[str]:
    """Options below ``parent`` in the config as the command line's group choices make it."""
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    choices = [arg for arg in sys.argv[1:] if arg.partition("=")[0] in groups and "," not in arg]
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = hydra.compose(config_name, choices)
        node = OmegaConf.select(cfg, parent) if parent else cfg
    except Exception:  # this only helps a message along
        return []
    return (
        sorted({*map(str, node), *(() if parent else groups)})
        if isinstance(node, DictConfig)
        else []
    )


def plain(node: Any) -> Any:
    """A config node as plain containers, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def spec(node: Any, option: str) -> dict[str, Any] | None:
    """A config node as a checked spec (see :mod:`recsys_ssm.specs`), its class imported; None if it names none."""
    values = plain(node)
    if not values or values.get("_target_") is None:
        return None
    import_target(values["_target_"], option)
    return dict(values)


def check(cfg: DictConfig, *options: str) -> None:
    """Hold config nodes against what they describe, before any time is spent.

    Raises:
        UserError: An argument is unknown or of the wrong type.
    """
    for option in options:
        if values := spec(OmegaConf.select(cfg, option), option):
            check_arguments(
                import_target(values.pop("_target_"), option), values, option, given=None
            )


def make(node: Any, option: str, **given: Any) -> Any:
    """The object a config node describes, its arguments checked first; None if it names none.

    Raises:
        UserError: An argument is unknown, absent or of the wrong type.
    """
    values = spec(node, option)
    if values is None:
        return None
    target = import_target(values.pop("_target_"), option)
    check_arguments(target, values, option, given)
    return target(**{**given, **values})


def make_all(nodes: Mapping[str, Any] | None, option: str) -> list[Any]:
    """The objects of a folder of nodes, those set to null left out."""
    made = [
        make(node, f"{option}.{name}") for name, node in (nodes or {}).items() if node is not None
    ]
    return [each for each in made if each is not None]
