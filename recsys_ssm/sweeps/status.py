"""Read the state of a sweep's jobs from their folders."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recsys_ssm.run.files import VALIDATIONS, write_json

STATUS = "job_status.json"
CONSOLE = "console.log"


def read_status(folder: Path) -> dict[str, Any]:
    """Return ``job_status.json`` of a job's folder; empty if the file is absent or broken."""
    try:
        status = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def is_finished(folder: Path) -> bool:
    """Return True if the job's result is complete: ``metrics.json`` is renamed into place at a run's end."""
    try:
        return isinstance(json.loads((folder / "metrics.json").read_text()), dict)
    except (OSError, ValueError):
        return False


def status_data(folder: Path) -> dict[str, str]:
    """Return the sha256 of each input of a finished job, by its name; empty if none was recorded."""
    try:
        found = json.loads((folder / "metrics.json").read_text())["data"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def changed_files(sources: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the files that several runs read with different contents.

    Args:
        sources: The sha256 of each input by its name, of each run.
    """
    hashes: dict[str, set[str]] = {}
    for each in sources:
        for name in filter(_is_file_name, each):
            hashes.setdefault(name, set()).add(each[name])
    return [name for name, found in hashes.items() if len(found) > 1]


def file_hashes(sources: Mapping[str, str]) -> tuple[str, ...]:
    """Return the sha256 of each file among a run's inputs."""
    return tuple(sorted(digest for name, digest in sources.items() if _is_file_name(name)))


def _is_file_name(name: str) -> bool:
    """Return True if an input is a file: generated data and data frames are named by a word."""
    return "/" in name or "." in name


def job_state(folder: Path) -> str:
    """Return the state of a job.

    ``finished``, ``failed``, ``running``, ``pruned`` (stopped by a search), ``interrupted`` (stopped by a person, or
    its processes are gone) or ``missing``.
    """
    if is_finished(folder):
        return "finished"
    status = read_status(folder)
    state = status.get("state", "missing")
    if state == "running" and not is_alive(status):
        return "interrupted"
    return str(state)


def settle(folder: Path, wait_s: float = 0.0) -> None:
    """Write ``interrupted`` as the state of a sweep's jobs that were running and whose processes are gone.

    A launcher's worker that is killed cannot write the state of its job.

    Args:
        folder: The sweep's folder.
        wait_s: Seconds to wait for processes that are about to end.
    """
    deadline = time.monotonic() + wait_s
    while True:
        states = {path.parent: read_status(path.parent) for path in folder.glob(f"*/{STATUS}")}
        running = {
            job: status for job, status in states.items() if status.get("state") == "running"
        }
        for job, status in running.items():
            if not is_alive(status):
                ended = "finished" if is_finished(job) else "interrupted"
                write_json(job / STATUS, {**status, "state": ended})
        if not any(map(is_alive, running.values())) or time.monotonic() >= deadline:
            return
        time.sleep(0.1)


def is_alive(status: Mapping[str, Any]) -> bool:
    """Return False if the process ``pid`` on ``host`` has ended; True if it runs, or runs on another machine."""
    if status.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(status["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def objective(folder: Path, monitor: str, mode: str) -> float:
    """Return the best value of the monitored metric in a run's ``history.json``; NaN without one."""
    try:
        records = json.loads((folder / "history.json").read_text())
        values = [float(r[monitor]) for r in records if r.get(monitor) is not None]
    except (OSError, ValueError, TypeError, AttributeError):
        return math.nan
    return (min if mode == "min" else max)(values, default=math.nan)


def validations(folder: Path, monitor: str) -> list[float]:
    """Return the monitored metric of each validation so far, in order, while the job runs and after it."""
    try:
        lines = (folder / VALIDATIONS).read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    found: dict[int, float] = {}
    for line in lines:
        try:
            record = json.loads(line)
            found[int(record["step"])] = float(record[monitor])
        except (ValueError, KeyError, TypeError):  # a line that is being written
            continue
    return [found[step] for step in sorted(found)]
