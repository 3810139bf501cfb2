"""MamRec: scores are the likelihoods of whole texts, titles tie exactly, odd titles, checkpoints, given weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import polars as pl
import pytest
import torch

pytest.importorskip("transformers", reason="the extra text is not installed")

from recsys_ssm import GeneratedShop, Interactions, MambaLM, UserError
from recsys_ssm.models.histories import histories_of
from recsys_ssm.models.mamrec import MamRec
from recsys_ssm.models.text_recommender import samples_of
from recsys_ssm.text.tokenizer import TextTokenizer

TINY = {"vocabulary": 400, "d_model": 32, "n_layers": 2}
FAMILIES = ["mamba", "mamba2"]


def shop(**options: object) -> GeneratedShop:
    small = {
        "n_customers": 40,
        "n_items": 24,
        "mean_orders": 6,
        "max_length": 5,
        "eval_batch_size": 7,
    }
    return GeneratedShop(**{**small, **options})  # fmt: skip


@pytest.fixture(scope="module")
def data() -> GeneratedShop:
    return shop()


def model_of(data: Interactions, **options: Any) -> MamRec:
    torch.manual_seed(0)
    model = MamRec.for_data(data, text=TINY, **options)
    with torch.no_grad():
        # Random weights are nearly uniform: a score would not notice what is read.
        model.lm.backbone.embeddings.weight.mul_(20)
    return model.eval()


def plain_scores(model: MamRec, history: list[int]) -> torch.Tensor:
    """Compute all scores from whole texts, one by one, in float64."""
    lm = MambaLM(model.lm.config).double().eval()
    lm.load_state_dict(model.lm.state_dict())
    prompt = [*model.start]
    for item in history[-model.max_length :]:
        prompt += [*model.tokenizer.encode(f" {model.item_titles[item]}"), *model.end]
    scores = []
    for title in model.item_titles:
        line = [*model.tokenizer.encode(f" {title}", most=32), *model.end]
        text = torch.tensor([[*prompt, *line]])
        with torch.no_grad():
            each = lm.logits(lm(text[:, :-1])).log_softmax(-1)[0, len(prompt) - 1 :]
        found = each[torch.arange(len(line)), torch.tensor(line)]
        scores.append(found.sum() if model.score == "sum" else found.mean())
    return torch.stack(scores)


@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_whole_texts(data: GeneratedShop, family: str, score: str) -> None:
    model = model_of(data, family=family, score=score, score_rows=7)
    histories = [[3], [5, 2, 9, 1, 7], [0, 1, 2, 3, 4, 5, 6, 7], [23, 23]]
    found = model.read(histories)
    wanted = torch.stack([plain_scores(model, each) for each in histories])
    assert wanted.std(1).min() > 0.05, "all titles are alike, so this tests nothing"
    assert (wanted[0] - wanted[1]).abs().max() > 0.05, "the history changes nothing"
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_latest_items_are_read(data: GeneratedShop) -> None:
    model = model_of(data)
    long, same, other = model.read([[9, 8, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [9, 8, 1, 2, 3]])
    torch.testing.assert_close(long, same)
    assert (long - other).abs().max() > 1e-3


@pytest.mark.parametrize("objective", ["all", "last"])
@pytest.mark.parametrize("start_token", [False, True])
def test_the_loss_is_the_mean_over_the_tokens_of_each_target(
    objective: str, start_token: bool
) -> None:
    data = shop(objective=objective, batch_positions=40, start_token=start_token)
    model = model_of(data)
    lm = MambaLM(model.lm.config).double().eval()
    lm.load_state_dict(model.lm.state_dict())
    n_tokens = 0
    for batch in data.train_dataloader():
        samples = samples_of(batch)
        total, count = 0.0, 0
        for history, target in samples:  # each prefix by itself
            items = [item for item in history if item >= 0]
            prompt = [*model.start, *(token for item in items for token in model.lines[item])]
            line = model.lines[target]
            with torch.no_grad():
                text = torch.tensor([[*prompt, *line]])
                each = lm.logits(lm(text[:, :-1])).log_softmax(-1)[0, len(prompt) - 1 :]
            total -= each[torch.arange(len(line)), torch.tensor(line)].sum().item()
            count += len(line)
        loss, found = model.sample_loss(samples, batch)
        assert found == count
        assert loss.item() == pytest.approx(total / count, rel=1e-5)
        n_tokens += found
    assert n_tokens > 500


def test_equal_titles_have_equal_scores_in_catalogue_order() -> None:
    data = titled([f"Film {i // 3}" for i in range(12)])
    model = model_of(data)
    scores = model.read([[1, 2]])[0]
    same = [
        [i for i, title in enumerate(model.item_titles) if title == f"Film {n}"] for n in range(4)
    ]
    assert all(len(set(scores[each].tolist())) == 1 for each in same)
    assert len(set(scores.tolist())) == 4
    top, _ = model.top(scores[None], [[1, 2]], 12, filter_seen=False)
    blocks = [top[0, at : at + 3].tolist() for at in range(0, 12, 3)]
    assert sorted(blocks) == sorted(same)


def test_seen_items_are_left_out(data: GeneratedShop) -> None:
    model = model_of(data)
    history = [4, 7, 7, 2, 9, 11, 15]  # also those before the latest five
    reading = model.read([history])
    top, scores = model.top(reading, [history], 30, filter_seen=True)
    assert top.shape == scores.shape == (1, 30)
    kept = 24 - len(set(history))
    assert (top[0, :kept] >= 0).all() and (top[0, kept:] == -1).all()
    assert not set(top[0].tolist()) & set(history)
    assert scores[0, :kept].diff().le(0).all() and scores[0, :kept].isfinite().all()
    everything, _ = model.top(reading, [history], 24, filter_seen=False)
    assert sorted(everything[0].tolist()) == [*range(24)]


def titled(titles: list[str]) -> Interactions:
    """Return a dataset with these titles, whose users go through the items in turns."""
    n = len(titles)
    events = pl.DataFrame(
        {
            "user_id": [u for u in range(20) for _ in range(5)],
            "item_id": [(u + i) % n for u in range(20) for i in range(5)],
            "timestamp": [i for _ in range(20) for i in range(5)],
        }
    )
    table = pl.DataFrame({"item_id": [*range(n)], "title": titles})
    return Interactions(interactions=events, titles=table, item_title="title", batch_positions=64)


def test_odd_titles_are_read_and_trained_on() -> None:
    titles = ["", "   ", "x" * 10_000, "long " * 2_000, "🎬🍿👩‍👩‍👧‍👦", "שלום עולם",
              "مرحبا بالعالم", "a\nb\r\nc", "\x00\x07", "Plain", "plain", "Plain title"]  # fmt: skip
    data = titled(titles)
    model = model_of(data, title_tokens=16)
    assert max(map(len, model.lines)) <= 16 + len(model.end)
    assert all(model.end[0] not in line[:-1] for line in model.lines), "a title is one line"
    assert len(set(map(tuple, model.lines))) >= 10
    scores = model.read([[2, 3], [4, 5], [0, 1]])
    assert scores.isfinite().all()
    torch.testing.assert_close(
        scores[1].double(), plain_scores_of_lines(model, [4, 5]), rtol=1e-4, atol=1e-4
    )
    model.fit(data, max_epochs=1, logger=False, enable_progress_bar=False)
    assert model.recommend([["2", "4"]], k=3)["item"].n_unique() == 3


def plain_scores_of_lines(model: MamRec, history: list[int]) -> torch.Tensor:
    lm = MambaLM(model.lm.config).double().eval()
    lm.load_state_dict(model.lm.state_dict())
    prompt, scores = model.prompt(history), []
    for line in model.lines:
        with torch.no_grad():
            each = lm.logits(lm(torch.tensor([[*prompt, *line[:-1]]]))).log_softmax(-1)[0]
        scores.append(each[torch.arange(len(prompt) - 1, len(prompt) + len(line) - 1), line].sum())
    return torch.stack(scores)


def test_a_model_learns_which_title_follows() -> None:
    titles = [f"{word} {i}" for i in range(4) for word in ("Red fox", "Blue whale", "Green frog")]
    data = titled(titles)
    torch.manual_seed(0)
    model = MamRec.for_data(data, text=TINY, filter_seen=False, optimizer={"lr": 5e-3}, dropout=0.0)
    before = model.evaluate(data, logger=False, enable_progress_bar=False)
    model.fit(data, max_epochs=120, logger=False, enable_progress_bar=False)
    after = model.evaluate(data, logger=False, enable_progress_bar=False)
    key = next(name for name in after if name.endswith("hr@1"))
    assert before[key] < 0.4 and after[key] > 0.9


def test_a_validation_ranks_for_the_first_users(data: GeneratedShop) -> None:
    model = model_of(data, val_users=10)
    trainer = lightning.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False)
    for _ in range(2):
        trainer.validate(model, data, verbose=False)
    counted: list[int] = []
    real = model.val_metrics.update_from_top
    model.val_metrics.update_from_top = lambda top, target: (  # type: ignore[method-assign]
        counted.append(len(target)),
        real(top, target),
    )[1]
    trainer.validate(model, data, verbose=False)
    assert counted == [7, 3]
    model.val_users = None
    counted.clear()
    trainer.validate(model, data, verbose=False)
    assert sum(counted) == 40


def test_a_checkpoint_needs_neither_dataset_nor_folder(data: GeneratedShop, tmp_path: Path) -> None:
    model = model_of(data)
    trainer = lightning.Trainer(
        logger=False, enable_progress_bar=False, max_epochs=1, default_root_dir=tmp_path
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = MamRec.load_from_checkpoint(tmp_path / "model.ckpt")
    histories = [each for batch in data.test_dataloader() for each in histories_of(batch.seen)]
    assert again.read(histories).equal(model.eval().read(histories))
    assert again.parameter_counts() == model.parameter_counts()


def folder_of(data: GeneratedShop, folder: Path, **special: object) -> Path:
    """Write a Mamba-2 with a tokenizer of its own."""
    tokenizer = TextTokenizer.train(data.item_titles(), 300)
    config = {"model_type": "mamba2", "vocab_size": tokenizer.n_tokens, "hidden_size": 16, "num_hidden_layers": 1,
              "num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8}  # fmt: skip
    torch.manual_seed(3)
    MambaLM(config).save(folder)
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.mark.parametrize("special", [{}, {"bos_token": "<|endoftext|>"}])
def test_given_weights_are_used_also_without_a_pad_token(
    data: GeneratedShop, tmp_path: Path, special: dict[str, object]
) -> None:
    folder = folder_of(data, tmp_path / "lm", **special)
    model = MamRec.for_data(data, text={"model": str(folder)})
    assert model.lm.config["model_type"] == "mamba2"
    for name, tensor in MambaLM.load(folder).state_dict().items():
        assert model.lm.state_dict()[name].equal(tensor)
    assert model.start == ([0] if special else model.end)
    histories = [[1], [5, 2, 9, 1, 7]]  # of different lengths, so one is padded
    wanted = torch.stack([plain_scores(model, each) for each in histories])
    torch.testing.assert_close(model.read(histories).double(), wanted, rtol=1e-4, atol=1e-4)


def test_pickle_weights_are_one_line(data: GeneratedShop, tmp_path: Path) -> None:
    folder = folder_of(data, tmp_path / "lm")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, and reading such a file") as caught:
        MamRec.for_data(data, text={"model": str(folder)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "max"}, "model.score=max: expected sum or mean"),
        ({"family": "gpt2"}, "model.family=gpt2: expected mamba or mamba2"),
        ({"val_users": 0}, "model.val_users=0"),
        ({"score_rows": 0}, "model.score_rows=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"text": {**TINY, "d_model": 50}, "family": "mamba2"}, "text.d_model=50"),
    ],
)
def test_wrong_options_are_one_line(
    data: GeneratedShop, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        MamRec.for_data(data, **{"text": TINY, **options})
