"""Test that W&B gets a run's figures, read back from the files of offline runs, and that nothing waits or asks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import wandb
from small import SMALL_MAMBA, TINY
from wandb.proto import wandb_internal_pb2 as pb

from recsys_ssm.errors import UserError
from recsys_ssm.run.loggers import wandb_logger, wandb_mode

QUICK = (*TINY, *SMALL_MAMBA, "logger=wandb")


def records(run_file: Path) -> Iterator[pb.Record]:
    """Return the records of a ``.wandb`` file: LevelDB's log format, whose blocks of 32 KiB hold pieces of records."""
    raw, block = run_file.read_bytes(), 32 * 1024
    position, parts = 7, b""  # a header of 7 bytes: ":W&B", a magic number, a version
    while position + 7 <= len(raw):
        if (
            block - position % block < 7
        ):  # too small for the header of a piece: zeros to the end of the block
            position += block - position % block
            continue
        length, kind = int.from_bytes(raw[position + 4 : position + 6], "little"), raw[position + 6]
        if kind == 0:
            position += block - position % block
            continue
        parts += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = pb.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def finished(run_file: Path) -> list[pb.Record]:
    """Return all records of a run that has ended; W&B's own process may still be writing the last ones."""
    deadline = time.monotonic() + 60
    while True:
        found = list(records(run_file))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, f"{run_file}: the run was never finished"
        time.sleep(0.1)


def items(entries: Any) -> dict[str, Any]:
    return {
        entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries
    }


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/offline-run-*/run-*.wandb"))


def test_what_lands_in_an_offline_run(cli, tmp_path: Path) -> None:
    outcome = cli(
        "train", *QUICK, "tags=[mine]", "logger.entity=team", "trainer.log_every_n_steps=1"
    )
    assert outcome.code == 0, outcome.text
    assert "wandb: " not in outcome.text  # three lines of its own stood among those of the run
    [path] = offline_runs(tmp_path)
    found = finished(path)

    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.display_name, run.project, run.entity, run.run_group) == (
        "spotify-mamba-seed0",
        "recsys_ssm",
        "team",
        "spotify",
    )
    assert list(run.tags) == ["mine"]
    config = items(run.config.update)
    for record in found:
        if record.WhichOneof("record_type") == "config":
            config |= items(record.config.update)
    assert (
        config["seed"] == 0
        and config["backbone"]["d_model"] == 16
        and config["optimizer"]["lr"] == 1e-4
    )
    assert config["versions"]["torch"]

    history: dict[str, list[Any]] = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            for name, value in items(record.history.item).items():
                history.setdefault(name, []).append(value)
    assert (
        len(history["train/loss"]) == 8
        and len(history["val/ndcg@10"]) == 2
        and len(history["val/loss"]) == 2
    )
    assert history["lr-Adam"][0] == 1e-4

    [run_folder] = tmp_path.glob("runs/*/*")
    results = json.loads((run_folder / "metrics.json").read_text())
    summary: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    assert summary["test/hr@10"] == results["metrics"]["hr@10"]
    assert summary["popularity/hr@10"] == results["baselines"]["popularity"]["hr@10"]
    assert summary["generated"] is False
    [exit_record] = [record.exit for record in found if record.WhichOneof("record_type") == "exit"]
    assert exit_record.exit_code == 0
    assert wandb.run is None


def test_the_git_commit_is_recorded(cli, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], check=True, capture_output=True, text=True, cwd=tmp_path
        ).stdout.strip()

    git("init", "-q")
    git("commit", "--allow-empty", "-qm", "one")
    assert cli("train", *QUICK, "trainer.max_steps=1").code == 0
    [path] = offline_runs(tmp_path)
    config: dict[str, Any] = {}
    for record in finished(path):
        if record.WhichOneof("record_type") == "config":
            config |= items(record.config.update)
    assert config["versions"]["git_commit"] == git("rev-parse", "HEAD")


def test_a_resumed_run_is_the_same_run(cli, tmp_path: Path) -> None:
    assert cli("train", *QUICK).code == 0
    assert cli("train", *QUICK, "trainer.max_steps=12", "ckpt_path=last").code == 0
    paths = offline_runs(tmp_path)
    ids = {
        record.run.run_id
        for path in paths
        for record in finished(path)
        if record.WhichOneof("record_type") == "run"
    }
    assert len(paths) == 2 and len(ids) == 1


def test_a_failed_job_ends_its_run_and_the_next_has_its_own(cli, tmp_path: Path) -> None:
    outcome = cli(
        "train", "--multirun", *QUICK, "monitor=val/nothing,val/ndcg@10", "trainer.max_steps=2"
    )
    assert outcome.code == 1
    codes = {}
    for path in offline_runs(tmp_path):
        found = finished(path)
        [run] = {r.run.run_id for r in found if r.WhichOneof("record_type") == "run"}
        codes[run] = [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"]
    assert sorted(codes.values()) == [[0], [1]]


def test_environment_variables_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "other")
    monkeypatch.setenv("WANDB_NAME", "named")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    monkeypatch.setenv("WANDB_RUN_GROUP", "together")
    logger = wandb_logger(save_dir=str(tmp_path), name="run", project="mine", group="g", tags=["c"])
    run = logger.experiment
    try:
        assert (run.project, run.name, tuple(run.tags), run.group) == (
            "other",
            "named",
            ("a", "b"),
            "together",
        )
    finally:
        wandb.finish()


@pytest.fixture
def no_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_without_a_key_offline(no_mode: pytest.MonkeyPatch) -> None:
    assert wandb_mode("auto") == "offline"


def test_a_run_begins_without_a_warning(no_mode: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in a new process, because W&B prints each warning once."""
    no_mode.setenv("WANDB_SILENT", "false")
    code = (
        "import wandb; from recsys_ssm.run.loggers import wandb_logger\n"
        "logger = wandb_logger(save_dir='.', name='run')\n"
        "assert logger.experiment.offline; wandb.finish()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_with_a_key_but_no_network_offline(no_mode: pytest.MonkeyPatch) -> None:
    no_mode.setenv("WANDB_API_KEY", "x" * 40)
    no_mode.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert wandb_mode("auto") == "offline"


def test_with_a_key_and_a_server_online(no_mode: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        no_mode.setenv("WANDB_API_KEY", "x" * 40)
        no_mode.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert wandb_mode("auto") == "online"


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_a_mode_that_is_asked_for_is_taken(no_mode: pytest.MonkeyPatch, mode: Any) -> None:
    assert wandb_mode(mode) == mode
    no_mode.setenv("WANDB_MODE", mode)
    assert wandb_mode("auto") == mode


def test_wrong_modes(no_mode: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="log_model=true needs W&B online"):
        wandb_logger(save_dir=str(tmp_path), name="x", mode="offline", log_model=True)
    no_mode.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE=sometimes"):
        wandb_mode("auto")


def test_csv_keeps_what_was_written_before_a_resume(cli, tmp_path: Path) -> None:
    quick = (*TINY, *SMALL_MAMBA, "logger=csv", "trainer.log_every_n_steps=1")
    assert cli("train", *quick).code == 0
    assert cli("train", *quick, "trainer.max_steps=12", "ckpt_path=last").code == 0
    first, second = (
        pl.read_csv(path) for path in sorted(tmp_path.glob("runs/*/*/csv/*/metrics.csv"))
    )
    assert first["train/loss"].drop_nulls().len() == 8
    assert second["train/loss"].drop_nulls().len() == 4
