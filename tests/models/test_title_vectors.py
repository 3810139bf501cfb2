"""Titles beside ids in next-item models: an item's row is its embedding plus a map of its title's frozen vector."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import polars as pl
import pytest
import torch

from recsys_ssm import Interactions, ItemTokenizer, Mamba, NextItem, UserError
from recsys_ssm.text.embed import title_vectors

N = 12


def dataset(*, titles: bool = True) -> Interactions:
    rows = [(f"u{u}", f"i{(u + t) % N:02d}", t) for u in range(30) for t in range(6)]
    events = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    table = pl.DataFrame(
        {
            "item_id": [f"i{i:02d}" for i in range(N)],
            "title": [f"kind{i % 3} word{i % 4} no" for i in range(N)],
        }
    )
    named = {"titles": table, "item_title": "title"} if titles else {}
    return Interactions(interactions=events, max_length=5, **named)


def model_of(data: Interactions, **tokenizer: object) -> NextItem:
    torch.manual_seed(0)
    return NextItem.for_data(
        data, backbone=Mamba(d_model=8, n_layers=1), tokenizer={"text_size": 4, **tokenizer}
    )


def test_rows_and_tokens_have_the_titles() -> None:
    data = dataset()
    model, plain = model_of(data, text="tfidf").eval(), model_of(data).eval()
    vectors = title_vectors(data.item_titles(), "tfidf", size=4)
    tokenizer = model.tokenizer
    assert tokenizer.vectors.equal(vectors) and not tokenizer.vectors.requires_grad
    rows = tokenizer.embedding.weight[1:] + vectors @ tokenizer.projection.weight.T
    torch.testing.assert_close(tokenizer.items(None), rows)
    item = torch.tensor([[3, 0, -1]])
    tokens = tokenizer(item, torch.tensor([[0, 1, 0]]))
    expected = tokenizer.norm(torch.stack((rows[3], rows[0], torch.zeros(8)))).unsqueeze(0)
    torch.testing.assert_close(tokens, expected)
    more = model.parameter_counts()["total"] - plain.parameter_counts()["total"]
    assert more == 8 * vectors.shape[1]
    # Without the option the same numbers are drawn.
    torch.manual_seed(0)
    old = NextItem.for_data(data, backbone=Mamba(d_model=8, n_layers=1))
    assert all(a.equal(b) for a, b in zip(plain.parameters(), old.parameters(), strict=True))


def test_an_item_that_was_never_trained_on_gets_the_titles_vector() -> None:
    """Equal titles have equal parts: training on one moves the other."""
    model = model_of(dataset(), text="tfidf")
    before = model.tokenizer.items(None).detach().clone()
    loss = model.tokenizer.items(None)[0].sum()
    loss.backward()
    with torch.no_grad():
        model.tokenizer.projection.weight -= model.tokenizer.projection.weight.grad
    moved = model.tokenizer.items(None) - before
    torch.testing.assert_close(moved[0], moved[0].clone())
    alike = title_vectors(dataset().item_titles(), "tfidf", size=4)
    torch.testing.assert_close(
        moved, (alike @ alike[0]).unsqueeze(1) * moved[0], atol=1e-5, rtol=1e-4
    )


def test_a_checkpoint_holds_the_vectors(tmp_path: Path) -> None:
    data = dataset()
    model = model_of(data, text="tfidf")
    trainer = L.Trainer(
        max_steps=2, logger=False, enable_progress_bar=False, accelerator="cpu",
        default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = NextItem.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.tokenizer.vectors.equal(model.tokenizer.vectors)
    history = [["i03", "i04"]]
    assert again.recommend(history, k=5).equals(model.eval().recommend(history, k=5))


def test_titles_that_are_absent_are_one_line() -> None:
    with pytest.raises(UserError, match=r"dataset\.item_title: not set"):
        model_of(dataset(titles=False), text="tfidf")
    with pytest.raises(ValueError, match="text=tfidf: the vectors of the titles are absent"):
        ItemTokenizer(n_items=3, d_model=4, text="tfidf")


def test_the_option_is_one_of_the_command(cli, tmp_path: Path) -> None:
    small = (
        "dataset=shop", "dataset.n_customers=40", "dataset.n_items=24", "backbone=mamba",
        "backbone.d_model=16", "trainer.max_epochs=1", "trainer.enable_progress_bar=false",
        "logger=none",
    )  # fmt: skip
    outcome = cli("train", *small, "tokenizer.text=tfidf", "tokenizer.text_size=8")
    assert outcome.code == 0, outcome.text
    [run] = tmp_path.glob("runs/*/*")
    outcome = cli("evaluate", f"run={run}", "output_dir=again")
    assert outcome.code == 0, outcome.text
    outcome = cli("train", *small, "tokenizer.text=/gone")
    assert outcome.code == 1 and "tokenizer.text=/gone: no such folder" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
