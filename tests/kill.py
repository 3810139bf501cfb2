"""Kill a training as a machine does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def kill_after_checkpoint(
    folder: Path, options: Sequence[str], command: str = "train", timeout_s: float = 400
) -> None:
    """Start a command in a folder, kill it with -9 when ``last.ckpt`` is there, and check that no result is."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"recsys_ssm.{command}", *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + timeout_s
    # Another run may be there already.
    name = next((each.removeprefix("name=") for each in options if each.startswith("name=")), "*")
    while not list(folder.glob(f"runs/{name}/*/checkpoints/last.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=100)
    assert not list(folder.glob(f"runs/{name}/*/metrics.json"))
