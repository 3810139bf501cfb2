"""Run each job of a sweep in a process and a folder of its own.

Whatever Hydra launcher runs a sweep, a job only starts a process (``python -m recsys_ssm.<command>`` with the job's
overrides) and waits for it. So a job that is killed, runs out of memory or raises leaves the others alone, and no job
inherits another's threads, W&B run or GPU memory. The job's folder is named after a hash of its overrides: the same
command run again skips finished jobs, resumes interrupted ones, and runs missing and failed ones.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from recsys_ssm.data.cache import cache_folder, hash_file
from recsys_ssm.errors import UserError
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.checkpoints import read_checkpoint
from recsys_ssm.run.files import write_json
from recsys_ssm.run.settings import differences, read_settings, settings
from recsys_ssm.sweeps.identity import cores
from recsys_ssm.sweeps.status import (
    CONSOLE,
    STATUS,
    is_alive,
    is_finished,
    objective,
    read_status,
    status_data,
)

try:
    import fcntl
except ImportError:  # Windows: two sweeps over one folder at once are not kept apart
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

IS_JOB = "RECSYS_SSM_JOB"
"""Environment variable of a job's process, which ends when the process that started it does."""

LOCK_WAIT_S = 10.0
"""Seconds to wait for a lock: worker processes of a killed sweep may still be exiting."""

_STOP_WAIT_S = 20.0
_POLL_S = 0.5

Stop = Literal["pruned", "interrupted"]
Poll = Callable[[], Stop | None]


class Task:
    """The function that Hydra calls: a run in this process, or for a job of a sweep :func:`run_job`.

    Args:
        command: ``recsys_ssm.<command>`` is the command.
        single: Function of a single run; the workers of launchers receive a task without it.
    """

    def __init__(self, command: str, single: Callable[[DictConfig], Any]) -> None:
        self.command, self.single = command, single
        self.sweep = this_process()

    def __call__(self, cfg: DictConfig) -> Any:
        is_job = HydraConfig.get().mode == RunMode.MULTIRUN
        return run_job(self.command, cfg, self.sweep) if is_job else self.single(cfg)

    def __getstate__(self) -> dict[str, Any]:
        return {"command": self.command, "sweep": self.sweep}


def this_process() -> dict[str, Any]:
    """Return host and process id of this process, by which :func:`~.status.is_alive` finds it."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def run_job(command: str, cfg: DictConfig, sweep: Mapping[str, Any]) -> float | None:
    """Run one job of a Hydra multirun in a process of its own, unless it is finished.

    Args:
        command: The job's command: ``recsys_ssm.<command>``.
        cfg: The job's config, as Hydra composed it.
        sweep: ``host`` and ``pid`` of the process that began the sweep.

    Returns:
        The best value of the monitored metric; None if the job failed. A failed job's ``job_status.json`` names the
        error, and its ``console.log`` holds all that it printed.
    """
    if not is_alive(sweep):  # a worker that outlived its sweep
        os._exit(1)
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    if is_finished(folder):
        _warn_of_other_options(folder, cfg)
        _warn_of_other_data(folder)
    overrides = list(hydra_cfg.overrides.task)
    name = hydra_cfg.job.config_name
    extra = [] if name in (None, command) else ["--config-name", name]
    value = run_in_folder(
        folder,
        [*extra, *config_arguments(), *overrides, *hydra_overrides()],
        command=command,
        overrides=overrides,
        threads=int(OmegaConf.select(cfg, "launcher.threads") or cores()),
        monitor=str(cfg.get("monitor")),
        mode=str(cfg.get("monitor_mode")),
        sweep=sweep,
    )
    return value if value is not None and math.isfinite(value) else None


def run_in_folder(
    folder: Path,
    arguments: Sequence[str],
    *,
    command: str,
    overrides: Sequence[str],
    threads: int,
    monitor: str,
    mode: str,
    sweep: Mapping[str, Any],
    poll: Poll | None = None,
    lock_wait_s: float = LOCK_WAIT_S,
) -> float | None:
    """Run a command as a job in its folder, unless it is finished, and keep its state in ``job_status.json``.

    Args:
        folder: The job's folder.
        arguments: The command line without the folder.
        command: ``recsys_ssm.<command>`` is run.
        overrides: Those that identify the job.
        threads: Threads of the job.
        monitor, mode: The metric that the job is judged by, and ``min`` or ``max``.
        sweep: ``host`` and ``pid`` of the process that began the sweep.
        poll: Called before the process starts and while it runs; the job is stopped when it returns a state.
        lock_wait_s: Seconds to wait for another process that runs the same job.

    Returns:
        The best value of the monitored metric (NaN if no validation had it); None if the job is not finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, lock_wait_s) as lock:
        if lock is None:
            return None
        if not is_finished(folder):
            if poll is not None and (stop := poll()):
                write_json(folder / STATUS, {**read_status(folder), "state": stop})
                return None
            line = [sys.executable, "-m", f"recsys_ssm.{command}", *arguments]
            line.append("hydra.run.dir='{}'".format(str(folder).replace("'", "\\'")))
            if _can_resume(folder) and not any(a.startswith("ckpt_path=") for a in arguments):
                line.append("ckpt_path=last")
            _run(folder, line, overrides, threads, lock, sweep, poll)
        if not is_finished(folder):
            return None
        value = objective(folder, monitor, mode)
        write_json(
            folder / STATUS,
            # still "running" if the sweep was killed between the job's result and its status
            {**read_status(folder), "state": "finished", "objective": value, "monitor": monitor},
        )
        return value


def config_arguments() -> list[str]:
    """Return the flags that name a user's own folders of configs, as this command was given them."""
    arguments: list[str] = []
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "main" and source.path != str(CONF_DIR):
            arguments += ["--config-path", source.path]
        elif source.provider == "command-line":
            arguments += ["--config-dir", source.path]
    return arguments


