"""Check Lightning's learning-rate and batch-size finders on both models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import polars as pl
import pytest
import torch
from lightning.pytorch.tuner import Tuner

from recsys_ssm import Interactions, Mamba, NextItem, TableData, TwoTower

EVENTS = pl.DataFrame(
    {
        "user_id": [u for u in range(300) for _ in range(6)],
        "item_id": [(u + i) % 12 for u in range(300) for i in range(6)],
        "timestamp": [i for _ in range(300) for i in range(6)],
    }
)


def tuner(folder: Path) -> Tuner:
    return Tuner(
        L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )
    )  # fmt: skip


def next_item() -> tuple[Any, Any, str]:
    data = Interactions(interactions=EVENTS, max_length=8, batch_positions=16)
    return NextItem.for_data(data, backbone=Mamba(d_model=16, n_layers=1)), data, "batch_positions"


def two_tower() -> tuple[Any, Any, str]:
    data = TableData(interactions=EVENTS.select("user_id", "item_id"))
    return TwoTower.for_data(data, backbone=Mamba(d_model=16, n_layers=1)), data, "batch_size"


@pytest.mark.parametrize("made", [next_item, two_tower])
def test_both_finders(made: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data, size = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tuner(tmp_path).lr_find(model, datamodule=data, update_attr=True, num_training=40)
    assert found is not None
    rate = found.suggestion()
    assert rate == model.lr == model.configure_optimizers().param_groups[0]["lr"]
    assert model.hparams["optimizer"]["lr"] == rate not in (1e-3, 1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    largest = tuner(tmp_path).scale_batch_size(
        model, datamodule=data, batch_arg_name=size, init_val=16, max_trials=3, steps_per_trial=2
    )
    assert largest == getattr(data, size) == 64


def test_a_rate_that_the_optimizer_has_by_default() -> None:
    data = Interactions(interactions=EVENTS)
    model = NextItem.for_data(
        data, backbone=Mamba(d_model=16, n_layers=1), optimizer=torch.optim.SGD
    )
    assert model.lr == 1e-3
    model.lr = 0.5
    assert model.configure_optimizers().param_groups[0]["lr"] == 0.5
