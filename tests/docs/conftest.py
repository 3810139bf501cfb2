"""Run the code blocks of a page as they are written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import blocks


@pytest.fixture(scope="session")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Run a page's bash and python blocks in order, in an empty folder; return the folder, with ``output.txt``.

    ``python`` is this interpreter.
    """

    def run(page: Path) -> Path:
        folder = tmp_path_factory.mktemp(page.stem.lower())
        programs = tmp_path_factory.mktemp("bin")
        (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (programs / "python").chmod(0o755)
        script = ["set -eo pipefail"]
        for number, block in enumerate(blocks(page)):
            if block.not_run is None and block.language == "bash":
                script.append(block.text)
            elif block.not_run is None and block.language == "python":
                (programs / f"block{number}.py").write_text(block.text)
                script.append(f'PYTHONPATH="$PWD:$PYTHONPATH" python "{programs}/block{number}.py"')
        environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "RECSYS_SSM_CACHE": str(programs / "cache"),
        }
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        (folder / "output.txt").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder

    return run
