"""Try run folders and checkpoints of a stranger through every command: none runs code or reads the environment."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from tries import LONGEST, QUICK, Answer, call, inside, report, trained

SECRET = "hunter2-hunter2"  # noqa: S105 (a made-up one)
Change = Callable[[Path], None]


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def edit(path: str, value: Any) -> Change:
    """Return a change that sets an option in config.yaml."""

    def change(run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        node = config
        *parents, name = path.split(".")
        for each in parents:
            node = node.setdefault(each, {})
        node[name] = value
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    return change


def raw(text: str) -> Change:
    """Return a change that replaces config.yaml."""
    return lambda run: (run / "config.yaml").write_text(text) and None


def prepended(text: str) -> Change:
    """Return a change that adds lines to config.yaml."""
    return lambda run: (
        (run / "config.yaml").write_text(text + (run / "config.yaml").read_text()) and None
    )


def weights(path: str, value: Any) -> Change:
    """Return a change that sets a value in the checkpoints; hashes are written anew."""

    def change(run: Path) -> None:
        for file in (run / "checkpoints").glob("*.ckpt"):
            content = torch.load(file, weights_only=True)
            node = content
            *parents, name = path.split(".")
            for each in parents:
                node = node.setdefault(each, {})
            node[name] = value
            torch.save(content, file)
            file.with_name(file.name + ".sha256").unlink(missing_ok=True)

    return change


def pickled(value: Any) -> Change:
    """Return a change that replaces the checkpoints by a pickle."""

    def change(run: Path) -> None:
        for file in (run / "checkpoints").glob("*.ckpt"):
            file.write_bytes(pickle.dumps(value))
            file.with_name(file.name + ".sha256").unlink(missing_ok=True)

    return change


def changes(mark: Path) -> dict[str, Change]:
    """Return the hostile changes by name; each would create ``mark`` if it ran."""
    touch = f"touch {mark}"
    write = f"open({str(mark)!r}, 'w')"
    calls = {
        "os.system": {"command": touch},
        "subprocess.Popen": {"args": ["touch", str(mark)]},
        "subprocess.run": {"args": ["touch", str(mark)]},
        "builtins.exec": {"source": write},
        "builtins.eval": {"source": write},
        "pathlib.Path.touch": {"self": str(mark)},
        "runpy.run_path": {"path_name": "stranger.py"},
        "importlib.import_module": {"name": "stranger"},
        "stranger.Thing": {},
        "hydra.utils.instantiate": {"config": {"_target_": "os.system", "command": touch}},
        "torch.hub.load": {"repo_or_dir": ".", "model": "x", "source": "local"},
        "recsys_ssm.run.files.write_text": {"path": str(mark), "text": "x"},
        "recsys_ssm.instantiate.import_modules": {"names": ["stranger"]},
        "recsys_ssm.instantiate.import_target": {"path": "stranger.Thing", "option": "x"},
        "recsys_ssm.sweeps.jobs.subprocess.Popen": {"args": ["touch", str(mark)]},
    }
    found: dict[str, Change] = {}
    for part in ("dataset", "model"):
        for target, arguments in calls.items():
            found[f"{part} {target}"] = edit(part, {"_target_": target, **arguments})
    for part in ("backbone", "trainer", "callbacks.x", "logger", "tokenizer", "launcher"):
        found[f"{part} os.system"] = edit(part, {"_target_": "os.system", "command": touch})
    secret = "${oc.env:SECRET}"  # noqa: S105
    for option in ("name", "dataset.name", "monitor", "published", "seed", "dataset.n_test_users"):
        found[f"{option} environment"] = edit(option, secret)
    found["resolver"] = edit("name", "${run_folder:" + str(mark) + ",x,null}")
    found["import option"] = edit("import", ["stranger"])
    found["python tag"] = prepended(f"x: !!python/object/apply:os.system ['{touch}']\n")
    found["object tag"] = raw(f"!!python/object/new:os.system ['{touch}']\n")
    found["alias bomb"] = raw(
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    )
    found["deep"] = raw("a: " + "[" * 200_000)
    found["name leaves the cache"] = edit("dataset.name", f"../../{mark.name}")
    for key in ("hyper_parameters._instantiator", "hyper_parameters._class_path"):
        found[f"checkpoint {key}"] = weights(key, "os.system")
    for part in ("backbone", "tokenizer", "head", "loss", "optimizer"):
        spec = {"_target_": "os.system", "command": touch}
        found[f"checkpoint {part}"] = weights(f"hyper_parameters.{part}", spec)
    found["checkpoint imports"] = weights(
        "hyper_parameters.backbone", {"_target_": "stranger.Thing"}
    )
    found["checkpoint linear"] = weights(
        "hyper_parameters.backbone", {"_target_": "torch.nn.Linear"}
    )
    found["pickle"] = pickled(Bomb(touch))
    found["pickle in a checkpoint"] = pickled({"state_dict": Bomb(touch)})
    found["torch pickle"] = lambda run: (
        [
            torch.save({"state_dict": Bomb(touch)}, file)
            for file in (run / "checkpoints").glob("*.ckpt")
        ]
        and None
    )
    return found


def judged(answer: Answer, mark: Path, folder: Path) -> str | None:
    """Return what is wrong with a command's answer."""
    if mark.exists():
        return "ran code"
    if SECRET in answer.out + answer.err:
        return "printed the environment"
    for path in folder.rglob("*"):
        is_text = path.is_file() and path.suffix in (".json", ".yaml", ".md", ".html", ".csv")
        if is_text and SECRET.encode() in path.read_bytes():
            return f"wrote the environment to {path.name}"
    if "Traceback" in answer.out + answer.err:
        return "traceback"
    if answer.code and (answer.err.count("\n") != 1 or len(answer.err) > LONGEST):
        return f"not one short line: {answer.err[:200]!r}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try every n-th folder")
    every = parser.parse_args().every
    os.environ["SECRET"] = SECRET
    faults: dict[str, str] = {}
    tries = 0
    with tempfile.TemporaryDirectory() as temporary:
        good = trained(Path(temporary) / "good")
        folder, mark = Path(temporary) / "tries", Path(temporary) / "mark"
        names = list(changes(mark))[::every]
        for name in names:
            shutil.rmtree(folder, ignore_errors=True)
            run = folder / "runs" / "theirs" / good.name
            shutil.copytree(good, run)
            changes(mark)[name](run)
            with inside(folder):
                (folder / "stranger.py").write_text(f"open({str(mark)!r}, 'w')\n")
                (folder / "users.csv").write_text("a,b\n1,2\n")
                last = run / "checkpoints" / "last.ckpt"
                for command in (
                    ["evaluate", f"run={run}"],
                    ["recommend", f"run={run}", "users=users.csv"],
                    ["report", str(run.parent), "output=report"],
                    ["train", *QUICK, "trainer.max_steps=12", f"ckpt_path={last}", "name=mine"],
                ):
                    tries += 1
                    answer = call(*command)
                    if fault := judged(answer, mark, folder):
                        faults[f"{name}, {command[0]}"] = fault
                    mark.unlink(missing_ok=True)
    print(json.dumps({"folders": len(names)}))
    return report(faults, tries)


if __name__ == "__main__":
    sys.exit(main())
