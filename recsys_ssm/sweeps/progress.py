"""Show where a sweep stands in one line, and its results in a small table at its end."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats

from recsys_ssm.run.settings import is_incidental
from recsys_ssm.sweeps.identity import job_hash, job_options, jobs_of_sweep
from recsys_ssm.sweeps.status import (
    STATUS,
    changed_files,
    is_finished,
    job_state,
    read_status,
    settle,
    status_data,
)


class Summary(NamedTuple):
    """The state of a sweep. ``total`` is None where only the sweeper knows it."""

    total: int | None
    done: int
    failed: list[Path]
    running: int
    pruned: int
    seconds_left: float | None
    best: tuple[str, float] | None

    def line(self, name: str, monitor: str, kind: str = "sweep") -> str:
        done = self.done + self.pruned
        parts = [f"{done} of {self.total} done" if self.total else f"{done} done"]
        if self.pruned:
            parts[0] += f" ({self.pruned} pruned)"
        parts.append(f"{len(self.failed)} failed")
        if self.running:
            parts.append(f"{self.running} running")
        if self.seconds_left is not None and self.running:
            parts.append(f"{_spell(self.seconds_left)} left")
        if self.best is not None:
            parts.append(f"best {monitor} {self.best[1]:.4f} ({self.best[0]})")
        return f"{kind} {name}: {', '.join(parts)}"


def _spell(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def summarize(
    folder: Path, hashes: set[str] | None, total: int | None, mode: str, since: float
) -> Summary:
    """Return the state of the sweep in ``folder``.

    Args:
        folder: The sweep's folder.
        hashes: The hashes of its jobs (:func:`job_hash`); None: every job begun since ``since``.
        total: Number of jobs, if known.
        mode: ``min`` or ``max``: the better direction of the monitored metric.
        since: Start of this sweep, in seconds of the epoch.
    """
    done, pruned, failed, seconds, ages = 0, 0, [], [], []
    best: tuple[str, float] | None = None
    now = time.time()
    for path in sorted(folder.glob(f"*/{STATUS}")):
        job, status = path.parent, read_status(path.parent)
        begun = _epoch(status.get("started"))
        if begun < since if hashes is None else job.name[-8:] not in hashes:
            continue
        state = job_state(job)
        if state == "running":
            ages.append(now - begun)
        elif state == "pruned":
            pruned += 1
            seconds.append(float(status.get("seconds") or 0.0))
        elif state == "failed" and _epoch(status.get("ended")) >= since:
            failed.append(job)
        elif state == "finished":
            done += 1
            if status.get("seconds"):
                seconds.append(float(status["seconds"]))
            value = status.get("objective")
            if value is not None and (best is None or _is_better(value, best[1], mode)):
                best = job.name[:-9], float(value)
    left = None
    if total and seconds:
        mean = sum(seconds) / len(seconds)
        to_do = (total - done - pruned - len(failed)) * mean - sum(min(age, mean) for age in ages)
        left = max(0.0, to_do) / max(1, len(ages))
    return Summary(total, done, failed, len(ages), pruned, left, best)


def _is_better(value: float, than: float, mode: str) -> bool:
    return value < than if mode == "min" else value > than


def _epoch(text: Any) -> float:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return 0.0


class ProgressLine:
    """A thread that shows one line on standard error: on a terminal in place, elsewhere whenever a job has ended.

    Args:
        summary: Returns the state to show.
        spell: Makes the line of a state.
        every_s: Seconds between looks at the jobs.
    """

    def __init__(
        self, summary: Callable[[], Summary], spell: Callable[[Summary], str], every_s: float
    ) -> None:
        self._summary, self._spell, self._every_s = summary, spell, every_s
        self._ended, self._shown = 0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="sweep progress")
        self._thread.start()

    def stop(self) -> None:
        """Show the line a last time and end; a second call does nothing."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._show(self._summary(), last=True)

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            with contextlib.suppress(OSError):  # a folder that is removed meanwhile
                self._show(self._summary())

    def _show(self, summary: Summary, *, last: bool = False) -> None:
        line = self._spell(summary)
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{line if last else line[:width]}" + "\n" * last)
            sys.stderr.flush()
            return
        ended = summary.done + summary.pruned + len(summary.failed)
        if ended != self._ended or (last and line != self._shown):
            self._ended, self._shown = ended, line
            print(line, file=sys.stderr, flush=True)


