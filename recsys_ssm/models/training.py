"""Train and test a model from Python, without Hydra.

The training command does the same with a config, a logger and a run folder.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint


class StepSeed(L.Callback):
    """Derive the random numbers of a step (dropout, negatives) from the seed and the step alone.

    So a run that was stopped and resumed draws the same numbers as one that was not; each process draws its own.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        entropy = (self.seed, trainer.global_rank, trainer.fit_loop.epoch_loop.total_batch_idx)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out messages about devices, tips and deprecations that a caller cannot act upon."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
            yield
    finally:
        logger.setLevel(level)


def fit(
    model: L.LightningModule,
    data: L.LightningDataModule,
    *,
    max_epochs: int | None = 100,
    monitor: str = "val/ndcg@10",
    patience: int | None = 10,
    seed: int = 0,
    **trainer: Any,
) -> L.Trainer:
    """Train a model, keep the best validation and load it.

    Args:
        model: A recommender.
        data: The dataset it was built for.
        max_epochs: Epochs at most.
        monitor: Validation metric that decides which state is best (the largest).
        patience: Stop after so many validations without a better one; None: never.
        seed: Seed of the dropout and of the negatives.
        trainer: Other arguments of :class:`lightning.Trainer`; without ``max_steps`` validation runs once an epoch.

    Returns:
        The trainer.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        best = ModelCheckpoint(folder, "best", monitor, mode="max", auto_insert_metric_name=False)
        stop = [] if patience is None else [EarlyStopping(monitor, patience=patience, mode="max")]
        options = {
            "max_epochs": max_epochs,
            "logger": False,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "log_every_n_steps": 10,
            **trainer,
        }
        callbacks = [StepSeed(seed), best, *stop, *options.pop("callbacks", [])]
        runner = L.Trainer(callbacks=callbacks, **options)
        runner.fit(model, datamodule=data)
        if Path(best.best_model_path).is_file():
            state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["state_dict"])
    model.eval()
    return runner


def evaluate(model: Any, data: L.LightningDataModule, **trainer: Any) -> dict[str, float]:
    """Test a model on a dataset's test users.

    Args:
        model: A recommender.
        data: The dataset it was trained on.
        trainer: Arguments of :class:`lightning.Trainer`.

    Returns:
        Metrics by name, as ``{"hr@10": 0.1}``.
    """
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with _quiet():
        L.Trainer(**{**options, "enable_checkpointing": False, **trainer}).test(
            model, datamodule=data, verbose=False
        )
    model.eval()
    return dict(model.test_results()["metrics"])
