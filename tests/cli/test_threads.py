"""Check that every command sets OpenMP's spin count before PyTorch reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Python imports sitecustomize first. This one prints the spin count when torch is imported, and stops there.
PROBE = """
import os, sys

class Probe:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("spin", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Probe())
"""

COMMANDS = sorted(
    path.relative_to(Path(__file__).parents[2]).with_suffix("").as_posix().replace("/", ".")
    for path in (Path(__file__).parents[2] / "recsys_ssm").glob("**/*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    and path.parent.name + path.name
    != "recsys_ssm__main__.py"  # lists the commands, without PyTorch
)


def spin_count_at_torch(command: str, folder: Path, **given: str) -> str:
    (folder / "sitecustomize.py").write_text(PROBE)
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | given
    paths = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, "-m", command],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.strip()


def test_every_command_is_found() -> None:
    names = ("train", "evaluate", "recommend", "report")
    assert {f"recsys_ssm.{name}" for name in names} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_sets_the_spin_count_before_it_imports_torch(
    command: str, tmp_path: Path
) -> None:
    assert spin_count_at_torch(command, tmp_path) == "spin 10000"


@pytest.mark.parametrize(
    ("given", "spins"), [({"OMP_WAIT_POLICY": "PASSIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_a_users_choice_stands(given: dict[str, str], spins: str, tmp_path: Path) -> None:
    assert spin_count_at_torch("recsys_ssm.train", tmp_path, **given) == f"spin {spins}"
