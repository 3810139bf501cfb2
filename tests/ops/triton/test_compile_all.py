"""Compile the kernels for GPUs that are not there, in a process without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("compile_all.py")


def compile_for(*options: str) -> str:
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no NVIDIA compiler")
    # A CUDA build would look for a device where there is none.
    if torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("a CUDA build of PyTorch without a device")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], env=environment, capture_output=True, text=True,
        cwd=SCRIPT.parents[3], check=False, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_kernel_compiles_without_atomics(arch: str) -> None:
    assert f"kernels for sm_{arch}, 0 with atomics" in compile_for("--arch", arch)


def test_one_call_of_each_operator_compiles_without_atomics() -> None:
    assert "kernels for sm_90, 0 with atomics" in compile_for("--quick")
