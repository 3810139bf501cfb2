"""DataModules are pickled for the processes of ddp_spawn, and their batches converted to a trainer's precision."""

from __future__ import annotations

import pickle

import lightning as L
import polars as pl
import pytest
import torch
from events import frame

from recsys_ssm.batches import Ragged
from recsys_ssm.data.hm import HmData
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.data.shop import GeneratedShop
from recsys_ssm.data.spotify import SpotifyData
from recsys_ssm.data.table import TableData
from recsys_ssm.data.vaccine import VaccineData
from recsys_ssm.models.next_item import NextItem

MANY = pl.concat([frame().with_columns(pl.col("user_id") + str(i)) for i in range(20)])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


def generated_hm(folder):
    generator = {"n_customers": 2000, "n_transactions": 20_000}
    return HmData(name="hm", root=folder, source="generated", generator=generator)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: Interactions(interactions=MANY),
        lambda _: GeneratedShop(),
        lambda _: TableData(interactions=MANY),
        lambda _: SpotifyData(name="spotify", n_train=500),
        lambda _: VaccineData(name="vaccine", n_users=500, n_train=500),
        generated_hm,
    ],
    ids=["interactions", "shop", "table", "spotify", "vaccine", "hm"],
)
def test_a_prepared_dataset_can_be_pickled(tmp_path, make):
    data = make(tmp_path / "files")
    before = data.baseline_metrics(["hr@10"])
    again = pickle.loads(pickle.dumps(data))
    assert again.identity() == data.identity()
    assert again.baseline_metrics(["hr@10"]) == before


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_next_items_train_at_a_true_precision(precision):
    data = Interactions(interactions=MANY, max_length=8, batch_positions=64)
    spec = {"_target_": "recsys_ssm.models.backbones.mamba.Mamba", "d_model": 16, "n_layers": 1}
    model = NextItem.for_data(data, backbone=spec)
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    assert 0 <= found["test/hr@10"] <= 1


def test_ragged_lists_are_a_tuple():
    ragged = Ragged(torch.tensor([1, 2]), torch.tensor([0, 1, 2]))
    assert isinstance(ragged, tuple) and ragged.lengths.tolist() == [1, 1]
