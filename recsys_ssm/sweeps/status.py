"""Read the state of a sweep's jobs from their folders."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATUS = "job_status.json"
CONSOLE = "console.log"


def read_status(folder: Path) -> dict[str, Any]:
    """``job_status.json`` of a job's folder; empty where there is none that can be read."""
    try:
        status = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def is_finished(folder: Path) -> bool:
    """Whether the job's result is there, whole: ``metrics.json`` is renamed into place at a run's end."""
    try:
        return isinstance(json.loads((folder / "metrics.json").read_text()), dict)
    except (OSError, ValueError):
        return False


def job_state(folder: Path) -> str:
    """``finished``, ``failed``, ``running``, ``interrupted`` (its processes are gone) or ``missing``."""
    if is_finished(folder):
        return "finished"
    status = read_status(folder)
    state = status.get("state", "missing")
    if state == "running" and not is_alive(status):
        return "interrupted"
    return str(state)


def is_alive(status: Mapping[str, Any]) -> bool:
    if status.get("host") != socket.gethostname():
        return True  # it cannot be seen from here
    try:
        os.kill(int(status["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def objective(folder: Path, monitor: str, mode: str) -> float:
    """The best value of the monitored metric in a run's ``history.json``; NaN where there is none."""
    try:
        records = json.loads((folder / "history.json").read_text())
        values = [float(r[monitor]) for r in records if r.get(monitor) is not None]
    except (OSError, ValueError, TypeError, AttributeError):
        return math.nan
    return (min if mode == "min" else max)(values, default=math.nan)
