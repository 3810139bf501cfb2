"""What importing the package does to the process."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "10000"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, ""),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_waiting_threads_spin_for_a_moment_unless_told_otherwise(
    given: dict[str, str], spins: str
) -> None:
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | given
    code = (
        "import os, sys, recsys_ssm; assert 'torch' not in sys.modules;"  # which reads it
        "print(os.environ.get('GOMP_SPINCOUNT', ''))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == spins
