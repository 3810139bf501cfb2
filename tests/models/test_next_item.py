"""The next-item model: what it sees, what it is trained on, what it recommends."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from recsys_ssm.batches import SequenceBatch
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.errors import UserError
from recsys_ssm.metrics import per_user, rank_top_k
from recsys_ssm.models.next_item import NextItem, later_targets, positions_from_end
from recsys_ssm.models.training import StepSeed

BACKBONES = "recsys_ssm.models.backbones"
CAUSAL = {
    "mamba": {"_target_": f"{BACKBONES}.mamba.Mamba", "d_model": 16, "n_layers": 1, "d_conv": 4},
    "mamba2": {
        "_target_": f"{BACKBONES}.mamba2.Mamba2",
        "d_model": 16,
        "n_layers": 2,
        "d_state": 8,
        "headdim": 8,
        "residual": True,
        "norm": "pre",
        "ffn": 2,
    },
    "transformer": {
        "_target_": f"{BACKBONES}.transformer.Transformer",
        "d_model": 16,
        "n_layers": 2,
        "dim_feedforward": 32,
        "causal": True,
    },
}
HYDRA = {
    "_target_": f"{BACKBONES}.hydra.Hydra",
    "d_model": 16,
    "n_layers": 1,
    "d_state": 8,
    "headdim": 16,
}
N_ITEMS = 12


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Every history walks round the circle of items: what comes next is certain."""
    generator = random.Random(0)
    lines = []
    for user in range(60):
        start, length = generator.randrange(N_ITEMS), generator.randrange(4, 10)
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
            **options,
        }
    )


def model_of(data: Interactions, backbone="mamba2", **options) -> NextItem:
    torch.manual_seed(0)
    spec = CAUSAL[backbone] if isinstance(backbone, str) else backbone
    adam = {"_target_": "torch.optim.Adam", "lr": 1e-2}
    plain = {"norm": False, "dropout": 0.0}
    options["tokenizer"] = plain | options.get("tokenizer", {})
    return NextItem.for_data(data, **{"backbone": spec, "optimizer": adam, **options})


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


def fit(model: NextItem, data: Interactions, folder: Path, epochs: int = 12) -> L.Trainer:
    trainer = trainer_of(folder, max_epochs=epochs, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    return trainer


@pytest.mark.parametrize("backbone", CAUSAL)
def test_it_learns_what_always_follows(file: Path, tmp_path: Path, backbone: str) -> None:
    data = data_of(file)
    model = model_of(data, backbone)
    trainer = fit(model, data, tmp_path)
    trainer.test(model, datamodule=data, verbose=False)
    results = model.test_results()
    assert results["metrics"]["hr@1"] > 0.95
    assert results["metrics_unfiltered"]["hr@1"] > 0.95


def test_hydra_learns_from_the_last_position(file: Path, tmp_path: Path) -> None:
    data = data_of(file, objective="last")
    model = model_of(data, HYDRA)
    trainer = fit(model, data, tmp_path)
    trainer.test(model, datamodule=data, verbose=False)
    assert model.test_results()["metrics"]["hr@1"] > 0.95


def test_a_backbone_that_sees_the_future_is_refused(file: Path) -> None:
    blind = dict(CAUSAL["transformer"], causal=False)
    for backbone in (HYDRA, blind):
        with pytest.raises(UserError, match="sees the whole history") as error:
            model_of(data_of(file), backbone)
        assert "dataset.objective=last" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("backbone", CAUSAL)
@pytest.mark.parametrize("parts", [{}, {"loss": {"kind": "gbce"}}, {"head": {"temperature": 0.1}}])
def test_no_loss_of_a_position_depends_on_later_items(file: Path, backbone: str, parts) -> None:
    """Packed rows: two histories each; an item changes, no output before it or in the other history does."""
    data = data_of(file)
    model = model_of(data, backbone, **parts).double().eval()
    item = torch.randint(N_ITEMS, (2, 8))
    seq_idx = torch.tensor([[0] * 3 + [1] * 5, [0] * 6 + [-1] * 2])
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0]])
    item[seq_idx < 0] = -1

    def query(item: torch.Tensor) -> torch.Tensor:
        return model.head.query(model(item, seq_idx, position))

    with torch.no_grad():
        before = query(item)
        for row, place in ((0, 2), (0, 5), (1, 4)):
            changed = item.clone()
            changed[row, place] = (item[row, place] + 1) % N_ITEMS
            after = query(changed)
            same = (seq_idx != seq_idx[row, place]) | (position < position[row, place])
            same[1 - row] = True
            same &= seq_idx >= 0
            torch.testing.assert_close(after[same], before[same], rtol=0, atol=1e-12)
            assert not torch.allclose(after[row, place], before[row, place])


