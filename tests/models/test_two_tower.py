from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import lightning as L
import polars as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recsys_ssm.errors import UserError
from recsys_ssm.models.losses import BinaryCrossEntropy, InBatchSoftmax, MeanSquaredError
from recsys_ssm.models.two_tower import TwoTower

BACKBONE = {
    "_target_": "recsys_ssm.models.backbones.mamba.Mamba",
    "d_model": 16,
    "n_layers": 1,
    "d_conv": 2,
}
ADAM = {"_target_": "torch.optim.Adam", "lr": 3e-3}


def model_of(data, **options) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower.for_data(data, **{"backbone": BACKBONE, "optimizer": ADAM, **options})


def trainer_in(folder: Path, **options) -> L.Trainer:
    settings = {
        "max_steps": 60,
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        num_sanity_val_steps=0,
        **{**settings, **options},
    )


def test_a_score_is_the_inner_product_of_the_towers(tiny_data) -> None:
    model = model_of(tiny_data)
    splits = tiny_data.splits
    user, item = splits.users.rows(torch.arange(4)), splits.items.rows(torch.arange(4))
    expected = [model.user_tower(user)[i] @ model.item_tower(item)[i] for i in range(4)]
    torch.testing.assert_close(model(user, item), torch.stack(expected))


def test_the_last_token_stands_for_the_row_and_the_mean_without_mixing(tiny_data) -> None:
    features = tiny_data.splits.users
    tower = model_of(tiny_data).user_tower
    torch.testing.assert_close(
        tower(features), tower.head(tower.backbone(tower.tokenizer(features))[:, -1])
    )
    tower = model_of(
        tiny_data,
        backbone={"_target_": "recsys_ssm.models.backbones.identity.Identity", "d_model": 16},
    ).user_tower
    torch.testing.assert_close(tower(features), tower.head(tower.tokenizer(features).mean(1)))


TOKENIZERS = "recsys_ssm.models.tokenizers"
TABULAR = {
    "mambatab": {"_target_": f"{TOKENIZERS}.MambaTabTokenizer"},
    "mambular": {"_target_": f"{TOKENIZERS}.MambularTokenizer"},
    "periodic": {"_target_": f"{TOKENIZERS}.MambularTokenizer", "encoding": "periodic"},
}


