"""Call commands in this process, many times, and judge their output: shared by the scripts ``try_*.py``."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

QUICK = (
    "dataset.n_train=512",
    "dataset.n_val=64",
    "dataset.n_val_users=20",
    "dataset.n_test_users=20",
    "trainer.max_steps=8",
    "validations=2",
    "trainer.enable_progress_bar=false",
    "backbone=mamba",
    "backbone.d_model=16",
    "backbone.n_layers=1",
    "logger=none",
)
"""Options of a training that takes about a second."""

LONGEST = 400
"""Most characters of a message."""


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def fault(self) -> str | None:
        """Return what is wrong with the answer to a mistake; None if it is one line."""
        if "Traceback" in self.out + self.err:
            return "traceback"
        if self.code == 0:
            return "exit code 0"
        if self.err.count("\n") != 1 or not self.err.startswith("error: "):
            return f"not one line: {self.err[:200]!r}"
        return f"{len(self.err)} characters" if len(self.err) > LONGEST else None


def call(command: str, *arguments: str) -> Answer:
    """Run ``python -m recsys_ssm.<command>`` with arguments, within this process."""
    module = importlib.import_module(f"recsys_ssm.{command}")
    out, err = io.StringIO(), io.StringIO()
    argv, root = sys.argv, logging.getLogger()
    handlers = list(root.handlers)
    code = 0
    sys.argv = [f"recsys_ssm.{command}", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.main()
            except SystemExit as stop:
                if isinstance(stop.code, str):
                    print(stop.code, file=sys.stderr)
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                code = 1
                traceback.print_exc()
    finally:
        sys.argv = argv
        root.handlers[:] = handlers
    return Answer(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Make a folder the current one."""
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def files_of(folder: Path) -> set[str]:
    """Return the files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def trained(folder: Path, *options: str) -> Path:
    """Train a small run in a folder and return the run's folder."""
    with inside(folder):
        answer = call("train", *QUICK, *options)
    if answer.code:
        raise SystemExit(answer.out + answer.err)
    [run] = folder.glob("runs/*/*")
    return run


def report(faults: dict[str, str], n_tries: int) -> int:
    """Print the faults and their number; return the exit code."""
    for name, fault in faults.items():
        print(f"FAULT {name}: {fault}")
    print(f"{n_tries} tries, {len(faults)} faults")
    return int(bool(faults))