@pytest.mark.parametrize("objective", ["all", "last"])
@pytest.mark.parametrize("backbone", CAUSAL)
def test_the_loss_is_that_of_each_history_by_itself(
    file: Path, objective: str, backbone: str
) -> None:
    """Packed or one at a time: the same positions, the same targets, nothing of padding."""
    data = data_of(file, objective=objective)
    model = model_of(data, backbone).double().eval()
    batch = next(iter(data.train_dataloader()))
    loss, n_targets = model._loss(batch)
    losses = []
    weight = model.tokenizer.embedding.weight[1:]
    for row in range(batch.item.shape[0]):
        for number in range(int(batch.seq_idx[row].max()) + 1):
            own = batch.seq_idx[row] == number
            length = int(own.sum())
            x_LD = model(batch.item[row, own][None], None, torch.arange(length)[None])[0]
            target = batch.target[row, own]
            losses += [
                F.cross_entropy(x_LD[t] @ weight.T, target[t])
                for t in range(length)
                if target[t] >= 0
            ]
    assert len(losses) == n_targets
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_targets_are_the_next_items(file: Path) -> None:
    """The circle says what follows each item; the held-out ones are never a training target."""
    data = data_of(file)
    for batch in data.train_dataloader():
        real = batch.target >= 0
        assert torch.equal(batch.target[real], (batch.item[real] + 1) % N_ITEMS)
    loader = data.test_dataloader()
    for batch in loader:
        assert torch.equal(batch.target, (batch.item.flatten()[batch.last] + 1) % N_ITEMS)


def test_the_test_ranks_all_items_with_and_without_the_seen_ones(
    file: Path, tmp_path: Path
) -> None:
    data = data_of(file)
    model = model_of(data)
    trainer_of(tmp_path).test(model, datamodule=data, verbose=False)
    results = model.test_results()
    histories = {}
    for line in file.read_text().splitlines():
        user, *items = line.split()
        histories[user] = [int(item[1:]) for item in items]
    model.eval()
    found = {True: [], False: []}
    for row, user in enumerate(data.splits.user_ids):
        *history, target = histories[user]
        latest = torch.tensor(history[-8:])[None]
        with torch.no_grad():
            x_D = model(latest, None, torch.arange(latest.shape[1])[None])[0, -1]
        scores = (x_D @ model.tokenizer.embedding.weight[1:].T)[None]
        for filtered in (True, False):
            seen = torch.zeros(1, N_ITEMS, dtype=torch.bool)
            if filtered:
                seen[0, history] = True
                seen[0, target] = False
            top = rank_top_k(scores, 10, seen)
            found[filtered].append(per_user(top, torch.tensor([target]), ["ndcg@10"])["ndcg@10"])
            if filtered:
                kept = model.test_rankings.frame().row(row, named=True)
                assert kept["recommended"][:5] == [i for i in top[0].tolist() if i >= 0][:5]
                assert kept["relevant"] == [target]
    for filtered, name in ((True, "metrics"), (False, "metrics_unfiltered")):
        expected = torch.cat(found[filtered]).mean().item()
        assert results[name]["ndcg@10"] == pytest.approx(expected, abs=1e-6)
    assert results["metrics"]["ndcg@10"] != results["metrics_unfiltered"]["ndcg@10"]


def test_a_second_test_begins_anew(file: Path, tmp_path: Path) -> None:
    data = data_of(file)
    model, trainer = model_of(data), trainer_of(tmp_path)
    trainer.test(model, datamodule=data, verbose=False)
    before = model.test_results()
    trainer.test(model, datamodule=data, verbose=False)
    assert model.test_results() == before
    assert model.test_rankings.frame().height == 60


