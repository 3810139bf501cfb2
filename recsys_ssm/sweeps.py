"""Sweeps that survive: a process and a status file a job, jobs found again by what they are, one line of progress.

Whatever Hydra launcher runs a sweep, a job of it only starts a process of its own
(``python -m recsys_ssm.<door>`` with the job's overrides) and waits. So a job that is killed, runs out of memory or
raises takes nothing down with it, and no job inherits another's threads, W&B run or GPU memory. The job's folder is
named after a hash of its overrides: the same command run again meets its own jobs, leaves what is finished, goes on
with what was cut short, and does what is missing or failed again.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from recsys_ssm.errors import UserError
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.results import write_json

try:
    import fcntl
except ImportError:  # Windows: two sweeps over one folder at once are not kept apart
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

STATUS = "job_status.json"
CONSOLE = "console.log"
IS_JOB = "RECSYS_SSM_JOB"
"""Set for a job's process: it ends when the process that started it does."""

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
_LOCK_WAIT_S = 10.0


# -------------------------------------------------------------------------------------------- names


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


# ------------------------------------------------------------------------------------------- cores


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


# ---------------------------------------------------------------------------------------- statuses


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
    if state == "running" and not _is_alive(status):
        return "interrupted"
    return str(state)


def _is_alive(status: Mapping[str, Any]) -> bool:
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


# -------------------------------------------------------------------------------------------- jobs


class Task:
    """What Hydra calls: a run in this process, or, for a job of a sweep, :func:`run_job`.

    Args:
        door: ``recsys_ssm.<door>`` is the command.
        single: What a single run calls; launchers' workers are sent a task without it.
    """

    def __init__(self, door: str, single: Callable[[DictConfig], Any]) -> None:
        self.door, self.single = door, single
        self.sweep = {"host": socket.gethostname(), "pid": os.getpid()}

    def __call__(self, cfg: DictConfig) -> Any:
        is_job = HydraConfig.get().mode == RunMode.MULTIRUN
        return run_job(self.door, cfg, self.sweep) if is_job else self.single(cfg)

    def __getstate__(self) -> dict[str, Any]:
        return {"door": self.door, "sweep": self.sweep}


def run_job(door: str, cfg: DictConfig, sweep: Mapping[str, Any]) -> float | None:
    """One job of a sweep, in a process of its own, unless it is finished already.

    Args:
        door: The job's command: ``recsys_ssm.<door>``.
        cfg: The job's config, as Hydra composed it.
        sweep: ``host`` and ``pid`` of the process the sweep was begun by.

    Returns:
        The best value of the monitored metric; None if there is none, for the job failed (what went wrong is in
        its ``job_status.json``, all that it printed in ``console.log``). Not NaN: Optuna's sweeper ends at that.
    """
    if not _is_alive(sweep):  # a worker that outlived it
        os._exit(1)
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    monitor, mode = str(cfg.get("monitor")), str(cfg.get("monitor_mode"))
    with _lock(folder) as lock:
        if lock is None:
            return None  # another sweep is at it
        if is_finished(folder):
            _warn_of_other_options(folder, cfg)
        else:
            threads = int(OmegaConf.select(cfg, "launcher.threads") or cores())
            overrides = list(hydra_cfg.overrides.task)
            _run(folder, _command(door, folder), overrides, threads, lock, sweep)
        if not is_finished(folder):
            return None
        value = objective(folder, monitor, mode)
        write_json(
            folder / STATUS,
            # "running" so far, if its sweep was killed between its result and its status
            {**read_status(folder), "state": "finished", "objective": value, "monitor": monitor},
        )
        return value if math.isfinite(value) else None


