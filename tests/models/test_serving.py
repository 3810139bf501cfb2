"""The table says what is served: the headline's lists are those of ``recommend`` under the same filter."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning as L
import polars as pl
import pytest
import torch

from recsys_ssm import Interactions, Mamba, NextItem, TwoTower, UserError
from recsys_ssm.batches import Ragged, Selection, TopItems
from recsys_ssm.models.training import evaluate


def shop(folder: Path, repeats: float, seed: int = 0) -> Interactions:
    """Return a shop of 80 users and 15 items in which users buy again with a probability."""
    rng = random.Random(seed)
    rows = []
    for user in range(80):
        bought: list[int] = []
        for event in range(rng.randrange(4, 9)):
            new = [item for item in range(15) if item not in bought]
            again = bought and rng.random() < repeats
            bought.append(rng.choice(bought) if again else rng.choice(new))
            rows.append((f"u{user}", f"i{bought[-1]}", event))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame.write_csv(folder / "shop.csv")
    return Interactions(
        interactions=str(folder / "shop.csv"), cache_dir=str(folder / "cache"), max_length=6,
        batch_positions=64, duplicates="keep",
    )  # fmt: skip


def trained(data: Interactions, **options: object) -> NextItem:
    torch.manual_seed(0)
    model = NextItem.for_data(data, backbone=Mamba(d_model=16, n_layers=1), **options)
    L.seed_everything(0, verbose=False)
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "max_epochs": 2}
    model.fit(data, **quiet)
    return model


def histories_of(data: Interactions) -> tuple[list[list[str]], list[str]]:
    """Return what each test user had before the target, and the target."""
    splits = data.splits
    events, offsets = splits.histories
    ids = splits.item_ids
    users = zip(splits.test.user.tolist(), splits.test.event.tolist(), strict=True)
    pairs = [([ids[i] for i in events[offsets[u] : e].tolist()], ids[events[e]]) for u, e in users]
    return [history for history, _ in pairs], [target for _, target in pairs]


def hit_ratio(model: NextItem, data: Interactions, filter_seen: bool | None) -> float:
    """Compute hr@10 from the lists that ``recommend`` returns, independently of the metrics."""
    histories, targets = histories_of(data)
    lists = model.recommend(histories, 10, filter_seen=filter_seen)
    hits = sum(
        target in lists.filter(pl.col("user") == row)["item"].to_list()
        for row, target in enumerate(targets)
    )
    return hits / len(targets)


@pytest.mark.parametrize("filter_seen", [None, True, False])
def test_the_headline_is_what_recommend_returns(tmp_path: Path, filter_seen: bool | None) -> None:
    data = shop(tmp_path, repeats=0.5)
    model = trained(data, **({} if filter_seen is None else {"filter_seen": filter_seen}))
    metrics = evaluate(model, data, accelerator="cpu")
    assert metrics["hr@10"] == pytest.approx(hit_ratio(model, data, None))
    results = model.test_results()
    assert results["metrics_unfiltered"]["hr@10"] == pytest.approx(hit_ratio(model, data, False))
    left_out = results["metrics" if model.filter_seen else "metrics_filtered"]
    assert left_out["hr@10"] == pytest.approx(hit_ratio(model, data, True))
    assert model.test_rankings.frame().height == data.splits.test.user.size


def test_seen_items_are_allowed_where_users_buy_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    often, never = shop(tmp_path, repeats=0.5), shop(tmp_path / "a", repeats=0.0)
    backbone = Mamba(d_model=8, n_layers=1)
    assert often.splits.repeat_share > 0.3 and never.splits.repeat_share == 0
    assert not NextItem.for_data(often, backbone=backbone).filter_seen
    assert NextItem.for_data(often, backbone=backbone, filter_seen=True).filter_seen
    assert NextItem.for_data(never, backbone=backbone).filter_seen


def test_a_loaded_model_is_in_evaluation_mode_and_threads_agree(tmp_path: Path) -> None:
    data = shop(tmp_path, repeats=0.2)
    model = NextItem.for_data(
        data, backbone=Mamba(d_model=16, n_layers=1, dropout=0.5), tokenizer={"dropout": 0.5}
    )
    trainer = L.Trainer(max_epochs=1, logger=False, accelerator="cpu", enable_progress_bar=False,
                        default_root_dir=tmp_path, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = NextItem.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert not loaded.training
    histories, _ = histories_of(data)
    for mode in (False, True):
        loaded.train(mode)
        expected = loaded.recommend(histories, 5)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: loaded.recommend(histories, 5), range(24)))
        assert all(each.equals(expected) for each in found) and loaded.training == mode


def test_histories_that_are_no_lists_empty_ones_and_unknown_items(tmp_path: Path) -> None:
    data = shop(tmp_path, repeats=0.2)
    model = NextItem.for_data(data, backbone=Mamba(d_model=8, n_layers=1))
    assert model.recommend([]).height == 0
    with pytest.raises(UserError, match="history 0 is '12': expected a list"):
        model.recommend(["12", "3"])
    found = model.recommend([["i1"], [], ["unknown"]], k=3)
    assert found.group_by("user").len()["len"].to_list() == [3, 3, 3]
    popular = torch.argsort(data.splits.item_counts, descending=True, stable=True)[:3]
    expected = [data.splits.item_ids[i] for i in popular]
    for user in (1, 2):
        part = found.filter(pl.col("user") == user)
        assert part["item"].to_list() == expected and part["score"].null_count() == 3
    assert found.filter(pl.col("user") == 0)["score"].null_count() == 0


def test_whole_numbers_stored_as_floats_are_ids_and_k_is_whole(tmp_path: Path) -> None:
    """A history [3.0], as pandas has it beside an empty cell, had no known item and got the most popular ones."""
    rows = [(user, (user + event) % 6, event) for user in range(9) for event in range(4)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    data = Interactions(interactions=frame, cache_dir=str(tmp_path))
    model = NextItem.for_data(data, backbone=Mamba(d_model=16, n_layers=1)).eval()
    assert model.recommend([[3.0, 4.0]], 3).equals(model.recommend([["3", "4"]], 3))
    for k in (0, 2.5, True):
        with pytest.raises(UserError, match="give a whole number above 0"):
            model.recommend([["3"]], k)  # type: ignore[arg-type]


def test_two_towers_take_pandas_and_say_what_is_no_table(tiny_data) -> None:
    model = TwoTower.for_data(tiny_data, backbone=Mamba(d_model=8, n_layers=1))
    with pytest.raises(UserError, match="users: expected a Polars or pandas data frame"):
        model.recommend([["red"]])
    frame = pl.DataFrame({"age": [1.0, 2.0], "colour": ["red", None]})
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"age": [1.0, 2.0], "colour": ["red", None]})
    assert model.recommend(table, 2).equals(model.recommend(frame, 2))


def test_lightnings_predict_gives_what_recommend_does(tmp_path: Path, tiny_data) -> None:
    data = shop(tmp_path, repeats=0.2)
    model = NextItem.for_data(data, backbone=Mamba(d_model=16, n_layers=1)).eval()
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False,
             "enable_checkpointing": False}  # fmt: skip
    model.selection = Selection(k=6)
    found = L.Trainer(**quiet).predict(model, data)
    assert found is not None and all(isinstance(each, TopItems) for each in found)
    (events, offsets), ids = data.splits.histories, data.splits.item_ids
    histories = [[ids[i] for i in events[a:b]] for a, b in itertools.pairwise(offsets)]
    expected = model.recommend(histories, 6)
    table = pl.concat([model.as_table(each.item, each.score) for each in found])
    assert table["item"].to_list() == expected["item"].to_list()

    tower = TwoTower.for_data(tiny_data, backbone=Mamba(d_model=8, n_layers=1)).eval()
    tower.selection = Selection(k=2, filter_seen=True)
    found = L.Trainer(**quiet).predict(tower, tiny_data)
    splits = tiny_data.splits
    mine = splits.train.target > 0
    seen = Ragged.from_pairs(splits.train.user[mine], splits.train.item[mine], splits.users.n_rows)
    scores = (tower.user_tower(splits.users) @ tower.item_embeddings().T).detach()
    scores[seen.mask(0, splits.users.n_rows, scores.shape[1])] = -torch.inf
    best = scores.topk(2)
    items = torch.cat([each.item for each in found])
    enough = best.values > -torch.inf
    assert torch.equal(items[enough], best.indices[enough]) and (items[~enough] == -1).all()


def test_two_towers_score_pairs_and_new_items(tiny_data) -> None:
    model = TwoTower.for_data(tiny_data, backbone=Mamba(d_model=8, n_layers=1))
    users = pl.DataFrame({"age": [1.0, 2.0, 3.0], "colour": ["red", None, "red"]})
    everything = model.predict(users)
    ids = model.item_ids
    found = model.score(users, [ids[1], "no such", ids[0]])["score"]
    assert found[0] == pytest.approx(float(everything[0, 1]), abs=1e-6) and found[1] is None
    assert found[2] == pytest.approx(float(everything[2, 0]), abs=1e-6)
    like = model.similar([ids[0]], k=2)
    assert like["item"].to_list() == [ids[0]] * 2 and ids[0] not in like["similar"].to_list()
    with pytest.raises(UserError, match="3 users and 1 items"):
        model.score(users, [ids[0]])
