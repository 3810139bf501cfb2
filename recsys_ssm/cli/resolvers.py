"""Register the interpolations that the configs use beside OmegaConf's own."""

from __future__ import annotations

import datetime
import functools
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from recsys_ssm.sweeps.identity import cores, job_folder, processes_for
from recsys_ssm.sweeps.progress import trials_left


def register_resolvers() -> None:
    """Interpolations the configs use beside OmegaConf's own."""
    OmegaConf.register_new_resolver("every", _every, replace=True)
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("cores", cores, replace=True)
    OmegaConf.register_new_resolver("processes_for", processes_for, replace=True)
    OmegaConf.register_new_resolver("trials_left", trials_left, replace=True)
    OmegaConf.register_new_resolver("first", _first, replace=True)
    OmegaConf.register_new_resolver("if_none", _if_none, replace=True)


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
def run_folder(root: str, name: str, ckpt_path: str | None, seed: int, n_seeds: int) -> str:
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