def hydra_overrides() -> list[str]:
    """Return the overrides of Hydra itself that a single job shares with its sweep."""
    of_sweeps = (
        "hydra.mode",
        "hydra.run",
        "hydra.sweep",
        "hydra/sweeper",
        "hydra.launcher",
        "hydra/launcher",
    )
    given = HydraConfig.get().overrides.hydra
    return [each for each in given if not each.lstrip("+~").startswith(of_sweeps)]


def _can_resume(folder: Path) -> bool:
    """Return True if an earlier attempt was cut short and left a checkpoint; a failed job begins anew."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if not checkpoint.is_file():
        return False
    status = read_status(folder)
    was_stopped = status.get("state") in ("pruned", "interrupted")
    if not was_stopped and (status.get("exit_code") or 0) > 0:
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
    poll: Poll | None,
) -> None:
    """Start the job's process, wait for it, and write its final state."""
    if "ckpt_path=last" not in command:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    started = time.time()
    status: dict[str, Any] = {
        "state": "running",
        "overrides": list(overrides),
        "command": list(command),
        "attempt": int(read_status(folder).get("attempt") or 0) + 1,
        "host": socket.gethostname(),
        "started": iso_time(started),
    }
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {IS_JOB: "1"}
    stop: Stop | None = None
    with (folder / CONSOLE).open("ab") as console:
        begin = console.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closes when the sweep ends, which ends the job
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment,
            # The job holds the lock too, until both processes are gone.
            pass_fds=(lock,) if lock >= 0 else (),
        )
        write_json(folder / STATUS, status | {"pid": process.pid})
        try:
            stop = _wait(process, sweep, poll)
            if stop is not None:
                _stop(process)
            elif poll is not None and process.returncode and poll() == "interrupted":
                stop = "interrupted"  # the job received Ctrl-C before it was looked at
        except BaseException:  # Ctrl-C, which the job received as well
            stop = "interrupted"
            _stop(process, already_told=True)
            raise
        finally:
            if process.stdin is not None:
                process.stdin.close()
            ended = time.time()
            code = process.returncode
            done = {
                "state": "finished" if is_finished(folder) else stop or "failed",
                "pid": process.pid,
                "ended": iso_time(ended),
                "seconds": round(ended - started, 1),
                "exit_code": code,
            }
            if done["state"] == "failed" or (code and stop is None):
                done["error"] = _error_of(folder / CONSOLE, begin, code)
            write_json(folder / STATUS, status | done)


def _wait(
    process: subprocess.Popen[bytes], sweep: Mapping[str, Any], poll: Poll | None
) -> Stop | None:
    """Wait for a job's process; return early if ``poll`` wants it stopped, exit if the sweep is gone."""
    while True:
        try:
            process.wait(timeout=_POLL_S)
            return None
        except subprocess.TimeoutExpired:
            if not is_alive(sweep):
                process.kill()
                os._exit(1)
            if poll is not None and (stop := poll()):
                return stop


def _stop(process: subprocess.Popen[bytes], *, already_told: bool = False) -> None:
    """Stop a job as Ctrl-C does, and kill it if it does not end in time."""
    if not already_told:
        process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def iso_time(seconds: float) -> str:
    """Return seconds of the epoch as local ISO 8601 time."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")


def _error_of(console: Path, begin: int, code: int | None) -> str:
    """Return the traceback or error line that a job ended with, or the signal that killed it."""
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
def lock_folder(folder: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[int | None]:
    """Lock a folder and give the lock's file descriptor (-1 where locks are unknown); None if another holds it."""
    if fcntl is None:
        yield -1
        return
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait_s
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


def check_siblings(folder: Path, sources: Mapping[str, str]) -> None:
    """Check that a job of a sweep reads the same files as the sweep's finished jobs.

    Args:
        folder: The job's folder.
        sources: The sha256 of each of its files, by path (:attr:`~recsys_ssm.data.base.RecommenderData.sources`).

    Raises:
        UserError: A file has changed since.
    """
    files = {name: digest for name, digest in sources.items() if Path(name).is_file()}
    for path in sorted(folder.parent.glob("*/metrics.json")) if files else ():
        before = status_data(path.parent)
        changed = [name for name, digest in files.items() if before.get(name, digest) != digest]
        if changed and path.parent != folder:
            raise UserError(
                f"{changed[0]}: has changed since the sweep's job {path.parent} was run; give this sweep another name "
                f"(sweep=…), or remove {folder.parent} to run all of it again"
            )


def _warn_of_other_data(folder: Path) -> None:
    """Log the files that have changed since a finished job read them."""
    for name, digest in status_data(folder).items():
        path = Path(name)
        if path.is_file() and hash_file(path, cache_folder()) != digest:
            log.warning(
                "%s is kept, though %s has changed since: its figures are those of the earlier data; remove it to run "
                "the job again, or give this sweep another name (sweep=…)",
                folder,
                name,
            )


def _warn_of_other_options(folder: Path, cfg: DictConfig) -> None:
    """Log the options of a finished job that differ from today's, for example after a default changed."""
    try:
        before = read_settings(folder / "config.yaml")
    except UserError:
        return
    now = settings(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    changed = differences(before, now)
    if changed:
        spelled = ", ".join(f"{key} {old} then, {new} now" for key, (old, new) in changed.items())
        log.warning(
            "%s is kept, though made with other options: %s; remove it to run the job again",
            folder,
            spelled,
        )


def end_with_parent() -> None:
    """End a job's process when the sweep that started it does; do nothing elsewhere."""
    if not os.environ.pop(IS_JOB, None):
        return
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # inherited from a shell's `&`
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, daemon=True, name="end with parent").start()