@pytest.mark.parametrize("tokenizer", TABULAR)
@pytest.mark.parametrize(
    "backbone",
    [
        "mamba.Mamba",
        "mamba2.Mamba2",
        "hydra.Hydra",
        "transformer.Transformer",
        "ligr.Ligr",
        "matrrec.MaTrRec",
        "sigma.Sigma",
        "identity.Identity",
    ],
)
def test_every_backbone_takes_every_tokenizer_and_treats_each_row_by_itself(
    tiny_data, tokenizer: str, backbone: str
) -> None:
    spec = {"_target_": f"recsys_ssm.models.backbones.{backbone}", "d_model": 64}
    importlib.import_module(spec["_target_"].rpartition(".")[0])
    model = model_of(tiny_data, backbone=spec, tokenizer=TABULAR[tokenizer]).eval()
    users, tower = tiny_data.splits.users, model.user_tower
    together = tower(users)
    alone = torch.cat([tower(users.rows(slice(row, row + 1))) for row in range(users.n_rows)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    model(users.rows(slice(0, 4)), tiny_data.splits.items.rows(slice(0, 4))).sum().backward()
    for name, parameter in tower.tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # Its numbers matter, also after a round through a checkpoint's plain data.
    other = users._replace(numeric=users.numeric + 1)
    assert not torch.allclose(tower(other), together, atol=1e-6)


def test_the_published_mambatab_reads_the_rows_of_a_batch_as_one_sequence(tiny_data) -> None:
    spec = {**TABULAR["mambatab"], "published": True}
    with pytest.warns(UserWarning, match="depend on the other rows"):
        tower = model_of(tiny_data, tokenizer=spec).user_tower.eval()
    users = tiny_data.splits.users
    together = tower(users)
    tokens = tower.tokenizer(users)[:, 0]
    torch.testing.assert_close(together, tower.head(tower.backbone(tokens[None])[0]))
    first = users.rows(slice(0, 1))
    torch.testing.assert_close(tower(first), together[:1])
    last = users.rows(slice(-1, None))
    assert not torch.allclose(tower(last), together[-1:], atol=1e-5)


def test_the_tokenizer_decides_on_the_pooling(tiny_data) -> None:
    features = tiny_data.splits.users
    tower = model_of(tiny_data, tokenizer=TABULAR["mambular"]).user_tower
    tokens = tower.backbone(tower.tokenizer(features))
    assert tokens.shape[1] == 2  # a feature each, no CLS
    torch.testing.assert_close(tower(features), tower.head(tokens.mean(1)))


@pytest.mark.parametrize("tokenizer", TABULAR)
def test_new_tokenizers_learn_and_load_without_the_dataset(
    tiny_data, tmp_path: Path, tokenizer: str
) -> None:
    model = model_of(tiny_data, tokenizer=TABULAR[tokenizer])
    checkpoint = ModelCheckpoint(tmp_path, "last", monitor=None, save_last=True)
    trainer = trainer_in(tmp_path, callbacks=[checkpoint])
    before = tiny_loss(model, tiny_data)
    trainer.fit(model, datamodule=tiny_data)
    assert tiny_loss(model, tiny_data) < before - 0.05
    loaded = TwoTower.load_from_checkpoint(checkpoint.last_model_path, weights_only=True)
    model.eval()
    torch.testing.assert_close(loaded.predict(users_frame()), model.predict(users_frame()))


def tiny_loss(model: TwoTower, data) -> float:
    splits = data.splits
    user, item, target = splits.train
    with torch.no_grad():
        scores = model(splits.users.rows(user), splits.items.rows(item))
    return float((scores - target).square().mean())


def test_the_towers_share_no_parameter_and_start_apart(tiny_data) -> None:
    model = model_of(tiny_data)
    users = {id(p) for p in model.user_tower.parameters()}
    assert not users & {id(p) for p in model.item_tower.parameters()}
    a, b = (t.backbone.layers[0].mixer.in_proj.weight for t in (model.user_tower, model.item_tower))
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "loss",
    [
        MeanSquaredError(),
        BinaryCrossEntropy,
        InBatchSoftmax,
        InBatchSoftmax(logq=True, negatives=16),
    ],
)
def test_it_learns(tiny_data, tmp_path: Path, loss: str) -> None:
    model = model_of(tiny_data, loss=loss)
    before = model.predict(users_frame()).clone()
    trainer_in(tmp_path, max_steps=300, check_val_every_n_epoch=None, val_check_interval=100).fit(
        model, datamodule=tiny_data
    )
    [metrics] = trainer_in(tmp_path).test(model, datamodule=tiny_data, verbose=False)
    assert metrics["test/p@1"] == 1.0 and metrics["test/ndcg@5"] > 0.95
    assert (model.predict(users_frame()) - before).abs().max() > 0.01


def test_drawn_items_stand_after_those_of_the_pairs(tiny_data, monkeypatch) -> None:
    model = model_of(tiny_data, loss=InBatchSoftmax(logq=True, negatives=7))
    model.loss.set_item_counts(tiny_data.item_counts())
    given = []
    monkeypatch.setattr(
        model.loss, "forward", lambda *parts: given.append(parts) or torch.zeros(())
    )
    batch = next(iter(tiny_data.train_dataloader()))
    B, catalogue = batch.target.numel(), model.item_embeddings()
    for training in (True, False):
        model.train(training)
        model._loss(batch)
        user, item, target, index = given.pop()
        assert len(user) == len(target) == B
        assert len(item) == len(index) == B + 7 * training
        assert torch.equal(index[:B], batch.item_index)
        torch.testing.assert_close(item, catalogue[index])
    torch.manual_seed(0)
    model.train()
    for _ in range(50):
        model._loss(batch)
    drawn = torch.cat([index[B:] for *_, index in given])
    assert set(drawn.tolist()) == set(range(len(model.item_ids)))


def users_frame() -> pl.DataFrame:
    return pl.DataFrame(
        {"age": [0.0, 1.0, 30.0, None], "colour": ["red", "blue", "never seen", None]}
    )


def test_the_published_optimizer_spec_is_used(tiny_data) -> None:
    optimizer = model_of(
        tiny_data, optimizer={"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": 0.1}
    ).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.5 and optimizer.defaults["momentum"] == 0.1
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model_of(tiny_data).parameters()
    )