def _command(door: str, folder: Path) -> list[str]:
    """The job as a command: the sweep's own options without those that make it a sweep."""
    hydra_cfg = HydraConfig.get()
    of_sweeps = ("hydra.mode", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
    arguments = [
        *hydra_cfg.overrides.task,
        *(
            each
            for each in hydra_cfg.overrides.hydra
            if not each.lstrip("+~").startswith(of_sweeps)
        ),
        "hydra.run.dir='{}'".format(str(folder).replace("'", "\\'")),
    ]
    if _can_resume(folder) and not any(a.startswith("ckpt_path=") for a in arguments):
        arguments.append("ckpt_path=last")
    for source in hydra_cfg.runtime.config_sources:
        if source.provider == "main" and source.path != str(CONF_DIR):
            arguments = ["--config-path", source.path, *arguments]
        elif source.provider == "command-line":
            arguments = ["--config-dir", source.path, *arguments]
    name = hydra_cfg.job.config_name
    if name not in (None, door):
        arguments = ["--config-name", name, *arguments]
    return [sys.executable, "-m", f"recsys_ssm.{door}", *arguments]


def _can_resume(folder: Path) -> bool:
    """Whether an earlier attempt was cut short, with a checkpoint; what failed by itself begins anew."""
    from recsys_ssm.checkpoints import read_checkpoint

    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        return False
    exit_code = read_status(folder).get("exit_code")
    if exit_code is not None and exit_code > 0:
        return False
    try:
        read_checkpoint(checkpoint)
    except UserError:  # cut short while it was written
        return False
    return True


def _run(
    folder: Path,
    command: Sequence[str],
    overrides: Sequence[str],
    threads: int,
    lock: int,
    sweep: Mapping[str, Any],
) -> None:
    """Start the job's process, wait for it, and keep what became of it."""
    if "ckpt_path=last" not in command:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    started = time.time()
    status: dict[str, Any] = {
        "state": "running",
        "overrides": list(overrides),
        "command": list(command),
        "attempt": int(read_status(folder).get("attempt") or 0) + 1,
        "host": socket.gethostname(),
        "started": _iso(started),
    }
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {IS_JOB: "1"}
    with (folder / CONSOLE).open("ab") as console:
        begin = console.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end tells the job that its sweep is gone
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment,
            # The lock is the job's too: it is held until both are gone.
            pass_fds=(lock,) if lock >= 0 else (),
        )
        write_json(folder / STATUS, status | {"pid": process.pid})
        try:
            _wait(process, sweep)
        except BaseException:  # Ctrl-C, which the job got as well: it has a moment to end in order
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        finally:
            if process.stdin is not None:
                process.stdin.close()
            ended = time.time()
            code = process.returncode
            done = {
                "state": "finished" if is_finished(folder) else "failed",
                "pid": process.pid,
                "ended": _iso(ended),
                "seconds": round(ended - started, 1),
                "exit_code": code,
            }
            if done["state"] == "failed" or code:
                done["error"] = _what_went_wrong(folder / CONSOLE, begin, code)
            write_json(folder / STATUS, status | done)


def _wait(process: subprocess.Popen[bytes], sweep: Mapping[str, Any]) -> None:
    """Wait for a job's process; end it, and this one, if the sweep is gone and left its workers behind."""
    while True:
        try:
            process.wait(timeout=1)
            return
        except subprocess.TimeoutExpired:
            if not _is_alive(sweep):
                process.kill()
                os._exit(1)


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")


def _what_went_wrong(console: Path, begin: int, code: int | None) -> str:
    """The traceback or the error line a job ended with; of one that was killed, by which signal."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    with console.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace").rstrip()
    for start in ("Traceback (most recent call last)", "error: "):
        if (found := text.rfind(start)) >= 0:
            return text[found:][-20_000:]
    return "\n".join(text.splitlines()[-20:]) or f"exit code {code}"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int | None]:
    """The job's lock, as a file descriptor (-1: locks are unknown here); None if another sweep holds it.

    A moment is waited: the orphans of a sweep that was killed are about to end.
    """
    if fcntl is None:
        yield -1
        return
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield None
                    return
                time.sleep(0.1)
        yield descriptor
    finally:
        os.close(descriptor)


def _warn_of_other_options(folder: Path, cfg: DictConfig) -> None:
    """A finished job is kept also if a default has changed since: say so, for its figures are of before."""
    from recsys_ssm.reports.settings import differences, read_settings, settings

    try:
        before = read_settings(folder / "config.yaml")
    except UserError:
        return
    now = settings(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    changed = differences(before, now)
    if changed:
        told = ", ".join(f"{key} {old} then, {new} now" for key, (old, new) in changed.items())
        log.warning("%s is kept, made with other options: %s", folder, told)


def end_with_parent() -> None:
    """In a job's process: end when the sweep that started it is gone. Elsewhere nothing."""
    if not os.environ.pop(IS_JOB, None):
        return

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, daemon=True, name="end with parent").start()


# ---------------------------------------------------------------------------------------- progress


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


def launcher_of(error: BaseException) -> str | None:
    """The launcher that could not start its jobs, where an error says that; None: it says something else.

    Such an error comes from Hydra's plugin or from what the plugin calls, with none of our code in between.
    """
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    plugins = [re.search(r"hydra_plugins.hydra_(\w+)_launcher\b", file) for file in files]
    last = max((at for at, found in enumerate(plugins) if found), default=None)
    if last is None or error.__cause__ is not None:  # a cause: a job's own error, handed on
        return None
    if any(Path(__file__).parent in Path(file).parents for file in files[last + 1 :]):
        return None
    found = plugins[last]
    return found[1] if found else None


def _any_running(folder: Path) -> bool:
    """Whether a job of the folder runs; a moment is waited, as for a job's lock."""
    deadline = time.monotonic() + _LOCK_WAIT_S
    while any(job_state(path.parent) == "running" for path in folder.glob(f"*/{STATUS}")):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.1)
    return False
