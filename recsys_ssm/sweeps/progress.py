"""Show where a sweep stands, in one line."""

from __future__ import annotations

import contextlib
import datetime
import logging
import shutil
import sqlite3
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from recsys_ssm.sweeps.identity import job_hash
from recsys_ssm.sweeps.jobs import _LOCK_WAIT_S
from recsys_ssm.sweeps.status import STATUS, job_state, read_status

log = logging.getLogger(__name__)


class Summary(NamedTuple):
    """Where a sweep stands. ``total`` is None where only the sweeper knows."""

    total: int | None
    done: int
    failed: list[Path]
    running: int
    seconds_left: float | None
    best: tuple[str, float] | None

    def line(self, name: str, monitor: str) -> str:
        parts = [f"{self.done} of {self.total} done" if self.total else f"{self.done} done"]
        parts.append(f"{len(self.failed)} failed")
        if self.running:
            parts.append(f"{self.running} running")
        if self.seconds_left is not None and self.running:
            parts.append(f"{_spell(self.seconds_left)} left")
        if self.best is not None:
            parts.append(f"best {monitor} {self.best[1]:.4f} ({self.best[0]})")
        return f"sweep {name}: {', '.join(parts)}"


def _spell(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def summarize(
    folder: Path, hashes: set[str] | None, total: int | None, mode: str, since: float
) -> Summary:
    """Where the sweep in ``folder`` stands.

    Args:
        folder: The sweep's folder.
        hashes: Those of its jobs (:func:`job_hash`); None: every job begun since ``since``.
        total: How many jobs there are, if that is known.
        mode: Whether ``min`` or ``max`` of the monitored metric is best.
        since: When this sweep began, in seconds of the epoch.
    """
    done, failed, seconds, ages = 0, [], [], []
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
        elif state == "failed" and _epoch(status.get("ended")) >= since:
            failed.append(job)
        elif state == "finished":
            done += 1
            if status.get("seconds"):
                seconds.append(float(status["seconds"]))
            value = status.get("objective")
            if value is not None and (
                best is None or (value < best[1] if mode == "min" else value > best[1])
            ):
                best = job.name[:-9], float(value)
    left = None
    if total and seconds:
        mean = sum(seconds) / len(seconds)
        to_do = (total - done - len(failed)) * mean - sum(min(age, mean) for age in ages)
        left = max(0.0, to_do) / max(1, len(ages))
    return Summary(total, done, failed, len(ages), left, best)


def _epoch(text: Any) -> float:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError):
        return 0.0


