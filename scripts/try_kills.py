"""Kill a small training at random moments: resumed, it ends bit-identical to an undisturbed one, or is begun anew.

Each training is a forked process, so PyTorch is imported once. Half of the runs are written to ``--other``, a folder on
another file system than the one of temporary files, and half of the kills are aimed at the writing of a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tries import QUICK, call, inside, report

from recsys_ssm.errors import UserError
from recsys_ssm.run.checkpoint_io import is_whole
from recsys_ssm.run.checkpoints import read_checkpoint

OPTIONS = (*QUICK, "name=mine", "trainer.max_steps=60", "validations=20")


def start(folder: Path, *options: str) -> int:
    """Begin a training in a process of its own; return the process id."""
    child = os.fork()
    if child:
        return child
    with inside(folder):
        answer = call("train", *OPTIONS, *options)
        (folder / "output").write_text(answer.out + answer.err)
    os._exit(answer.code)


def wait(child: int) -> int:
    """Return the exit code of a process."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(folder: Path, child: int, rng: random.Random, seconds: float, aimed: bool) -> None:
    """Kill a training after a while, or when a checkpoint is being written."""
    deadline = time.monotonic() + rng.uniform(0.05, seconds)
    while time.monotonic() < deadline:
        time.sleep(0.0005)
        writes = aimed and any(folder.glob("runs/*/*/checkpoints/.*.tmp"))
        if writes and rng.random() < 0.2:
            break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that the newest run ended with."""
    run = max(folder.glob("runs/mine/*/metrics.json"), key=lambda path: path.parent.name).parent
    state: dict[str, torch.Tensor] = read_checkpoint(run / "checkpoints" / "last.ckpt")[
        "state_dict"
    ]
    return state


def torn(folder: Path) -> str | None:
    """Return a checkpoint that is not whole; None if all are."""
    for path in folder.glob("runs/*/*/checkpoints/*.ckpt"):
        try:
            read_checkpoint(path)
        except UserError:
            return str(path)
        if not is_whole(path):
            return str(path)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--other", type=Path, default=Path("/dev/shm"))  # noqa: S108
    options = parser.parse_args()
    torch.set_num_threads(1)
    faults: dict[str, str] = {}
    resumed = anew = finished = 0
    with (
        tempfile.TemporaryDirectory() as here,
        tempfile.TemporaryDirectory(dir=options.other) as there,
    ):
        call("train", "--cfg", "job")  # imports what a training needs
        begin = time.monotonic()
        if wait(start(Path(here) / "undisturbed")):
            raise SystemExit((Path(here) / "undisturbed" / "output").read_text())
        seconds = time.monotonic() - begin
        expected = weights(Path(here) / "undisturbed")
        for seed in range(options.kills):
            rng = random.Random(seed)
            folder = Path(there if seed % 2 else here) / "killed"
            shutil.rmtree(folder, ignore_errors=True)
            kill(folder, start(folder), rng, seconds, aimed=seed % 4 < 2)
            name = f"kill {seed}"
            if path := torn(folder):
                faults[name] = f"torn: {path}"
                continue
            was_finished = any(folder.glob("runs/mine/*/metrics.json"))
            code = wait(start(folder, "ckpt_path=last"))
            text = (folder / "output").read_text()
            if code and ("Traceback" in text or text.count("\n") > 12):
                faults[name] = f"resuming: {text[-300:]!r}"
                continue
            if code:  # killed before the first checkpoint
                anew += 1
                code = wait(start(folder))
            else:
                finished, resumed = finished + was_finished, resumed + (not was_finished)
            found = {} if code else weights(folder)
            if found.keys() != expected.keys() or any(
                not torch.equal(found[key], expected[key]) for key in expected
            ):
                faults[name] = "the weights differ"
    print(f"{resumed} resumed, {anew} begun anew, {finished} had finished; all compared bit by bit")
    return report(faults, options.kills)


if __name__ == "__main__":
    sys.exit(main())