@pytest.mark.parametrize("loss", [{}, {"kind": "sampled_softmax", "negatives": 5}])
def test_killed_in_the_middle_and_resumed_is_as_if_never_killed(
    file: Path, tmp_path: Path, loss
) -> None:
    """Dropout and negatives are random: a step's random numbers follow from the seed and the step."""
    options = {"loss": loss, "tokenizer": {"dropout": 0.3}}

    def run(ckpt: Path | None = None) -> NextItem:
        data = data_of(file)
        model = model_of(data, **options)
        keep = ModelCheckpoint(
            tmp_path,
            "step{step}",
            every_n_train_steps=7,
            save_top_k=-1,
            auto_insert_metric_name=False,
        )
        callbacks = [StepSeed(3), keep]
        trainer = trainer_of(tmp_path, max_steps=15, limit_val_batches=0, callbacks=callbacks)
        torch.manual_seed(ckpt is None)  # a new process begins with other numbers
        trainer.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True)
        assert len(data.train_dataloader()) == 3  # 7 is in the middle of the third epoch
        return model

    whole, resumed = run(), run(tmp_path / "step7.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("packed", [True, False])
def test_positions_from_the_end_are_counted_in_each_history(packed: bool) -> None:
    if not packed:
        item = torch.zeros(2, 4, dtype=torch.long)
        assert positions_from_end(item, None).tolist() == [[3, 2, 1, 0]] * 2
        return
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [0, 1, 2, 2, 2, 2, 2]])
    found = positions_from_end(torch.zeros_like(seq_idx), seq_idx)
    assert found.tolist() == [[2, 1, 0, 1, 0, 0, 0], [0, 0, 4, 3, 2, 1, 0]]


END = {"positions": "max_length", "position_from": "end"}


