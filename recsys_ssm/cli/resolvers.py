"""Register the interpolations that the configs use beside OmegaConf's own."""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recsys_ssm.errors import UserError
from recsys_ssm.run.assemble import check_name
from recsys_ssm.sweeps.identity import cores, job_folder, processes_for


def register_resolvers() -> None:
    """Register the interpolations with OmegaConf."""
    OmegaConf.register_new_resolver("every", _every, replace=True)
    OmegaConf.register_new_resolver("best_of", _best_of, replace=True)
    OmegaConf.register_new_resolver("unless", _unless, replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("cores", cores, replace=True)
    OmegaConf.register_new_resolver("processes_for", processes_for, replace=True)
    OmegaConf.register_new_resolver("first", _first, replace=True)
    OmegaConf.register_new_resolver("if_none", _if_none, replace=True)


def _first(*values: Any) -> Any:
    """Return the first value that is not null."""
    return next((value for value in values if value is not None), None)


def _if_none(given: Any, value: Any) -> Any:
    """Return ``value`` where ``given`` is null, else null."""
    return value if given is None else None


def _best_of(monitor: str) -> str:
    """Return the direction in which a metric is better: ``min`` for a loss, ``max`` for a ranking metric."""
    return "min" if str(monitor).rpartition("/")[2].partition("@")[0].endswith("loss") else "max"


def _unless(given: Any, value: Any, otherwise: Any) -> Any:
    """Return ``value`` unless another option is given (neither null nor -1), in which case ``otherwise``."""
    return value if given in (None, -1) else otherwise


def _every(max_steps: Any, times: Any) -> int | float:
    """Return the steps between ``times`` validations spread over ``max_steps``; 1.0 (an epoch) without a limit."""
    if not (_is_int(max_steps) and int(max_steps) > 0):
        return 1.0
    return max(1, int(max_steps) // max(1, int(times)))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.lstrip("-").isdecimal())


@functools.cache  # one folder a run, however often Hydra and Lightning's launcher resolve it
def run_folder(root: str, name: str, ckpt_path: str | None) -> str:
    """Create a new folder for a run and return it; for ``ckpt_path=last`` return that of the newest run of this name.

    Raises:
        UserError: ``name`` is not the name of a folder.
    """
    folder = Path(root) / check_name(name, "name")
    if ckpt_path == "last":
        # Folders are named after their time, so the last by name is the newest. A run that began has a config.yaml.
        if earlier := sorted(path.parent for path in folder.glob("*/config.yaml")):
            return str(earlier[-1])
        return str(folder / "none")
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"_{i}" for i in range(1, 1000))):
        path = folder / f"{stamp}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another run began in the same second
            continue
        except OSError:  # reported with the option's name, where the folder is checked
            pass
        return str(path)
    raise UserError(f"{folder}: a thousand runs began within a second; try again")
