"""Metrics are the same under any number of processes, and a run resumes under another number."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pairs import N, loader, users_of
from small import SMALL_MAMBA

from recsys_ssm.data.interactions import Interactions
from recsys_ssm.run.resume import rescale

SCRIPT = '''
import json, os, sys
from pathlib import Path

import lightning as L

from recsys_ssm.run.trained import load_model, make_data, open_run


def figures(folder):
    """Return the figures of validation and test of every run below a folder, by the processes of the environment."""
    found, n = {}, int(os.environ.get("WORLD_SIZE", 1))
    for place in sorted(Path(folder).glob("runs/*/*")):
        run = open_run(str(place))
        model, _ = load_model(run)
        data = make_data(run, {})
        trainer = L.Trainer(
            accelerator="cpu", devices=n, strategy="ddp" if n > 1 else "auto", logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )
        trainer.validate(model, datamodule=data, verbose=False)
        validated = {name: float(value) for name, value in trainer.callback_metrics.items()}
        (tested,) = trainer.test(model, datamodule=data, verbose=False)
        users = model.test_rankings.frame().sort("user")
        found[run.name] = {
            "processes": trainer.world_size, "val": validated, "test": tested, "results": model.test_results(),
            "users": users["user"].to_list(), "items": users["recommended"].to_list(),
        }
    return found


if __name__ == "__main__":
    found = figures(sys.argv[1])
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[2]).write_text(json.dumps(found))
'''


def write_events(path: Path) -> None:
    """Write the events of 61 users, of whom 43 can be tested by their last item."""
    rows = [
        f"u{u},i{(u * 7 + t * t) % 23},{t}" for u in range(61) for t in range(6 if u < 43 else 2)
    ]
    path.write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")


def close(found: Any, expected: Any) -> None:
    """Check nested figures to 1e-6."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)
    else:
        assert found == expected


@pytest.fixture
def runs(cli, tmp_path: Path) -> Path:
    """A run of next items and one of two towers, of one process each."""
    write_events(tmp_path / "events.csv")
    common = (*SMALL_MAMBA, "logger=none", "trainer.enable_progress_bar=false",
              f"dataset.interactions={tmp_path / 'events.csv'}")  # fmt: skip
    for options in (
        ("dataset=interactions", "trainer.max_epochs=2", "name=next"),
        ("dataset=interactions", "trainer.max_epochs=2", "name=repeats", "model.filter_seen=false"),
        ("dataset=table", "trainer.max_steps=6", "validations=2", "name=towers",
         "dataset.n_test_users=31", "dataset.n_val_users=21"),
    ):  # fmt: skip
        outcome = cli("train", *options, *common)
        assert outcome.code == 0, outcome.text
    return tmp_path


@pytest.mark.parametrize("n", [2, 4])
def test_metrics_of_several_processes_are_those_of_one(runs: Path, n: int) -> None:
    script = runs / "figures.py"
    script.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("figures", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    alone = json.loads(json.dumps(module.figures(runs)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}",
         "figures.py", ".", "found.json"],
        cwd=runs, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((runs / "found.json").read_text())
    assert found.keys() == {"next", "repeats", "towers"}
    for name, figures in found.items():
        assert figures.pop("processes") == n and alone[name].pop("processes") == 1
        n_users = figures["results"]["metrics"]["n_users"]
        assert n_users % 2 and n_users % 4, "the processes must have unequal shares"
        if name == "towers":  # a loss among the pairs of a batch depends on the batches
            del figures["val"]["val/loss"], alone[name]["val"]["val/loss"]
        close(figures, alone[name])


def train_on(n: int, folder: Path, *options: str) -> str:
    """Train with n processes in a folder; return what is printed."""
    done = subprocess.run(
        [sys.executable, "-m", "recsys_ssm.train", "dataset=interactions", *SMALL_MAMBA,
         f"dataset.interactions={folder / 'events.csv'}", "dataset.batch_positions=16",
         "dataset.max_length=8", "output_dir=run",
         "trainer.enable_progress_bar=false", "logger=none", "trainer.strategy=ddp", "trainer.accelerator=cpu",
         f"trainer.devices={n}", *options],
        cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
        text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_trained_on_two_goes_on_with_one_and_again_on_two(tmp_path: Path) -> None:
    """It goes on at the same place of the epoch, so each epoch has as many steps as without a stop."""
    write_events(tmp_path / "events.csv")
    data = Interactions(interactions=tmp_path / "events.csv", batch_positions=16, max_length=8)
    n_steps = len(data.train_dataloader())
    assert n_steps > 6
    metrics = tmp_path / "run" / "metrics.json"
    keep = ("+callbacks.each._target_=lightning.pytorch.callbacks.ModelCheckpoint", "+callbacks.each.dirpath=kept",
            "+callbacks.each.every_n_train_steps=3", "+callbacks.each.save_top_k=-1")  # fmt: skip
    train_on(2, tmp_path, "trainer.max_epochs=1", *keep)
    first = json.loads(metrics.read_text())
    assert first["steps"] == 5 and first["metrics"]["n_users"] == 43
    [middle] = tmp_path.glob("kept/*step=3*.ckpt")
    train_on(1, tmp_path, "trainer.max_epochs=2", f"ckpt_path={middle}".replace("=", "='", 1) + "'")
    second = json.loads(metrics.read_text())
    assert second["steps"] == 3 + n_steps - 6 + n_steps
    train_on(2, tmp_path, "trainer.max_epochs=3", "ckpt_path=last")  # from the end of an epoch
    third = json.loads(metrics.read_text())
    assert third["steps"] == second["steps"] + 5
    assert third["metrics"]["n_users"] == 43


def test_every_pair_is_read_once_when_the_number_of_processes_changes() -> None:
    """Two processes read two batches each, and one process reads the rest of the epoch."""
    read = [batch for rank in range(2) for batch in users_of(loader(rank=rank, world_size=2))[:2]]
    loop = {
        "epoch_loop.batch_progress": {
            "current": {"ready": 2, "completed": 1},
            "is_last_batch": False,
        },
        "state_dict": {"combined_loader": [{"epoch": 0, "position": 2}]},
    }
    one = loader()
    rescale(loop, 2, 1, len(one))
    one.load_state_dict(loop["state_dict"]["combined_loader"][0])
    read += users_of(one)
    assert sorted(itertools.chain(*read)) == list(range(N))
    assert loop["epoch_loop.batch_progress"]["current"] == {"ready": 4, "completed": 3}
