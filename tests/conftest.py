"""Fixtures and settings every test shares."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports them: tests never talk to a server, and PyTorch's threads do not spin.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# One thread: the tests' tensors are small, and sums come out the same on every machine. A test
# about threads sets its own number; `_one_thread` puts this one back.
torch.set_num_threads(1)


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
