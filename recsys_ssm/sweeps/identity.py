"""Name sweeps and jobs: a job is identified by a hash of the options its result depends on."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

# What a job's result does not depend on: it is the same job wherever and however it runs.
_INCIDENTAL = (
    "ckpt_path",
    "launcher",
    "logger",
    "output_dir",
    "output_root",
    "search",
    "sweep",
    "tags",
)


def sweep_name(arguments: Iterable[str]) -> str:
    """What a sweep is called if it is not given a name: its overrides, seeds aside, so that more seeds join it."""
    values = dict(argument.partition("=")[::2] for argument in _task_only(arguments))
    kept = sorted(
        f"{key.rpartition('.')[2]}-{value}" if value else key
        for key, value in values.items()
        if key.lstrip("+~") != "seed" and not _is_incidental(key)
    )
    text = re.sub(r"[^\w.]+", "-", "_".join(kept)).strip("-_.") or "default"
    return text if len(text) <= 60 else f"{text[:51]}-{_digest(text)}"


def _task_only(arguments: Iterable[str]) -> list[str]:
    return [
        argument
        for argument in arguments
        if not argument.startswith("-")
        and ("=" in argument or argument.startswith("~"))
        and not argument.lstrip("+~").startswith("hydra")
    ]


def job_folder(name: str, overrides: Sequence[str]) -> str:
    """A job's folder: its name for people, and a hash of its overrides in whatever order and spelling."""
    readable = re.sub(r"[^\w.@=-]+", "-", name)
    return f"{readable}-{job_hash(overrides)}"


def job_hash(overrides: Sequence[str]) -> str:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = {override.get_key_element(): override.value() for override in parsed}  # the last wins
    canonical = sorted(f"{key}={v!r}" for key, v in values.items() if not _is_incidental(key))
    return _digest("\n".join(canonical))


def _is_incidental(key: str) -> bool:
    return key.lstrip("+~").partition("@")[0].partition(".")[0] in _INCIDENTAL


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def cores() -> int:
    """CPU cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def processes_for(threads: int) -> int:
    """How many jobs of so many threads the cores hold."""
    return max(1, cores() // max(1, int(threads)))


def threads_for(processes: int) -> int:
    """How many threads each of so many jobs may use."""
    return max(1, cores() // max(1, int(processes)))
