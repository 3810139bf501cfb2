"""LlamaRec: candidates, their order, what is trained on, both stages on all users, and adapters of real folders."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import numpy as np
import polars as pl
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers", reason="the extra text is not installed")
pytest.importorskip("peft", reason="the extra text is not installed")

from recsys_ssm import Interactions, Mamba, NextItem, UserError
from recsys_ssm.metrics import RankingMetrics
from recsys_ssm.models import llamarec
from recsys_ssm.models.histories import histories_of
from recsys_ssm.models.llamarec import LlamaRec, best_weight, mixed
from recsys_ssm.models.text_recommender import Sample, samples_of
from recsys_ssm.text import weights
from recsys_ssm.text.tokenizer import TextTokenizer
from recsys_ssm.text.weights import transformers_model

N = 30
TINY = {"vocabulary": 400, "d_model": 16, "n_layers": 1}
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def events(n_users: int = 40) -> pl.DataFrame:
    """Walks over the items: the next one, or the one after it. The last two items are held out alone."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(n_users):
        item = int(rng.integers(N - 2))
        for time in range(8):
            rows.append((f"u{user}", f"i{item:02d}", time))
            item = (item + int(rng.integers(1, 3))) % (N - 2)
        rows += [(f"u{user}", f"i{N - 2}", 8), (f"u{user}", f"i{N - 1}", 9)]
    return pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")


def dataset(**options: object) -> Interactions:
    titles = pl.DataFrame(
        {"item_id": [f"i{i:02d}" for i in range(N)], "title": [f"Film no {i}" for i in range(N)]}
    )
    small = {"objective": "last", "max_length": 6, "batch_samples": 32}
    return Interactions(
        interactions=events(), titles=titles, item_title="title", **{**small, **options}
    )


@pytest.fixture(scope="module")
def data() -> Interactions:
    return dataset()


@pytest.fixture(scope="module")
def retriever() -> NextItem:
    torch.manual_seed(0)
    model = NextItem.for_data(
        dataset(objective="all", batch_samples=None), backbone=Mamba(d_model=16, n_layers=1)
    )
    return model.fit(dataset(objective="all", batch_samples=None), max_epochs=5, **QUIET)


def model_of(data: Interactions, retriever: NextItem, **options: object) -> LlamaRec:
    torch.manual_seed(0)
    small = {"text": TINY, "n_candidates": 6, "title_tokens": 8}
    return LlamaRec.for_data(data, **{"retriever": retriever, **small, **options})


def test_letters_stand_before_the_candidates_and_the_latest_titles_stay(
    data: Interactions, retriever: NextItem
) -> None:
    model = model_of(data, retriever, prompt_tokens=75, n_titles=20)
    prompt = model.prompt(list(range(20)), [5, 7])
    text = model.tokenizer.decode(prompt)
    assert text.startswith("User history:") and len(prompt) <= 75
    assert text.endswith(". Candidates:A Film no 5B Film no 7. Answer:")
    assert "; Film no 19. Cand" in text and "Film no 0;" not in text
    assert model.tokenizer.decode(
        model_of(data, retriever, n_titles=3).prompt(list(range(20)), [5])
    ).startswith("User history: Film no 17; Film no 18; Film no 19.")


def test_the_order_of_the_candidates_says_nothing_of_the_target(
    data: Interactions, retriever: NextItem
) -> None:
    """In training each place has the target equally often, wherever the retriever ranked it."""
    for how in ("retrieved", "random"):
        model = model_of(data, retriever, train_candidates=how)
        samples = [each for batch in data.train_dataloader() for each in samples_of(batch)]
        places, ranks = [], []
        for _ in range(20):
            kept, pools, place = model.examples(samples)
            found, _ = retriever.candidates(
                [each.history for each in kept], 6, filter_seen=model.filter_seen
            )
            for sample, pool, at, row in zip(kept, pools, place.tolist(), found, strict=True):
                assert pool[at] == sample.target and len(set(pool)) == len(pool) == 6
                if how == "retrieved":
                    assert set(pool) == set(row.tolist())
                    ranks.append(row.tolist().index(sample.target))
            places += place.tolist()
        share = np.bincount(places, minlength=6) / len(places)
        assert np.abs(share - 1 / 6).max() < 5 * (5 / 36 / len(places)) ** 0.5
        if ranks:
            assert abs(np.corrcoef(places, ranks)[0, 1]) < 5 / len(ranks) ** 0.5


