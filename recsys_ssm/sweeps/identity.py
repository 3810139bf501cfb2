"""Name sweeps and jobs: a job is identified by a hash of the options its result depends on."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from recsys_ssm.run.settings import is_incidental


def sweep_name(arguments: Iterable[str]) -> str:
    """Return the default name of a sweep: its overrides without seeds, so that more seeds join it."""
    values = dict(argument.partition("=")[::2] for argument in _task_only(arguments))
    kept = sorted(
        f"{key.rpartition('.')[2]}-{value}" if value else key
        for key, value in values.items()
        if key.lstrip("+~") != "seed" and not is_incidental(key, "job")
    )
    return short_name("_".join(kept)) or "default"


def short_name(text: str) -> str:
    """Return ``text`` as part of a folder's name: safe characters, 60 of them at most."""
    safe = re.sub(r"[^\w.]+", "-", text).strip("-_.")
    return safe if len(safe) <= 60 else f"{safe[:51]}-{_digest(safe)}"


def _task_only(arguments: Iterable[str]) -> list[str]:
    return [
        argument
        for argument in arguments
        if not argument.startswith("-")
        and ("=" in argument or argument.startswith("~"))
        and not argument.lstrip("+~").startswith("hydra")
    ]


def job_folder(name: str, overrides: Sequence[str]) -> str:
    """Return the name of a job's folder: a name to read, and a hash of its overrides."""
    readable = re.sub(r"[^\w.@=-]+", "-", name)
    return f"{readable}-{job_hash(overrides)}"


def job_hash(overrides: Iterable[str]) -> str:
    """Return a hash of a job's overrides: the same in any order, spelling and with ``+`` or ``++`` before them."""
    return _digest("\n".join(f"{key}={value}" for key, value in job_options(overrides).items()))


def job_options(overrides: Iterable[str]) -> dict[str, str]:
    """Return the overrides that a job's result depends on, in one order and one spelling; the last of a key wins."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = {_key(each): repr(_in_order(each.value())) for each in parsed}
    return {key: values[key] for key in sorted(values) if not is_incidental(key, "job")}


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+")


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value, key=str)}
    return [_in_order(each) for each in value] if isinstance(value, list) else value


def jobs_of_sweep(overrides: Sequence[str]) -> list[tuple[str, ...]] | None:
    """Return the overrides of each job that Hydra's basic sweeper makes of a command line.

    None: a mistake, which Hydra reports, or a ``glob``, which needs Hydra's own folders of configs.
    """
    axes = []
    for each in OverridesParser.create().parse_overrides(list(overrides)):
        if not each.is_sweep_override():
            values: Iterable[str] = [each.get_value_element_as_str()]
        elif each.is_discrete_sweep() and each.input_line and "glob(" not in each.input_line:
            values = each.sweep_string_iterator()
        else:
            return None
        axes.append([f"{each.get_key_element()}={value}" for value in values])
    return list(itertools.product(*axes))


def published_overrides(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that someone else needs to make the same figures, seeds aside."""
    kept = (str(each) for each in overrides)
    return [each for each in kept if not is_incidental(each.partition("=")[0], "command")]


def sweep_command(overrides: Iterable[str]) -> str:
    """Return the command line of a training sweep with these overrides, quoted for a shell."""
    words = ["python", "-m", "recsys_ssm.train", "--multirun", *overrides]
    return " ".join(map(shlex.quote, words))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def cores() -> int:
    """Return the number of CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def processes_for(threads: int) -> int:
    """Return the number of jobs that the cores hold, with ``threads`` each."""
    return max(1, cores() // max(1, int(threads)))


def threads_for(processes: int) -> int:
    """Return the number of threads that each of ``processes`` jobs may use."""
    return max(1, cores() // max(1, int(processes)))