@pytest.mark.parametrize("backbone", CAUSAL)
def test_positions_from_the_end_show_the_length_of_a_history_and_no_item(
    file: Path, backbone: str
) -> None:
    model = model_of(data_of(file), backbone, tokenizer=END).double().eval()
    item, position = torch.randint(N_ITEMS, (1, 8)), torch.arange(8).unsqueeze(0)
    seq_idx = torch.tensor([[0] * 3 + [1] * 5])
    with torch.no_grad():
        before = model(item, seq_idx, position)
        changed = item.clone()
        changed[:, 5:] = (item[:, 5:] + 1) % N_ITEMS
        after = model(changed, seq_idx, position)
        assert torch.equal(before[:, :5], after[:, :5])
        shorter = model(item[:, :7], seq_idx[:, :7], position[:, :7])
        torch.testing.assert_close(shorter[:, :3], before[:, :3], rtol=0, atol=1e-12)
        assert (shorter[:, 3:] - before[:, 3:7]).abs().amax(-1).min() > 1e-6
        # A packed history is that history alone; the latest item's position is 0 in both.
        alone = model(item[:, 3:], None, position[:, :5])
        torch.testing.assert_close(alone, before[:, 3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", ["all", "last"])
def test_it_learns_with_a_start_token_and_positions_from_the_end(
    file: Path, tmp_path: Path, objective: str
) -> None:
    data = data_of(file, objective=objective, start_token=True)
    model = model_of(data, tokenizer=END)
    trainer = fit(model, data, tmp_path)
    trainer.test(model, datamodule=data, verbose=False)
    assert model.test_results()["metrics"]["hr@1"] > 0.9
    # What test and command recommend is the same, and a history without an item has an answer, too.
    batch = next(iter(data.test_dataloader()))
    _, unseen = model.top(batch, 3)
    histories = [
        [f"i{item:02}" for item in batch.seen.values[begin:stop].tolist()]
        for begin, stop in itertools.pairwise(batch.seen.offsets.tolist())
    ]
    found = model.recommend(histories, k=3)["item"].to_list()
    assert found == [f"i{item:02}" for item in unseen.flatten().tolist()]
    empty = model.recommend([[], ["nothing"]], k=2)
    assert empty["score"].null_count() == 0
    assert empty.filter(user=0)["item"].to_list() == empty.filter(user=1)["item"].to_list()


def test_weight_decay_of_the_table_alone(file: Path) -> None:
    adam = {"_target_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.3}
    model = model_of(data_of(file), optimizer=adam, decay="table")
    table, rest = model.configure_optimizers().param_groups
    assert (table["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in table["params"]] == [id(model.tokenizer.embedding.weight)]
    assert len(table["params"]) + len(rest["params"]) == len(list(model.parameters()))
    with pytest.raises(UserError, match=r"model.decay=all: expected matrices or table"):
        model_of(data_of(file), decay="all")


def test_hidden_items_leave_their_places(file: Path) -> None:
    model = model_of(data_of(file), tokenizer={"item_dropout": 0.5, "norm": False})
    item = torch.randint(N_ITEMS, (40, 8))
    position = torch.arange(8).expand_as(item)
    torch.manual_seed(1)
    tokens = model.tokenizer.train()(item, position)
    shown = model.tokenizer.eval()(item, position)
    hidden = (tokens == 0).all(-1)
    assert 0.4 < hidden.float().mean() < 0.6
    assert torch.equal(tokens[~hidden], shown[~hidden])


def test_a_start_token_belongs_to_data_and_model(file: Path, tmp_path: Path) -> None:
    model = model_of(data_of(file, start_token=True))
    with pytest.raises(UserError, match=r"dataset.start_token=false: the model is for"):
        trainer_of(tmp_path).test(model, datamodule=data_of(file), verbose=False)


def test_averaged_weights_are_validated_kept_and_resumed(file: Path, tmp_path: Path) -> None:
    """The best checkpoint has the averages; a resumed run goes on with both; counts of items stay counts."""

    class Weights(L.Callback):
        """Compute the averages from the weights of each step."""

        def __init__(self) -> None:
            self.mean: dict[str, torch.Tensor] = {}
            self.validated: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            for name, value in pl_module.named_parameters():
                now = value.detach().clone()
                self.mean[name] = 0.5 * self.mean.get(name, now) + 0.5 * now

        def on_validation_batch_start(self, trainer, pl_module, batch, *rest) -> None:
            self.validated.append(pl_module.tokenizer.embedding.weight.detach().clone())

    def run(folder: Path, ckpt: Path | None = None, epochs: int = 3):
        data, weights = data_of(file), Weights()
        model = model_of(data, tokenizer={"dropout": 0.3})
        keep = [
            ModelCheckpoint(folder, "best", "val/loss", auto_insert_metric_name=False),
            ModelCheckpoint(folder, "last"),
        ]
        average = EMAWeightAveraging(decay=0.5, use_buffers=False)
        trainer = trainer_of(
            folder, max_epochs=epochs, callbacks=[StepSeed(3), average, weights, *keep]
        )
        torch.manual_seed(ckpt is None)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True)
        return model, weights, data

    model, weights, data = run(tmp_path / "whole")
    for name, value in model.named_parameters():  # the end of the training leaves the averages
        torch.testing.assert_close(value.data, weights.mean[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights.validated[-1], model.tokenizer.embedding.weight.data)
    assert torch.equal(model.item_counts, data.splits.item_counts)
    best = torch.load(tmp_path / "whole" / "best.ckpt", weights_only=True)
    averaged = best["state_dict"]["tokenizer.embedding.weight"]
    assert any(torch.equal(averaged, seen) for seen in weights.validated)
    assert not torch.equal(averaged, best["current_model_state"]["tokenizer.embedding.weight"])
    assert torch.equal(best["state_dict"]["item_counts"], data.splits.item_counts)

    run(tmp_path / "half", epochs=2)
    resumed, _, _ = run(tmp_path / "half", tmp_path / "half" / "last.ckpt")
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_recommends_by_itself(file: Path, tmp_path: Path) -> None:
    data = data_of(file)
    model = model_of(data)
    trainer = fit(model, data, tmp_path)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = NextItem.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    found = loaded.recommend([["i03", "i04"], ["i10", "unknown", "i11"]], k=3)
    first = found.filter(rank=1)
    assert first["item"].to_list() == ["i05", "i00"]
    assert found["score"].is_sorted(descending=True) or found["user"].n_unique() == 2
    assert "i04" not in found.filter(user=0)["item"].to_list()
    again = loaded.recommend([["i04"]], k=N_ITEMS, filter_seen=False)
    assert again.height == N_ITEMS
    assert loaded.recommend([["i01"], ["nothing"]], k=2)["user"].to_list() == [0, 0, 1, 1]
    # Another process, that never imports Hydra or what reads data.
    code = (
        "import sys; from recsys_ssm.models.next_item import NextItem\n"
        "model = NextItem.load_from_checkpoint('model.ckpt', weights_only=True)\n"
        "print(model.recommend([['i03', 'i04']], k=1)['item'].item())\n"
        "assert not {'hydra', 'recsys_ssm.data.interactions'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "i05"), done.stderr


@pytest.mark.parametrize("backbone", [*CAUSAL.values(), HYDRA], ids=[*CAUSAL, "hydra"])
def test_half_precision_learns_as_float32_does(file: Path, tmp_path: Path, backbone: dict) -> None:
    """Scores and losses stay finite and near those of float32 after the same steps."""
    objective = "last" if backbone is HYDRA else "all"
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        data = data_of(file, objective=objective)
        model = model_of(data, backbone)
        trainer = trainer_of(
            tmp_path, max_steps=20, precision=precision, enable_checkpointing=False
        )
        trainer.fit(model, datamodule=data)
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
        losses[precision] = float(trainer.callback_metrics["val/loss"])
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)


def test_features_of_items_take_part(tmp_path: Path) -> None:
    """A user buys one colour only: a history of red says red, whatever the items."""
    generator = random.Random(1)
    lines = []
    for user in range(80):
        items = [generator.randrange(10) * 2 + user % 2 for _ in range(6)]
        lines.append(f"u{user}\t" + f"\nu{user}\t".join(f"i{i}" for i in items))
    events = "\n".join(f"{line}" for line in lines)
    (tmp_path / "e.csv").write_text("user_id\titem_id\n" + events + "\n")
    rows = "".join(f"i{i},{'red' if i % 2 else 'blue'}\n" for i in range(20))
    (tmp_path / "items.csv").write_text("item_id,colour\n" + rows)
    data = Interactions(
        interactions=str(tmp_path / "e.csv"),
        separator="\t",
        timestamp=None,
        duplicates="keep",
        cache_dir=str(tmp_path / "cache"),
        items=str(tmp_path / "items.csv"),
        item_categorical=["colour"],
        max_length=8,
        batch_positions=64,
    )
    model = model_of(data, tokenizer={"init_std": 0.5})
    colours = model.tokenizer.features.embedding
    before = colours.detach().clone()
    fit(model, data, tmp_path, epochs=8)
    assert not torch.equal(colours, before)
    top = model.recommend([["i1", "i3", "i5"]], k=5, filter_seen=False)["item"]
    assert sum(int(item[1:]) % 2 for item in top) >= 4
    assert model.state_dict()["item_categorical"].shape == (20, 1)  # so a checkpoint has them

    arguments = {**NextItem.arguments_from(data), "items": None}
    bare = NextItem(**arguments, backbone=model.hparams["backbone"])
    with pytest.raises(UserError, match="NextItem has an item_schema with features but no items"):
        bare.recommend([["i1"]])
    with pytest.raises(UserError, match="but no items; pass items="):
        fit(bare, data, tmp_path, epochs=1)


def test_embeddings_are_counted_apart(file: Path) -> None:
    data = data_of(file)
    model = model_of(data, "transformer", tokenizer={"positions": 8, "norm": True})
    counts = model.parameter_counts()
    assert counts["total"] - counts["without_embeddings"] == (N_ITEMS + 1) * 16 + 8 * 16


def test_padding_row_is_never_trained(file: Path, tmp_path: Path) -> None:
    data = data_of(file)
    model = model_of(data)
    fit(model, data, tmp_path, epochs=2)
    assert model.tokenizer.embedding.weight[0].eq(0).all()


def test_options_are_checked(file: Path) -> None:
    data = data_of(file)
    for options, message in [
        ({"loss": {"knd": "softmax"}}, "loss.knd: no such option; did you mean 'kind'?"),
        ({"loss": {"kind": "hinge"}}, "loss.kind='hinge'"),
        ({"head": {"temperature": -1.0}}, "head: temperature=-1.0: give a number above 0"),
        ({"skip": 1.0}, "model.skip=1.0: give a probability"),
        ({"skip": -0.1}, "model.skip=-0.1: give a probability"),
        ({"tokenizer": {"dropuot": 0.1}}, "tokenizer.dropuot: no such option"),
    ]:
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            model_of(data, **options)


def test_a_history_longer_than_the_positions_says_so(file: Path) -> None:
    model = model_of(data_of(file), "transformer", tokenizer={"positions": 4})
    with pytest.raises(UserError, match=r"tokenizer\.positions=4"):
        model(torch.zeros(1, 6, dtype=torch.long), None, torch.arange(6)[None])


def test_a_batch_without_a_target_is_no_loss(file: Path) -> None:
    model = model_of(data_of(file))
    nothing = torch.full((1, 3), -1)
    batch = SequenceBatch(
        torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), torch.arange(3)[None], nothing
    )
    loss, n_targets = model._loss(batch)
    assert loss == 0 and n_targets == 0


def test_with_a_temperature_scores_are_cosines(file: Path) -> None:
    """How long an item's vector is says nothing of it."""
    data = data_of(file)
    data.setup("fit")
    model = model_of(data, head={"temperature": 0.1})
    history, item = [model.item_ids[:3]], model.item_ids[7]
    before = model.recommend(history, N_ITEMS, filter_seen=False)
    assert before["score"].abs().max() <= 10 + 1e-5
    with torch.no_grad():
        model.tokenizer.embedding.weight[7] *= 5
    after = model.recommend(history, N_ITEMS, filter_seen=False)
    assert after.filter(item=item)["score"].item() == pytest.approx(
        before.filter(item=item)["score"].item(), rel=1e-4
    )


class TestLaterTargets:
    """Of ``model.skip``: targets of the training from further ahead in the same sequence."""

    SEQ_IDX = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1], [3, 3, -1, -1, 3, 3, 3, 3]])
    TARGET = torch.tensor([[1, 2, 3, 4, 5, 6, -1, -1], [7, 8, -1, -1, -1, 9, 10, -1]])

    def test_each_is_one_of_the_sequence_that_is_not_before_it(self) -> None:
        allowed = [
            [[1, 2, 3, 4], [2, 3, 4], [3, 4], [4], [5, 6], [6], [-1], [-1]],
            [[7, 8], [8], [-1], [-1], [-1], [9, 10], [10], [-1]],
        ]
        torch.manual_seed(0)
        draws = torch.stack([later_targets(self.TARGET, self.SEQ_IDX, 0.5) for _ in range(300)])
        found = [[sorted(set(cell.tolist())) for cell in row] for row in draws.permute(1, 2, 0)]
        assert found == [[sorted(cell) for cell in row] for row in allowed]

    def test_each_further_one_is_passed_over_as_likely(self) -> None:
        torch.manual_seed(0)
        n = 40_000
        drawn = later_targets(
            torch.arange(1, 5).expand(n, 4).contiguous(), torch.zeros(n, 4).long(), 0.3
        )
        shares = drawn[:, 0].bincount(minlength=5)[1:] / n
        expected = torch.tensor([0.7, 0.3 * 0.7, 0.09 * 0.7, 0.027])
        assert (shares - expected).abs().max() < 0.01

    def test_of_none_all_stay(self) -> None:
        assert torch.equal(later_targets(self.TARGET, self.SEQ_IDX, 0.0), self.TARGET)

    def test_of_empty_rows(self) -> None:
        nothing = torch.full((2, 1), -1)
        assert torch.equal(later_targets(nothing, nothing, 0.5), nothing)

    def test_only_training_has_them(self, file: Path) -> None:
        data = data_of(file)
        data.setup("fit")
        model = model_of(data, skip=0.9, tokenizer={"dropout": 0.0}).eval()
        batch = next(iter(data.train_dataloader()))
        loss, _ = model._loss(batch)
        model.log = lambda *_, **__: None
        assert not torch.isclose(model.training_step(batch, 0), loss)
        model.validation_step(batch, 0)
        assert torch.isclose(model.val_loss.compute(), loss)

    def test_prefixes_have_one_target_only(self, file: Path) -> None:
        data = data_of(file, objective="last")
        with pytest.raises(UserError, match=r"model\.skip=0\.5: with dataset\.objective=last"):
            model_of(data, skip=0.5)