def test_candidates_of_a_user_are_ordered_without_the_target(
    data: Interactions, retriever: NextItem
) -> None:
    """The prompt of a test follows from history and candidates, in whatever order those come."""
    items = torch.tensor([3, 9, 4, 17])
    order = llamarec._shuffle(items)
    assert order.equal(llamarec._shuffle(items)) and sorted(order.tolist()) == [0, 1, 2, 3]
    places = np.zeros((6, 6))
    for start in range(400):
        drawn = torch.arange(start, start + 6)
        places[torch.arange(6), llamarec._shuffle(drawn)] += 1
    assert (places > 30).all()  # 67 expected: no rank of the retriever has a place of its own


def test_no_held_out_item_is_trained_on(data: Interactions, retriever: NextItem) -> None:
    """The last two items are held out for every user: no example has them as history or answer."""
    model = model_of(data, retriever, train_candidates="random")
    held_out = {N - 2, N - 1}
    for batch in data.train_dataloader():
        kept, pools, place = model.examples(samples_of(batch))
        for sample, pool, at in zip(kept, pools, place.tolist(), strict=True):
            assert not held_out & {*sample.history, sample.target, pool[at]}


def test_a_target_that_was_not_retrieved_is_not_put_among_the_candidates(
    data: Interactions, retriever: NextItem
) -> None:
    model = model_of(data, retriever)
    found, _ = retriever.candidates([[0, 1]], 6, filter_seen=True)
    absent = next(i for i in range(N) if i not in found[0].tolist())
    kept, _, place = model.examples([Sample([0, 1], absent)])
    assert kept == [] and place.numel() == 0
    loss, count = model.sample_loss([Sample([0, 1], absent)], None)
    loss.backward()
    assert count == 0 and loss.item() == 0


