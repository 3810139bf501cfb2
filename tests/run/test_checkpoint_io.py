"""Checkpoints are whole or not there, and damage is noticed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recsys_ssm.errors import UserError
from recsys_ssm.run.checkpoint_io import AtomicCheckpointIO, is_whole, read_hashes
from recsys_ssm.run.checkpoints import newest_valid, read_checkpoint


def save(path: Path, value: float) -> None:
    state = {"state_dict": {"w": torch.full((1000,), value)}}
    AtomicCheckpointIO().save_checkpoint(state, path)


def test_a_checkpoint_is_replaced_and_its_hash_kept(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    save(path, 1.0)
    save(path, 2.0)
    assert read_checkpoint(path)["state_dict"]["w"][0] == 2
    assert len(read_hashes(path)) == 1 and is_whole(path)
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "last.ckpt",
        "last.ckpt.sha256",
    ]
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_checkpoint_is_one_line_and_the_other_is_used(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "best.ckpt", 1.0)
    save(tmp_path / "last.ckpt", 2.0)
    damage(tmp_path / "last.ckpt", random.Random(seed))
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path / "last.ckpt")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert newest_valid(tmp_path).name == "best.ckpt"
    assert "best.ckpt is used" in caplog.text


def damage(path: Path, rng: random.Random) -> None:
    """Cut, flip a bit of, overwrite or empty a file."""
    content = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        content = content[: rng.randrange(len(content))]
    elif kind == 1:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        start = rng.randrange(len(content) - 50)
        content[start : start + 50] = bytes(50)
    else:
        content = bytearray()
    path.write_bytes(content)


def test_no_valid_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in it"):
        newest_valid(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        newest_valid(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the checkpoint cannot be written"):
        save(tmp_path / "file" / "last.ckpt", 1.0)


_WRITER = """
import sys, torch
from pathlib import Path
from recsys_ssm.run.checkpoint_io import AtomicCheckpointIO
path, value = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    value += 1
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.full((200_000,), value)}}, path)
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    rng = random.Random(0)
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"TMPDIR": "/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"},
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while not path.is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        w = read_checkpoint(path)["state_dict"]["w"]
        assert (w == w[0]).all()
