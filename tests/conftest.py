"""Fixtures and settings every test shares."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Before anything imports them: tests never talk to a server, and PyTorch's threads do not spin. One
# thread: the tests' tensors are small, and sums come out the same to the last digit in this process
# and those that tests start. A test about threads sets its own number; `_one_thread` puts this back.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported

from hydra.core.hydra_config import HydraConfig

REPOSITORY = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data is kept beside the tests' own files, not in the user's cache."""
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data: the folder ``$RECSYS_SSM_DATA``, else ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("RECSYS_SSM_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder} (set RECSYS_SSM_DATA)")
    return folder.resolve()


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """Run a command as the command line does, in an empty folder, within this process.

    ``cli("train", "dataset=spotify", …)`` is ``python -m recsys_ssm.train dataset=spotify …``.
    """
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers = list(root.handlers)

    def run(name: str, *arguments: str) -> Outcome:
        module = importlib.import_module(f"recsys_ssm.{name}")
        monkeypatch.setattr("sys.argv", [f"recsys_ssm.{name}", *arguments])
        # A process of its own has no config of an earlier command.
        HydraConfig.instance().cfg = None
        capfd.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return Outcome(code, *capfd.readouterr())

    yield run
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers  # Hydra's write to streams that are closed now
