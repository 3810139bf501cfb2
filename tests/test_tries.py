"""The scripts that try to break the commands find no fault; here with a small number of tries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "arguments",
    [
        ["try_bad_commands.py", "--every", "12"],
        ["try_hostile_folders.py", "--every", "12"],
        ["try_damaged_checkpoints.py", "--tries", "5"],
        ["try_kills.py", "--kills", "3"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_try_finds_a_fault(repository: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=repository / "scripts",
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 faults" in done.stdout


def test_the_shared_cases_come_out_right(repository: Path, shared_data: Path) -> None:
    folder = shared_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"no folder of cases at {folder}")
    done = subprocess.run(
        [sys.executable, "try_cases.py", str(folder), "--only", "01", "09", "14"],
        cwd=repository / "scripts", capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and ", 0 faults" in done.stdout, done.stdout + done.stderr