def test_a_checkpoint_is_complete_in_itself(tiny_data, tmp_path: Path) -> None:
    model = model_of(tiny_data, head={"output": 8}, loss=BinaryCrossEntropy)
    trainer = trainer_in(tmp_path, max_steps=5, enable_checkpointing=False)
    trainer.fit(model, datamodule=tiny_data)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    users_frame().write_parquet(tmp_path / "users.parquet")
    # Another process, in an empty folder, that never imports Hydra or the data's files.
    code = (
        "import sys, torch, polars as pl; from recsys_ssm.models.two_tower import TwoTower\n"
        f"model = TwoTower.load_from_checkpoint({str(path)!r}, weights_only=True)\n"
        f"scores = model.predict(pl.read_parquet({str(tmp_path / 'users.parquet')!r}))\n"
        "assert 'hydra' not in sys.modules and 'recsys_ssm.data.base' not in sys.modules\n"
        f"torch.save(scores, {str(tmp_path / 'scores.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    scores = torch.load(tmp_path / "scores.pt", weights_only=True)
    torch.testing.assert_close(scores, model.predict(users_frame()))
    loaded = TwoTower.load_from_checkpoint(path, weights_only=True)
    assert loaded.user_schema == model.user_schema and loaded.item_ids == model.item_ids


def test_a_checkpoint_cannot_make_us_import_code(tiny_data, tmp_path: Path) -> None:
    hostile = {"_target_": "antigravity.fly"}
    with pytest.raises(UserError, match="antigravity is not imported"):
        model_of(tiny_data, backbone=hostile)
    assert "antigravity" not in sys.modules


def test_predict_scores_new_items(tiny_data) -> None:
    model = model_of(tiny_data)
    items = pl.DataFrame({"price": [1.0, 99.0], "colour": ["red", "new"]})
    scores = model.predict(users_frame(), items)
    assert scores.shape == (4, 2)
    torch.testing.assert_close(scores[:, 0], model.predict(users_frame())[:, 0])


def test_recommend(tiny_data) -> None:
    model = model_of(tiny_data)
    scores = model.predict(users_frame())
    top = model.recommend(users_frame(), k=3)
    assert top.columns == ["user", "rank", "item", "score"] and top.height == 12
    first = top.filter(pl.col("rank") == 1)["item"].to_list()
    assert first == [f"i{i}" for i in scores.argmax(1).tolist()]
    exclude = torch.zeros(4, 6, dtype=torch.bool)
    exclude[0, :5] = True
    assert model.recommend(users_frame(), k=3, exclude=exclude).filter(pl.col("user") == 0)[
        "item"
    ].to_list() == ["i5"]
    with pytest.raises(UserError, match=r"exclude is \(3, 6\): expected 4 users by 6 items"):
        model.recommend(users_frame(), k=3, exclude=exclude[:3])


def test_predict_leaves_the_mode_alone_and_ignores_dropout(tiny_data) -> None:
    model = model_of(tiny_data, backbone={**BACKBONE, "dropout": 0.5}).train()
    torch.testing.assert_close(model.predict(users_frame()), model.predict(users_frame()))
    assert model.training


def test_encoding_in_blocks_changes_nothing(tiny_data, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tiny_data)
    whole = model.user_tower.encode(tiny_data.splits.users)
    monkeypatch.setattr("recsys_ssm.models.two_tower.ENCODE_ROWS", 5)
    torch.testing.assert_close(model.user_tower.encode(tiny_data.splits.users), whole)


def test_seen_items_are_not_ranked(tiny_data, tmp_path: Path) -> None:
    splits = tiny_data.splits
    seen_all_relevant = copy.copy(splits.test_ranking)
    object.__setattr__(seen_all_relevant, "seen", splits.test_ranking.relevant)
    splits.test_ranking = seen_all_relevant
    [metrics] = trainer_in(tmp_path).test(model_of(tiny_data), datamodule=tiny_data, verbose=False)
    assert metrics["test/hr@5"] == 0.0


def test_killed_in_the_middle_and_resumed_is_as_if_never_killed(tiny_data, tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> TwoTower:
        model = model_of(tiny_data)
        keep = ModelCheckpoint(
            tmp_path,
            "step{step}",
            every_n_train_steps=13,
            save_top_k=-1,
            auto_insert_metric_name=False,
        )
        trainer = trainer_in(tmp_path, max_steps=25, limit_val_batches=0, callbacks=[keep])
        data = type(tiny_data)(
            name="tiny", batch_size=8
        )  # 9 batches an epoch: 13 is in the middle of the second
        trainer.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True)
        return model

    whole, resumed = run(), run(tmp_path / "step13.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_keeps_the_recurrence_and_the_metrics_exact(tiny_data, tmp_path: Path) -> None:
    model = model_of(tiny_data)
    trainer = trainer_in(tmp_path, max_steps=10, precision="bf16-mixed", enable_checkpointing=False)
    trainer.fit(model, datamodule=tiny_data)
    assert model.user_tower.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": {"_target_": "torch.optim.Adam"}}, "not a PairLoss"),
        ({"loss": 3}, "loss: int has no spec"),
        ({"head": {"hiden": 3}}, "head.hiden: no such option; did you mean 'hidden'"),
        (
            {"tokenizer": {"init": "zeros"}},
            "tokenizer.init='zeros': expected one of normal, uniform",
        ),
        (
            {"backbone": {**BACKBONE, "d_modle": 3}},
            "backbone.d_modle: no such option; did you mean 'd_model'",
        ),
        (
            {"backbone": {**BACKBONE, "d_model": "big"}},
            "backbone.d_model='big': expected int, got str",
        ),
        ({"backbone": {"_target_": "torch.optim.Adam"}}, "not a Backbone"),
        ({"tokenizer": {"d_model": 5}}, "tokenizer.d_model=5, backbone.d_model=16"),
        ({"metrics": ["hits@5"]}, "hits@5"),
    ],
)
def test_wrong_options_are_told_in_one_line(tiny_data, options: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        model_of(tiny_data, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_predict_names_what_is_missing(tiny_data) -> None:
    with pytest.raises(UserError, match="users: no column 'colour'"):
        model_of(tiny_data).predict(pl.DataFrame({"age": [1.0]}))


def test_no_user_gives_no_score(tiny_data) -> None:
    assert model_of(tiny_data).predict(users_frame().clear()).shape == (0, 6)


def test_a_model_without_the_items_features_is_refused_before_any_use(
    tiny_data, tmp_path: Path
) -> None:
    arguments = TwoTower.arguments_from(tiny_data)
    items = arguments.pop("items")
    model = TwoTower(**arguments, backbone=BACKBONE, optimizer=ADAM)
    message = r"TwoTower has an item_schema with features but no items; pass items="
    with pytest.raises(UserError, match=message):
        trainer_in(tmp_path).fit(model, datamodule=tiny_data)
    with pytest.raises(UserError, match=message):
        model.item_embeddings()

    with pytest.raises(UserError, match=r"items has .*; pass \d+ and \d+ columns for the"):
        TwoTower(**arguments, items=items.rows(slice(0, 2)), backbone=BACKBONE)

    trainer = trainer_in(tmp_path, max_steps=2)
    whole = TwoTower(**arguments, items=items, backbone=BACKBONE, optimizer=ADAM)
    trainer.fit(whole, datamodule=tiny_data)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    again = TwoTower.load_from_checkpoint(tmp_path / "whole.ckpt")
    whole.eval()
    torch.testing.assert_close(again.item_embeddings(), whole.item_embeddings())
    model.load_state_dict(whole.state_dict())
    torch.testing.assert_close(model.item_embeddings(), whole.item_embeddings())