class SweepProgress(Callback):
    """Hydra callback of a multirun: one line of where the whole sweep stands, and in the end what failed.

    Args:
        every_s: Seconds between looks at the jobs. The line is told anew where it has changed and someone may want
            to know: on a terminal always, elsewhere when a job has ended.
    """

    current: SweepProgress | None = None
    """That of the sweep this process runs."""

    def __init__(self, every_s: float = 1.0) -> None:
        self.every_s = every_s

    def __getstate__(self) -> dict[str, Any]:  # launchers send it along to their workers
        return {"every_s": self.every_s}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.folder = Path(config.hydra.sweep.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = str(config.get("sweep") or self.folder.name)
        self.monitor, self.mode = str(config.get("monitor")), str(config.get("monitor_mode"))
        self.hashes, self.total = _expected(config)
        self.since = time.time()
        self._ended, self._told = (0, 0), ""
        self._stop = threading.Event()
        resume_search(config)
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        self._fixed = {each.get_key_element() for each in parsed if not each.is_sweep_override()}
        SweepProgress.current = self
        self._thread = threading.Thread(target=self._watch, daemon=True, name="sweep progress")
        self._thread.start()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.stop()

    def summary(self) -> Summary:
        return summarize(self.folder, self.hashes, self.total, self.mode, self.since)

    def stop(self) -> None:
        """End the line; nothing if that has been done."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._tell(self.summary(), last=True)

    def failures(self) -> list[tuple[str, str, Path]]:
        """Of each job that failed: its overrides, the last line of what went wrong, and its folder."""
        found = []
        for job in self.summary().failed:
            status = read_status(job)
            lines = str(status.get("error") or "").strip().splitlines() or ["no message"]
            overrides = status.get("overrides", ())
            own = [each for each in overrides if each.partition("=")[0] not in self._fixed]
            found.append((" ".join(own) or job.name, lines[-1].removeprefix("error: "), job))
        return found

    def _watch(self) -> None:
        while not self._stop.wait(self.every_s):
            with contextlib.suppress(OSError):  # a folder that goes while it is looked at
                self._tell(self.summary())

    def _tell(self, summary: Summary, *, last: bool = False) -> None:
        line = summary.line(self.name, self.monitor)
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{line if last else line[:width]}" + "\n" * last)
            sys.stderr.flush()
            return
        ended = summary.done, len(summary.failed)
        if ended != self._ended or (last and line != self._told):
            self._ended, self._told = ended, line
            print(line, file=sys.stderr, flush=True)


def end_progress() -> list[tuple[str, str, Path]]:
    """End the line of the sweep this process ran; what failed in it. Nothing if it ran none."""
    progress, SweepProgress.current = SweepProgress.current, None
    if progress is None:
        return []
    progress.stop()
    return progress.failures()


def _expected(config: DictConfig) -> tuple[set[str] | None, int | None]:
    """Hashes and number of a sweep's jobs, as far as the sweeper's choice lets one know beforehand."""
    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_")).endswith(".BasicSweeper"):
        return None, sweeper.get("n_trials")
    fixed = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    try:
        parsed = OverridesParser.create().parse_overrides([*fixed, *config.hydra.overrides.task])
        [jobs] = BasicSweeper.split_arguments(parsed, None)
    except HydraException:  # glob() needs Hydra's own loader; mistakes are told by Hydra
        return None, None
    hashes = {job_hash(job) for job in jobs}
    return hashes, len(hashes)


def trials_left(n_trials: int, storage: str, study: str) -> int:
    """How many of ``n_trials`` an Optuna study on disk still lacks: run again, a search goes on, not from the start."""
    path = Path(storage.removeprefix("sqlite:///"))
    if not storage.startswith("sqlite:///") or not path.is_file():
        return n_trials
    query = (
        "SELECT COUNT(*) FROM trials JOIN studies USING (study_id) "
        "WHERE study_name = ? AND state = 'COMPLETE'"
    )
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            [(done,)] = database.execute(query, (study,))
    except sqlite3.Error:  # the study is not begun
        return n_trials
    return max(0, n_trials - int(done))


def resume_search(config: DictConfig) -> None:
    """Make a search by Optuna that was begun before go on where it was; nothing for other sweepers, or a new study.

    Trials that were cut short with their sweep are tried again, whose jobs then go on from their checkpoints. The
    sampler's seed is counted on by the trials there are: with the same one it would draw the same trials again.
    """
    sweeper, folder = config.hydra.sweeper, Path(config.hydra.sweep.dir)
    if not str(sweeper.get("_target_")).endswith(".OptunaSweeper"):
        return
    storage, name = str(sweeper.storage), str(sweeper.study_name)
    if not Path(storage.removeprefix("sqlite:///")).is_file():
        return
    import optuna

    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:  # the file is there, the study is not yet
        return
    trials = study.get_trials(deepcopy=False)
    if not _any_running(folder):  # otherwise another sweep is at them
        for trial in trials:
            if trial.state == optuna.trial.TrialState.RUNNING:
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                if trial.params:
                    # "Experimental" in the version that the sweeper holds it to.
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                        study.enqueue_trial(trial.params)
    seed = OmegaConf.select(sweeper, "sampler.seed")
    if seed is not None:
        with open_dict(config):
            sweeper.sampler.seed = int(seed) + len(trials)


def all_failed(error: BaseException) -> bool:
    """Whether an error is only Optuna's that there is no best trial, for every one has failed."""
    told = ("No trials are completed yet.", "Record does not exist.")  # in memory, on disk
    return isinstance(error, ValueError) and str(error) in told


def _any_running(folder: Path) -> bool:
    """Whether a job of the folder runs; a moment is waited, as for a job's lock."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while any(job_state(path.parent) == "running" for path in folder.glob(f"*/{STATUS}")):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)
    return False
