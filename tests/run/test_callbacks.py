from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from recsys_ssm.run.callbacks import History, Progress


def trainer_at(step: int, **more: object) -> SimpleNamespace:
    metrics = {
        "train/loss": torch.tensor(1.0 / (step + 1)),
        "val/ndcg@10": torch.tensor(0.25),
        "lr": torch.tensor(0.1),
    }
    return SimpleNamespace(
        global_step=step,
        callback_metrics=metrics,
        sanity_checking=False,
        estimated_stepping_batches=10,
        **more,
    )


def test_history_keeps_losses_and_validations_and_travels_in_a_checkpoint() -> None:
    history = History(every_n_steps=5)
    for step in range(1, 11):
        history.on_train_batch_end(trainer_at(step), None, None, None, 0)
    history.on_validation_end(trainer_at(10), None)
    assert [record["step"] for record in history.records] == [1, 5, 10, 10]
    assert history.records[1] == {"step": 5, "train/loss": pytest.approx(1 / 6)}
    assert history.records[-1] == {"step": 10, "val/ndcg@10": 0.25}
    other = History()
    other.load_state_dict(history.state_dict())
    assert other.records == history.records


def test_history_leaves_the_sanity_check_out() -> None:
    history = History()
    trainer = trainer_at(0)
    trainer.sanity_checking = True
    history.on_validation_end(trainer, None)
    assert history.records == []


def test_progress_without_a_terminal_is_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    now = iter(float(second) for second in range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = Progress(monitor="val/ndcg@10", every_s=4.0)
    progress.on_train_start(trainer_at(0), None)
    for step in range(1, 10):
        progress.on_train_batch_end(trainer_at(step), None, None, None, 0)
    progress.on_train_end(trainer_at(10), None)
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 4
    assert "of 10" in lines[0] and "min left" in lines[0] and "val/ndcg@10 0.2500" in lines[0]
    assert lines[-1].startswith("step 10 of 10") and "left" not in lines[-1]


def test_the_last_step_is_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed training had it twice: at its last batch and at its end."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    progress = Progress(monitor="val/ndcg@10", every_s=0.0)
    progress.on_train_start(trainer_at(9), None)
    progress.on_train_batch_end(trainer_at(10), None, None, None, 0)
    progress.on_train_end(trainer_at(10), None)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("step 10 of 10")


def test_progress_on_a_terminal_is_one_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(monitor="val/ndcg@10")
    progress.on_train_start(trainer_at(0), None)
    for step in range(1, 11):
        progress.on_train_batch_end(trainer_at(step), None, None, None, 0)
    progress.on_train_end(trainer_at(10), None)
    assert "10/10" in capsys.readouterr().err


def test_a_disabled_progress_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress(monitor="val/loss", every_s=0.0)
    progress.disable()
    progress.on_train_start(trainer_at(0), None)
    progress.on_train_batch_end(trainer_at(1), None, None, None, 0)
    progress.on_train_end(trainer_at(1), None)
    assert not caplog.records