def test_the_loss_is_the_letters_cross_entropy_at_the_last_token(
    data: Interactions, retriever: NextItem, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(data, retriever).eval()
    samples = [Sample([0, 1, 2], 3), Sample([4], 5)]
    pools = [[8, 3, 9, 1, 2, 4], [5, 1, 2, 3, 4, 6]]
    monkeypatch.setattr(model, "examples", lambda _: (samples, pools, torch.tensor([1, 0])))
    loss, count = model.sample_loss(samples, None)
    expected = []
    for sample, pool, letter in zip(samples, pools, "BA", strict=True):
        row = torch.tensor([model.prompt(sample.history, pool)])
        answer = torch.tensor(model.tokenizer.encode(letter))
        expected.append(F.cross_entropy(model.lm(row).logits[0, -1:].double(), answer))
    assert count == 2
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_both_stages_are_mixed_as_logarithms() -> None:
    ranked = torch.tensor([[4, 7, 9, 1, 0], [3, 2, -1, -1, -1]])
    first = torch.tensor([[0.6, 0.3, 0.1], [0.7, 0.3, 0.0]]).log()
    second = torch.tensor([[0.1, 0.2, 0.7], [0.2, 0.8, 0.0]]).log()
    order, scores = mixed(ranked, first, second, 0.0)
    assert order.equal(ranked) and scores[0, 3:].isnan().all()
    order, _ = mixed(ranked, first, second, 1.0)
    assert order.tolist() == [[9, 7, 4, 1, 0], [2, 3, -1, -1, -1]]
    order, scores = mixed(ranked, first, second, 0.5)
    product = (first[0] + second[0]) / 2
    assert order[0, :3].tolist() == [[4, 7, 9][i] for i in product.argsort(descending=True)]
    assert scores[0, :3].tolist() == pytest.approx(sorted(product.tolist(), reverse=True))
    # Equal scores: the retriever's order.
    order, _ = mixed(ranked, first, torch.zeros(2, 3), 1.0)
    assert order.equal(ranked)


def test_what_is_below_the_candidates_keeps_the_retrievers_order(
    data: Interactions, retriever: NextItem
) -> None:
    model = model_of(data, retriever, mix=1.0)
    histories = histories_of(next(iter(data.test_dataloader())).seen)
    for seen in (True, False):
        ranked, _ = retriever.candidates(histories, 12, filter_seen=seen)
        top, scores = model.top(None, histories, 12, filter_seen=seen)
        assert top[:, 6:].equal(ranked[:, 6:]) and scores[:, 6:].isnan().all()
        assert top[:, :6].sort(1).values.equal(ranked[:, :6].sort(1).values)
        assert not top.equal(ranked)


def test_the_figures_are_those_of_all_users_and_both_stages(
    data: Interactions, retriever: NextItem
) -> None:
    model = model_of(data, retriever, mix=1.0)
    metrics = model.evaluate(data, accelerator="cpu")
    results = model.test_results()
    batch = next(iter(data.test_dataloader()))
    ranked, _ = retriever.candidates(histories_of(batch.seen), 20, filter_seen=True)
    alone = RankingMetrics(
        list(map(str, model.test_metrics.names)), n_items=N, item_counts=model.item_counts
    )
    alone.update_from_top(ranked, batch.target)
    expected = {name: float(value) for name, value in alone.compute().items()}
    assert results["baselines"]["retriever"] == expected
    share = (ranked[:, :6] == batch.target.unsqueeze(1)).any(1).float().mean().item()
    assert results["two_stages"] == {
        "share": pytest.approx(share),
        "n_candidates": 6,
        "weight": 1.0,
    }
    assert metrics["n_users"] == 40 and metrics["hr@20"] == expected["hr@20"]


def test_validation_chooses_the_weight(data: Interactions, retriever: NextItem) -> None:
    """A language model that knows the answer gets weight, one that is wrong gets none; test users do not count."""
    target_of = {}
    for batch in [data.val_dataloader()[1], data.test_dataloader()]:
        for one in batch:
            for history, target in zip(histories_of(one.seen), one.target.tolist(), strict=True):
                target_of[tuple(history)] = target

    for sign, expected in ((1.0, lambda w: w > 0), (-1.0, lambda w: w == 0)):
        model = model_of(data, retriever)

        def knows(histories, candidates, sign=sign):
            answers = torch.tensor([[target_of[tuple(each)]] for each in histories])
            # Cold targets are at the end of the ranking: an easier target is the best but one.
            answers = torch.where((candidates == answers).any(1, True), answers, candidates[:, 1:2])
            return (sign * 9.0 * (candidates == answers)).log_softmax(1)

        model.log_probabilities = knows
        trainer = L.Trainer(logger=False, enable_model_summary=False, **QUIET)
        patched = dataset()
        patched.setup()
        _retarget(patched, retriever)
        for one in patched.val_dataloader()[1]:
            for history, target in zip(histories_of(one.seen), one.target.tolist(), strict=True):
                target_of[tuple(history)] = target
        trainer.validate(model, patched, verbose=False)
        assert expected(float(model.mix_weight)), (sign, model.mix_weight)


def test_a_gain_by_chance_gets_no_weight() -> None:
    """With 100 users a mean difference of .02 has a standard error of .01 where the deviation is .1."""
    gains = torch.tensor([0.0, 0.01, 0.019, 0.021, -0.5])
    squares = gains.square() + 0.1**2
    assert best_weight(gains, squares, 100) == 3
    assert best_weight(gains, squares, 80) == 0
    assert best_weight(gains, squares, 10_000) == 3
    assert best_weight(torch.zeros(3), torch.zeros(3), 0) == 0


def _retarget(data: Interactions, retriever: NextItem) -> None:
    """Let half of the validation targets be the retriever's best item, and half its third."""
    splits = data.splits
    events = np.array(splits.histories.events)
    for number, (user, at) in enumerate(zip(*splits.val, strict=True)):
        history = events[splits.histories.offsets[user] : at].tolist()
        ranked, _ = retriever.candidates([history], 6, filter_seen=True)
        events[at] = int(ranked[0, 2 * (number % 2)])
    splits.histories = splits.histories._replace(events=events)


def test_it_learns_to_name_the_letter(data: Interactions, retriever: NextItem) -> None:
    """Of two candidates the one of a known set is the answer, wherever it stands."""
    text = {**TINY, "d_model": 64, "n_layers": 2}
    model = model_of(data, retriever, text=text, n_candidates=2)
    optimizer = torch.optim.Adam(model.lm.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        pairs = torch.stack((torch.randint(6, (16,)), torch.randint(12, 20, (16,))), 1)
        flip = torch.randint(2, (16,))
        shown = torch.where(flip.unsqueeze(1) == 1, pairs.flip(1), pairs).tolist()
        samples = [Sample([25], int(good)) for good in pairs[:, 0]]
        model.examples = lambda _, made=(samples, shown, flip): made
        loss, _ = model.sample_loss(samples, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.2 < np.mean(losses[:20])


def fitted(model: LlamaRec, data: Interactions, folder: Path) -> Path:
    trainer = L.Trainer(
        max_steps=2, logger=False, default_root_dir=folder, enable_model_summary=False, **QUIET
    )
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def test_a_checkpoint_holds_the_retriever(
    data: Interactions, retriever: NextItem, tmp_path: Path
) -> None:
    model = model_of(data, retriever)
    before = {name: value.clone() for name, value in retriever.state_dict().items()}
    again = LlamaRec.load_from_checkpoint(fitted(model, data, tmp_path), weights_only=True)
    for name, value in again.retriever.state_dict().items():
        assert value.equal(before[name]), f"{name}: the retriever is frozen"
    history = [["i03", "i04"]]
    assert again.recommend(history, k=8).equals(model.eval().recommend(history, k=8))
    assert again.fits(data) and again.mix_weight == model.mix_weight


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama in the layout of transformers, without a token for padding."""
    config = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model, _ = transformers_model("LlamaForCausalLM", config, None)
    model.save_pretrained(tmp_path / "llama")
    texts = [f"Film no {i}" for i in range(N)]
    TextTokenizer.train(texts, 300).tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    return tmp_path / "llama"


def test_a_folder_gets_an_adapter_and_the_checkpoint_holds_it_alone(
    data: Interactions, retriever: NextItem, folder: Path, tmp_path: Path
) -> None:
    model = model_of(data, retriever, text={"model": str(folder)}, prompt_tokens=256)
    trained = [name for name, p in model.lm.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert {name.split(".")[4] for name in trained} == {"q_proj", "v_proj"}
    d, kv, r = 16, 8, 8
    assert model.parameter_counts()["trained"] == 2 * ((d * r + r * d) + (d * r + r * kv))
    path = fitted(model, data, tmp_path)
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert {name.removeprefix("lm.") for name in kept if name.startswith("lm.")} == set(trained)
    again = LlamaRec.load_from_checkpoint(path, weights_only=True)
    prompt = [model.prompt([1, 2], [3, 4, 5])]
    with torch.no_grad():
        assert again._logits(prompt).equal(model.eval()._logits(prompt))
        assert (
            not model_of(data, retriever, text={"model": str(folder)}, prompt_tokens=256)
            .eval()
            ._logits(prompt)
            .equal(again._logits(prompt))
        )  # trained
    again.load_state_dict(kept)  # strict
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict({k: v for k, v in kept.items() if ".lora_A" not in k})
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors in it"):
        LlamaRec.load_from_checkpoint(path, weights_only=True)


def test_four_bits_need_a_package_and_a_device(
    data: Interactions, retriever: NextItem, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"text": {"model": str(folder)}, "prompt_tokens": 256, "four_bit": True}
    monkeypatch.setattr(weights, "require", lambda name, use: __import__("transformers"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"model\.four_bit=true: needs a CUDA device"):
        model_of(data, retriever, **options)
    assert model_of(data, retriever, four_bit=True).lm.dtype == torch.float32  # tiny


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_candidates": 27}, "model.n_candidates=27: give 2 to 26"),
        ({"mix": 1.5}, "model.mix=1.5: give a weight from 0 to 1"),
        ({"train_candidates": "all"}, "model.train_candidates=all: expected"),
        ({"prompt_tokens": 50}, "model.prompt_tokens=50: 6 candidates and a title"),
        ({"retriever": None}, "retriever: not set, and LlamaRec ranks what another model"),
    ],
)
def test_wrong_options_are_one_line(
    data: Interactions, retriever: NextItem, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model_of(data, **{"retriever": retriever, **options})
    assert "\n" not in str(caught.value)


def test_a_retriever_of_other_items_is_refused(data: Interactions, retriever: NextItem) -> None:
    few = events().filter(pl.col("item_id") != "i03")
    titles = pl.DataFrame({"item_id": few["item_id"].unique(), "title": "x"})
    other = Interactions(interactions=few, titles=titles, item_title="title", objective="last")
    with pytest.raises(UserError, match="retriever: its items are not those of the dataset"):
        model_of(other, retriever)


def test_a_config_of_two_alike_letters_is_refused(
    data: Interactions, retriever: NextItem, folder: Path
) -> None:
    path = folder / "tokenizer.json"
    plain = json.loads(path.read_text())
    plain["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[AB]"}, "content": "A"}
    path.write_text(json.dumps(plain))
    with pytest.raises(UserError, match="has not a token for each of the letters A to F"):
        model_of(data, retriever, text={"model": str(folder)}, prompt_tokens=256)
