"""Sweeps that survive: a process and a status file a job, jobs found again by what they are, one line of progress.

Whatever Hydra launcher runs a sweep, a job of it only starts a process of its own
(``python -m recsys_ssm.<command>`` with the job's overrides) and waits. So a job that is killed, runs out of memory or
raises takes nothing down with it, and no job inherits another's threads, W&B run or GPU memory. The job's folder is
named after a hash of its overrides: the same command run again meets its own jobs, leaves what is finished, goes on
with what was cut short, and does what is missing or failed again.
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
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

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
)

try:
    import fcntl
except ImportError:  # Windows: two sweeps over one folder at once are not kept apart
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

IS_JOB = "RECSYS_SSM_JOB"
"""Set for a job's process: it ends when the process that started it does."""

_LOCK_WAIT_S = 10.0


class Task:
    """What Hydra calls: a run in this process, or, for a job of a sweep, :func:`run_job`.

    Args:
        command: ``recsys_ssm.<command>`` is the command.
        single: What a single run calls; launchers' workers are sent a task without it.
    """

    def __init__(self, command: str, single: Callable[[DictConfig], Any]) -> None:
        self.command, self.single = command, single
        self.sweep = {"host": socket.gethostname(), "pid": os.getpid()}

    def __call__(self, cfg: DictConfig) -> Any:
        is_job = HydraConfig.get().mode == RunMode.MULTIRUN
        return run_job(self.command, cfg, self.sweep) if is_job else self.single(cfg)

    def __getstate__(self) -> dict[str, Any]:
        return {"command": self.command, "sweep": self.sweep}


def run_job(command: str, cfg: DictConfig, sweep: Mapping[str, Any]) -> float | None:
    """One job of a sweep, in a process of its own, unless it is finished already.

    Args:
        command: The job's command: ``recsys_ssm.<command>``.
        cfg: The job's config, as Hydra composed it.
        sweep: ``host`` and ``pid`` of the process the sweep was begun by.

    Returns:
        The best value of the monitored metric; None if there is none, for the job failed (what went wrong is in
        its ``job_status.json``, all that it printed in ``console.log``). Not NaN: Optuna's sweeper ends at that.
    """
    if not is_alive(sweep):  # a worker that outlived it
        os._exit(1)
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    monitor, mode = str(cfg.get("monitor")), str(cfg.get("monitor_mode"))
    with lock_folder(folder) as lock:
        if lock is None:
            return None  # another sweep is at it
        if is_finished(folder):
            _warn_of_other_options(folder, cfg)
        else:
            threads = int(OmegaConf.select(cfg, "launcher.threads") or cores())
            overrides = list(hydra_cfg.overrides.task)
            _run(folder, _command_line(command, folder), overrides, threads, lock, sweep)
        if not is_finished(folder):
            return None
        value = objective(folder, monitor, mode)
        write_json(
            folder / STATUS,
            # "running" so far, if its sweep was killed between its result and its status
            {**read_status(folder), "state": "finished", "objective": value, "monitor": monitor},
        )
        return value if math.isfinite(value) else None


def _command_line(command: str, folder: Path) -> list[str]:
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
    if name not in (None, command):
        arguments = ["--config-name", name, *arguments]
    return [sys.executable, "-m", f"recsys_ssm.{command}", *arguments]


def _can_resume(folder: Path) -> bool:
    """Whether an earlier attempt was cut short, with a checkpoint; what failed by itself begins anew."""
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
            if not is_alive(sweep):
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
def lock_folder(folder: Path) -> Iterator[int | None]:
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