class SweepProgress(Callback):
    """Hydra callback of a multirun: a line with the state of the whole sweep, then its table and its failures.

    Args:
        every_s: Seconds between looks at the jobs.
    """

    current: SweepProgress | None = None
    """The callback of the sweep that this process runs."""

    def __init__(self, every_s: float = 1.0) -> None:
        self.every_s = every_s

    def __getstate__(self) -> dict[str, Any]:  # launchers send the callback to their workers
        return {"every_s": self.every_s}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.folder = Path(config.hydra.sweep.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = str(config.get("sweep") or self.folder.name)
        self.monitor, self.mode = str(config.get("monitor")), str(config.get("monitor_mode"))
        self.hashes, self.total = _expected(config)
        self.since = time.time()
        overrides = list(config.hydra.overrides.task)
        parsed = OverridesParser.create().parse_overrides(overrides)
        self._fixed = {each.get_key_element() for each in parsed if not each.is_sweep_override()}
        SweepProgress.current = self
        self._line = ProgressLine(
            self.summary, lambda summary: summary.line(name, self.monitor), self.every_s
        )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.stop()

    def summary(self) -> Summary:
        return summarize(self.folder, self.hashes, self.total, self.mode, self.since)

    def stop(self) -> None:
        """End the line; a second call does nothing."""
        self._line.stop()

    def failures(self) -> list[tuple[str, str, Path]]:
        """Return overrides, last line of the error, and folder of each failed job."""
        found = []
        for job in self.summary().failed:
            overrides = read_status(job).get("overrides", ())
            own = [each for each in overrides if each.partition("=")[0] not in self._fixed]
            found.append(
                (
                    " ".join(each.removeprefix("++") for each in own) or job.name,
                    error_line(job),
                    job,
                )
            )
        return found


def error_line(job: Path) -> str:
    """Return the last line of a failed job's error."""
    lines = str(read_status(job).get("error") or "").strip().splitlines() or ["no message"]
    return lines[-1].removeprefix("error: ")


def end_progress() -> list[tuple[str, str, Path]]:
    """End the line of the sweep that this process ran, print its table, and return its failures."""
    progress, SweepProgress.current = SweepProgress.current, None
    if progress is None:
        return []
    progress.stop()
    settle(progress.folder, wait_s=3.0)
    print_sweep(progress.folder, progress.monitor, progress.mode)
    return progress.failures()


def _expected(config: DictConfig) -> tuple[set[str] | None, int | None]:
    """Return hashes and number of a sweep's jobs, None where they are not known beforehand."""
    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_")).endswith(".BasicSweeper"):
        return None, sweeper.get("n_trials")
    fixed = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    try:
        jobs = jobs_of_sweep([*fixed, *config.hydra.overrides.task])
    except HydraException:  # Hydra reports the mistake
        return None, None
    if jobs is None:
        return None, None
    hashes = {job_hash(job) for job in jobs}
    return hashes, len(hashes)


class Result(NamedTuple):
    """One setting of a sweep: the options that differ between settings, and a value for each seed."""

    options: dict[str, str]
    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half the 95 % interval of the mean by Student's t; NaN for one value."""
        n = len(self.values)
        return float(stats.t.ppf(0.975, n - 1) * stats.sem(self.values)) if n > 1 else math.nan


def results_by_setting(folder: Path, monitor: str, mode: str) -> list[Result]:
    """Group the finished jobs of a sweep's folder by their options, seeds aside, the best setting first."""
    found: dict[tuple[tuple[str, str], ...], list[float]] = {}
    jobs = {path.parent: status_data(path.parent) for path in sorted(folder.glob(f"*/{STATUS}"))}
    changed = changed_files(jobs.values())
    for job, data in jobs.items():
        status = read_status(job)
        value = status.get("objective") if is_finished(job) else None
        if not (status.get("monitor") == monitor and isinstance(value, int | float)):
            continue
        options = job_options(status.get("overrides") or ())
        setting = tuple(pair for pair in options.items() if not is_incidental(pair[0], "setting"))
        # Jobs that read different contents of a file are never in one mean.
        setting += tuple((f"data of {name}", data[name][:8]) for name in changed if name in data)
        found.setdefault(setting, []).append(float(value))
    shared = set.intersection(*map(set, found)) if found else set()
    results = [
        Result({key: value for key, value in setting if (key, value) not in shared}, values)
        for setting, values in found.items()
    ]
    return sorted(results, key=lambda result: result.mean, reverse=mode != "min")


def print_sweep(folder: Path, monitor: str, mode: str) -> None:
    """Print a sweep's table, a row for each setting, and the command that reports on it."""
    results = results_by_setting(folder, monitor, mode)
    if not results:
        return
    options = list(dict.fromkeys(key for result in results for key in result.options))
    print_table(
        f"{monitor} of {folder}",
        [*options, monitor, "± 95 %", "seeds"],
        [
            [
                *(result.options.get(key, "default").strip("'") for key in options),
                f"{result.mean:.4f}",
                f"{result.half_width:.4f}" if math.isfinite(result.half_width) else "–",
                str(len(result.values)),
            ]
            for result in results
        ],
    )
    if any(_is_tested(path.parent) for path in folder.glob(f"*/{STATUS}")):
        print(f"next: python -m recsys_ssm.report {folder}", flush=True)


def _is_tested(job: Path) -> bool:
    try:
        return isinstance(json.loads((job / "metrics.json").read_text()).get("metrics"), dict)
    except (OSError, ValueError, AttributeError):
        return False


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as wide as its content, so that a narrow terminal or a log file loses none of it."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title=Text(title),
        title_justify="left",
    )
    for column in columns:
        table.add_column(Text(column), no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    widths = (max(map(len, cells)) + 3 for cells in zip(columns, *rows, strict=True))
    width = max(80, len(title), sum(widths))
    Console(width=width, highlight=False, soft_wrap=True).print(table)
