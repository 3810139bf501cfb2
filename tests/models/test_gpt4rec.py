"""GPT4Rec: what is trained on, which items the queries find, and a checkpoint that needs nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason="the extra text is not installed")
pytest.importorskip("bm25s", reason="the extra text is not installed")

from recsys_ssm import GeneratedShop, Interactions, UserError
from recsys_ssm.models.gpt4rec import Gpt4Rec
from recsys_ssm.models.histories import histories_of
from recsys_ssm.models.text_recommender import Sample, samples_of

TINY = {"vocabulary": 400, "d_model": 16, "n_layers": 1}


def shop(**options: object) -> GeneratedShop:
    small = {"n_customers": 40, "n_items": 24, "mean_orders": 6, "objective": "last"}
    return GeneratedShop(**{**small, "max_length": 5, "batch_samples": 16, **options})


def model_of(data: Interactions, **options: object) -> Gpt4Rec:
    torch.manual_seed(0)
    return Gpt4Rec.for_data(data, text=TINY, **{"n_queries": 3, "query_tokens": 16, **options})


@pytest.fixture(scope="module")
def data() -> GeneratedShop:
    return shop()


def test_the_latest_titles_stay_in_a_prompt(data: GeneratedShop) -> None:
    model = model_of(data, prompt_tokens=60)
    history = list(range(10))
    text = model.tokenizer.decode(model.prompt(history))
    assert text.startswith("Previously bought:") and text.endswith(". Wants to buy:")
    assert data.item_titles()[9] in text and data.item_titles()[0] not in text
    assert len(model.prompt(history)) <= 60 - 16 - 1
    shown = [
        title for title in data.item_titles()[:10] if f"{title};" in text or f"{title}." in text
    ]
    assert shown == data.item_titles()[10 - len(shown) : 10] and len(shown) >= 2


def test_a_prompt_holds_at_most_max_length_titles(data: GeneratedShop) -> None:
    model = model_of(data)
    assert model.tokenizer.decode(model.prompt(list(range(20)))).count(";") == 4


def test_samples_are_prefixes_of_training_events_and_their_next_items(data: GeneratedShop) -> None:
    splits = data.splits
    events, offsets = splits.histories
    expected = []
    for user, stop in enumerate(splits.train_stop):
        own = events[offsets[user] : stop].tolist()
        expected += [(tuple(own[max(0, i - 5) : i]), own[i]) for i in range(1, len(own))]
    found = [
        (tuple(sample.history), sample.target)
        for batch in data.train_dataloader()
        for sample in samples_of(batch)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("history_loss", [True, False])
def test_the_loss_is_the_cross_entropy_of_what_follows(
    data: GeneratedShop, history_loss: bool
) -> None:
    model = model_of(data, history_loss=history_loss).eval()
    samples = [Sample([1, 2, 3], 4), Sample([5], 6)]
    losses = []
    for history, target in samples:  # one at a time: padding does not matter
        prompt = model.prompt(history)
        row = torch.tensor([[*prompt, *model.titles[target], model.tokenizer.eos]])
        logits = model.lm(row).logits[0, :-1].double()
        begin = len(model.before) if history_loss else len(prompt)
        losses.append(F.cross_entropy(logits[begin - 1 :], row[0, begin:], reduction="none"))
    loss, count = model.sample_loss(samples, None)
    assert count == sum(map(len, losses))
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_items_take_turns_by_query(data: GeneratedShop) -> None:
    model = model_of(data)
    titles = data.item_titles()
    queries = [[titles[3], titles[7], "nothing of it"], [titles[7]]]
    top, scores = model.top(queries, [[0], [0]], 6, filter_seen=False)
    assert top[0, :2].tolist() == [3, 7] and top[1, 0] == 7
    assert len(set(top[0].tolist())) == 6 and (scores[0] > 0).all()
    # Each item of the first query is followed by one of the second.
    first, second = (
        model.search.scores(query).argsort(descending=True) for query in queries[0][:2]
    )
    assert {int(top[0, 2]), int(top[0, 3])} <= {*first[:3].tolist(), *second[:3].tolist()}


def test_seen_items_are_left_out_and_nothing_is_made_up(data: GeneratedShop) -> None:
    model = model_of(data)
    title = data.item_titles()[3]
    top, _ = model.top([[title]], [[3, 4]], 30, filter_seen=True)
    assert not {3, 4} & set(top[0].tolist()) and top[0, -1] == -1
    top, scores = model.top([["xyzzy"]], [[3]], 5, filter_seen=False)
    assert (top == -1).all() and scores.isnan().all()


def test_queries_find_the_item_of_a_title_and_not_of_an_id() -> None:
    """BM25 is over titles: ids that read like titles find nothing."""
    import polars as pl

    rows = [(f"u{u}", f"red{i}", t) for u in range(6) for t, i in enumerate((u % 4, 4, 5, u % 3))]
    events = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    titles = pl.DataFrame(
        {"item_id": [f"red{i}" for i in range(6)], "title": [f"blue w{i}" for i in range(6)]}
    )
    data = Interactions(
        interactions=events, titles=titles, item_title="title", objective="last", max_length=4
    )
    model = model_of(data)
    top, _ = model.top([["red2"]], [[0]], 3, filter_seen=False)
    assert (top == -1).all()
    top, _ = model.top([["w2"]], [[0]], 3, filter_seen=False)
    assert top[0].tolist() == [2, -1, -1]


def test_it_learns_what_follows_what() -> None:
    """Item i is followed by i + 1: the queries of a trained model find it."""
    import polars as pl

    n = 8
    rows = [(f"u{u}", f"i{(u + t) % n}", t) for u in range(40) for t in range(7)]
    events = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    names = ["ant", "bear", "cat", "dog", "eel", "fox", "gnu", "hen"]
    titles = pl.DataFrame({"item_id": [f"i{i}" for i in range(n)], "title": names})
    data = Interactions(
        interactions=events, titles=titles, item_title="title", objective="last", max_length=3,
        batch_samples=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gpt4Rec.for_data(
        data, text={**TINY, "d_model": 32, "n_layers": 2}, n_queries=2, dropout=0.0,
        optimizer={"lr": 3e-3}, filter_seen=False,
    )  # fmt: skip
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "check_val_every_n_epoch": 20}
    model.fit(data, max_epochs=60, patience=None, **quiet)
    assert model.evaluate(data, accelerator="cpu")["hr@1"] > 0.9
    assert model.recommend([["i2"]], k=1)["item"].to_list() == ["i3"]


def test_queries_do_not_depend_on_who_else_is_asked(data: GeneratedShop) -> None:
    model = model_of(data)
    histories = histories_of(next(iter(data.test_dataloader())).seen)[:5]
    together = model.read(histories)
    assert together == [model.read([history])[0] for history in histories]
    assert all(1 <= len(queries) <= 3 for queries in together)


def test_a_checkpoint_needs_neither_dataset_nor_folder(data: GeneratedShop, tmp_path: Path) -> None:
    import lightning as L

    model = model_of(data)
    trainer = L.Trainer(
        max_steps=2, logger=False, enable_progress_bar=False, accelerator="cpu",
        default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Gpt4Rec.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.item_titles == data.item_titles() and again.fits(data)
    history = [[data.splits.item_ids[i] for i in (1, 2)]]
    assert again.recommend(history, k=5).equals(model.eval().recommend(history, k=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_queries": 0}, "model.n_queries=0: give at least 1"),
        ({"prompt_tokens": 20}, "model.prompt_tokens=20: no room for a title"),
        ({"title_tokens": 0}, "model.title_tokens=0: give at least 1"),
    ],
)
def test_wrong_options_are_one_line(
    data: GeneratedShop, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model_of(data, **options)


def test_masked_items_are_refused(data: GeneratedShop) -> None:
    masked = shop(objective="masked")
    with pytest.raises(
        UserError, match=r"dataset\.objective=masked: Gpt4Rec reads what comes before"
    ):
        model_of(data).fit(masked, max_epochs=1, accelerator="cpu")


def test_odd_titles_go_through() -> None:
    import polars as pl

    rows = [(f"u{u}", f"i{(u + t) % 5}", t) for u in range(8) for t in range(5)]
    events = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    titles = ["x" * 10_000, "\N{OK HAND SIGN}", "\u05e9\u05dc\u05d5\u05dd", "", "<|endoftext|>"]
    table = pl.DataFrame({"item_id": [f"i{i}" for i in range(5)], "title": titles})
    data = Interactions(
        interactions=events, titles=table, item_title="title", objective="last", max_length=4
    )
    model = model_of(data, prompt_tokens=128)
    model.fit(data, max_epochs=1, enable_progress_bar=False, accelerator="cpu")
    assert model.evaluate(data, accelerator="cpu")["n_users"] == 8
