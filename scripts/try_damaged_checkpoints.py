"""Damage the checkpoints of a run in 40 ways: the newest valid one is used and named, or one line says what to do."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tries import LONGEST, QUICK, call, inside, report, trained


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file and return the kind of damage."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(
        ["cut", "bit", "zeros", "empty", "longer", "other", "folder", "half", "no hash", "text"]
    )
    place = rng.randrange(len(content))
    if kind in ("cut", "no hash"):
        content = content[:place]
    elif kind == "half":
        content = content[: len(content) // 2]
    elif kind == "bit":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    elif kind == "empty":
        content.clear()
    elif kind == "longer":
        content += b"x" * rng.randrange(1, 5000)
    elif kind == "other":
        content = bytearray(rng.randbytes(5000))
    elif kind == "text":
        content = bytearray(b"version https://git-lfs.github.com/spec/v1\n")
    if kind == "folder":
        path.unlink()
        path.mkdir()
        return kind
    if kind == "no hash":
        path.with_name(path.name + ".sha256").unlink(missing_ok=True)
    path.write_bytes(content)
    return kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=40)
    tries = parser.parse_args().tries
    faults: dict[str, str] = {}
    used = refused = 0
    with tempfile.TemporaryDirectory() as temporary:
        good = trained(Path(temporary) / "good", "name=mine")
        for seed in range(tries):
            rng = random.Random(seed)
            folder = Path(temporary) / "tries"
            shutil.rmtree(folder, ignore_errors=True)
            run = folder / "runs" / "mine" / good.name
            shutil.copytree(good, run)
            kinds = [damage(run / "checkpoints" / "last.ckpt", rng)]
            if both := seed % 3 == 0:
                kinds.append(damage(run / "checkpoints" / "best.ckpt", rng))
            with inside(folder):
                answer = call(
                    "train", *QUICK, "name=mine", "trainer.max_steps=12", "ckpt_path=last"
                )
            text = answer.out + answer.err
            fault = None
            if "Traceback" in text:
                fault = "traceback"
            elif answer.code == 0 and (both or "best.ckpt is used" not in text):
                fault = "taken unnoticed"
            elif answer.code and (
                not (both or "folder" in kinds)
                or answer.err.count("\n") != 1
                or len(answer.err) > LONGEST
            ):
                fault = f"not one line, or the valid one was not used: {answer.err[:300]!r}"
            elif "weights_only" in text:
                fault = "advises to read the file unsafely"
            if fault:
                faults[f"{seed} {'+'.join(kinds)}"] = fault
            used, refused = used + (answer.code == 0), refused + (answer.code != 0)
    print(f"{used} resumed from the valid checkpoint, {refused} refused")
    return report(faults, tries)


if __name__ == "__main__":
    sys.exit(main())
