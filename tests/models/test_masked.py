"""Test the masked objective: items are hidden and predicted from both sides, and a mask stands for the next item."""

from __future__ import annotations

import random
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from recsys_ssm.batches import MASK
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.data.sequences import Histories, HistoryLoader
from recsys_ssm.errors import UserError
from recsys_ssm.models.backbones.hydra import Hydra
from recsys_ssm.models.backbones.mamba import Mamba
from recsys_ssm.models.backbones.matrrec import MaTrRec
from recsys_ssm.models.backbones.sigma import Sigma
from recsys_ssm.models.backbones.transformer import Transformer
from recsys_ssm.models.next_item import NextItem, mask_items
from recsys_ssm.models.tokenizers import ItemTokenizer
from recsys_ssm.models.training import StepSeed

BIDIRECTIONAL = {
    "bert4rec": {
        "_target_": f"{Transformer.__module__}.Transformer",
        "d_model": 16,
        "n_layers": 2,
        "dim_feedforward": 32,
    },
    "hydra": {
        "_target_": f"{Hydra.__module__}.Hydra",
        "d_model": 16,
        "n_layers": 1,
        "d_state": 8,
        "headdim": 16,
    },
    "sigma": {
        "_target_": f"{Sigma.__module__}.Sigma",
        "d_model": 16,
        "init": "own",
        "dropout": 0.0,
    },
}
N_ITEMS = 12


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Every history walks round the circle of items: what comes next is certain."""
    generator = random.Random(0)
    lines = []
    for user in range(60):
        start, length = generator.randrange(N_ITEMS), generator.randrange(5, 11)
        lines.append(f"u{user} " + " ".join(f"i{(start + t) % N_ITEMS:02}" for t in range(length)))
    path = tmp_path / "circle.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def data_of(file: Path, **options) -> Interactions:
    return Interactions(
        **{
            "interactions": str(file),
            "cache_dir": str(file.parent / "cache"),
            "max_length": 8,
            "batch_positions": 64,
            "objective": "masked",
            **options,
        }
    )


def model_of(data: Interactions, backbone: str = "hydra", **options) -> NextItem:
    torch.manual_seed(0)
    adam = {"_target_": "torch.optim.Adam", "lr": 1e-2}
    positions = "max_length" if backbone == "bert4rec" else 0
    plain = {"norm": backbone == "bert4rec", "dropout": 0.0, "positions": positions}
    options["tokenizer"] = plain | options.get("tokenizer", {})
    return NextItem.for_data(
        data, **{"backbone": BIDIRECTIONAL[backbone], "optimizer": adam, **options}
    )


def trainer_of(folder: Path, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )


@pytest.mark.parametrize("backbone", BIDIRECTIONAL)
def test_it_learns_what_is_hidden_and_recommends_what_follows(
    file: Path, tmp_path: Path, backbone: str
) -> None:
    data = data_of(file)
    model = model_of(data, backbone)
    epochs = 150 if backbone == "bert4rec" else 50  # it learns positions first
    options = {"max_epochs": epochs, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = trainer_of(tmp_path, **options)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    assert model.test_results()["metrics"]["hr@1"] > 0.95
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = NextItem.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    found = loaded.recommend([["i03", "i04"], ["i08", "unknown", "i09", "i10"]], k=3)
    assert found.filter(rank=1)["item"].to_list() == ["i05", "i11"]


def test_recommendations_are_those_of_the_test(file: Path) -> None:
    """The mask is appended in both; a history longer than the model sees loses its first items."""
    data = data_of(file, max_length=5)
    model = model_of(data, "bert4rec").eval()
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        everything, _ = model.top(batch, 4)
    histories = [
        [data.splits.item_ids[i] for i in batch.seen.values[start:stop]]
        for start, stop in zip(batch.seen.offsets[:-1], batch.seen.offsets[1:], strict=True)
    ]
    found = model.recommend(histories, k=4, filter_seen=False)["item"].to_list()
    assert found == [data.splits.item_ids[i] for i in everything.flatten()]


@pytest.mark.parametrize("backbone", BIDIRECTIONAL)
def test_no_score_depends_on_a_target(file: Path, backbone: str) -> None:
    """Change the held-out events, and the items under a mask: no query moves."""
    data = data_of(file)
    model = model_of(data, backbone).double().eval()
    events, offsets = data.splits.histories
    for held_out in (data.splits.val, data.splits.test):
        changed = events.copy()
        changed[held_out.event] = (changed[held_out.event] + 5) % N_ITEMS

        def query(events, held_out=held_out) -> torch.Tensor:
            loader = HistoryLoader(
                Histories(events, offsets),
                held_out,
                max_length=8,
                row_length=8,
                batch_size=100,
                masked=True,
            )
            batch = next(iter(loader))
            with torch.no_grad():
                return model(batch.item, batch.seq_idx, batch.position, batch.last)

        assert torch.equal(query(events), query(changed))

    batch = next(iter(data.train_dataloader()))
    torch.manual_seed(1)
    item, target = mask_items(batch.item, batch.seq_idx, 0.3)
    torch.manual_seed(1)
    other = torch.where(item == MASK, (batch.item + 5) % N_ITEMS, batch.item)
    again, other_target = mask_items(other, batch.seq_idx, 0.3)
    assert not torch.equal(target, other_target)
    assert torch.equal(item, again)
    with torch.no_grad():
        one, two = (model(x, batch.seq_idx, batch.position) for x in (item, again))
    assert torch.equal(one, two)


def test_masked_positions_see_both_sides_and_the_loss_is_theirs_alone(file: Path) -> None:
    data = data_of(file)
    model = model_of(data, "bert4rec").double().train()
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = next(iter(data.train_dataloader()))
    torch.manual_seed(4)
    loss = model.training_step(batch, 0)
    torch.manual_seed(4)
    item, target = mask_items(batch.item, batch.seq_idx, 0.2)
    where = item == MASK
    assert torch.equal(target[where], batch.item[where]) and (target[~where] == -1).all()
    x = model(item, batch.seq_idx, batch.position)[where]
    expected = F.cross_entropy(x @ model.tokenizer.embedding.weight[1:].T, batch.item[where])
    torch.testing.assert_close(loss, expected)


def test_a_share_is_hidden_and_at_least_the_last_of_each_sequence() -> None:
    torch.manual_seed(0)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5 + [2] + [-1] * 2]).repeat(2000, 1)
    items = torch.arange(12).repeat(2000, 1).masked_fill(seq_idx < 0, -1)
    item, target = mask_items(items, seq_idx, 0.2)
    hidden = item == MASK
    assert torch.equal(target.where(hidden, items), items) and (target[~hidden] == -1).all()
    assert torch.equal(item.where(~hidden, items), items)
    assert not hidden[:, 10:].any()
    for start, stop in ((0, 4), (4, 9), (9, 10)):
        share = hidden[:, start:stop].double().mean(0)
        alone = 0.8 ** (stop - start)  # no item of the sequence is drawn
        assert hidden[:, start:stop].any(1).all()
        for t, found in enumerate(share.tolist()):
            last = start + t == stop - 1
            assert found == pytest.approx(0.2 + (alone if last else 0.0), abs=0.035)
    only = hidden[:, 4:9].sum(1) == 1
    assert (hidden[only][:, 8].double().mean() > 0.5).item()


@pytest.mark.parametrize("causal", [Mamba, MaTrRec])
def test_a_causal_backbone_is_refused(file: Path, causal: type) -> None:
    with pytest.raises(UserError, match="is causal and does not see what follows") as error:
        NextItem.for_data(data_of(file), backbone=causal(d_model=16))
    assert "\n" not in str(error.value) and "dataset.objective=all" in str(error.value)


def test_model_and_dataset_have_the_same_objective(file: Path, tmp_path: Path) -> None:
    for model, other in [
        (model_of(data_of(file)), data_of(file, objective="last")),
        (model_of(data_of(file, objective="last")), data_of(file)),
    ]:
        trainer = trainer_of(tmp_path, max_steps=1)
        with pytest.raises(UserError, match=r"the model is for dataset\.objective="):
            trainer.test(model, datamodule=other, verbose=False)


def test_options_are_checked(file: Path) -> None:
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match=f"model.mask_share={share}"):
            model_of(data_of(file), mask_share=share)
    with pytest.raises(UserError, match=r"model\.skip=0\.5: with dataset\.objective=masked"):
        model_of(data_of(file), skip=0.5)


def test_the_mask_has_a_row_only_where_the_objective_is_masked(file: Path) -> None:
    masked, last = model_of(data_of(file)), model_of(data_of(file, objective="last"))
    assert masked.state_dict().keys() - last.state_dict().keys() == {"tokenizer.mask"}
    assert masked.tokenizer.embedding.weight.shape == last.tokenizer.embedding.weight.shape
    own, other = masked.parameter_counts(), last.parameter_counts()
    assert own["without_embeddings"] == other["without_embeddings"]
    assert own["total"] == other["total"] + 16


def test_the_mask_is_a_token_of_its_own() -> None:
    tokenizer = ItemTokenizer(n_items=3, d_model=4, mask=True, norm=False, dropout=0.0)
    tokens = tokenizer(torch.tensor([[0, MASK, 2, -1]]), torch.arange(4)[None])
    expected = [*tokenizer.embedding.weight[[1]], tokenizer.mask, tokenizer.embedding.weight[3]]
    torch.testing.assert_close(tokens[0], torch.stack([*expected, torch.zeros(4)]))


def test_killed_in_the_middle_and_resumed_is_as_if_never_killed(file: Path, tmp_path: Path) -> None:
    """Masks are random: a step's masks follow from the seed and the step."""

    def run(ckpt: Path | None = None, seed: int = 3) -> NextItem:
        data = data_of(file)
        model = model_of(data, tokenizer={"dropout": 0.3})
        keep = ModelCheckpoint(
            tmp_path / str(seed),
            "step{step}",
            every_n_train_steps=7,
            save_top_k=-1,
            auto_insert_metric_name=False,
        )
        trainer = trainer_of(
            tmp_path, max_steps=15, limit_val_batches=0, callbacks=[StepSeed(seed), keep]
        )
        torch.manual_seed(ckpt is None)  # a new process begins with other numbers
        trainer.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True)
        return model

    whole, resumed, other = run(), run(tmp_path / "3" / "step7.ckpt"), run(seed=4)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(whole.tokenizer.mask, other.tokenizer.mask)
