"""A training that begins from a run on another catalogue: rows by id, new items, dropped ones, figures of both."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from recsys_ssm import Interactions, Mamba, NextItem, TwoTower
from recsys_ssm.data.table import TableData
from recsys_ssm.errors import UserError
from recsys_ssm.run import grow

N_ITEMS = 20
NEW = ("i3", "i11", "i17")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


def clicks(n_users: int = 60, seed: int = 0) -> pl.DataFrame:
    """Return users who walk along a ring of items, with times that rise by user."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"i{(start + step * step) % N_ITEMS}", 100 * user + step)
        for user, start in enumerate(rng.integers(0, N_ITEMS, n_users))
        for step in range(4 + user % 5)
    ]
    return pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")


ITEMS = pl.DataFrame(
    {
        "item_id": [f"i{item}" for item in range(N_ITEMS)],
        "kind": [f"k{item % 3}" for item in range(N_ITEMS)],
        "price": [float(item) for item in range(N_ITEMS)],
    }
)
FEATURES = {"items": ITEMS, "item_categorical": ["kind"], "item_numeric": ["price"]}


def without(frame: pl.DataFrame, items=NEW) -> pl.DataFrame:
    return frame.filter(~pl.col("item_id").is_in(list(items)))


def model_of(data, seed=0, **options) -> NextItem:
    torch.manual_seed(seed)
    return NextItem.for_data(data, backbone=Mamba(d_model=8, n_layers=1), **options)


@pytest.fixture
def both() -> tuple[Interactions, NextItem, Interactions, NextItem]:
    """The data and model before (without three items, with one that is gone later), and after."""
    gone = pl.DataFrame(
        {"user_id": ["u1"] * 4, "item_id": ["z"] * 4, "timestamp": [900, 901, 902, 903]}
    )
    before = Interactions(interactions=pl.concat([without(clicks()), gone]), duplicates="keep")
    after = Interactions(interactions=clicks())
    return before, model_of(before), after, model_of(after, seed=1)


def test_all_weights_are_those_of_the_run_and_rows_go_by_id(both):
    _, old, _, new = both
    untouched = new.tokenizer.embedding.weight.detach().clone()
    grow.take_over(new, old, "x")
    for name, parameter in new.named_parameters():
        if name != "tokenizer.embedding.weight":
            assert torch.equal(parameter, dict(old.named_parameters())[name]), name
    rows, before = new.tokenizer.embedding.weight, old.tokenizer.embedding.weight
    for row, item in enumerate(new.item_ids, 1):
        if item in NEW:
            assert torch.equal(rows[row], untouched[row])
        else:
            assert torch.equal(rows[row], before[1 + old.item_ids.index(item)])
    assert not rows[0].any() and "z" in old.item_ids and "z" not in new.item_ids


def test_a_new_item_begins_from_the_mean_of_its_neighbours(both):
    _, old, data, new = both
    grow.take_over(new, old, "x")
    is_new = np.isin(new.item_ids, NEW)
    rows = new.tokenizer.embedding.weight.detach()[1:]
    expected = {item: [] for item in NEW}
    splits = data.splits
    for user in range(len(splits.user_ids)):
        history = splits.histories.events[splits.histories.offsets[user] : splits.train_stop[user]]
        ids = [new.item_ids[event] for event in history]
        for (a, one), (b, other) in itertools.permutations(enumerate(ids), 2):
            if abs(a - b) <= grow.REACH and one in NEW and other not in NEW:
                expected[one].append(rows[new.item_ids.index(other)])
    wanted = {item: torch.stack(near).mean(0) for item, near in expected.items() if near}
    assert wanted
    counts = grow.begin_new_items(rows, is_new, data, by_features=False)
    assert counts["from_neighbours"] == len(wanted)
    for item, mean in wanted.items():
        torch.testing.assert_close(rows[new.item_ids.index(item)], mean)
    rest = [new.item_ids.index(item) for item in NEW if item not in wanted]
    everything = rows[torch.from_numpy(~is_new)].mean(0)
    for row in rest:
        torch.testing.assert_close(rows[row], everything)


def test_a_new_item_begins_from_items_of_similar_features():
    before = Interactions(interactions=without(clicks()), **FEATURES)
    data = Interactions(interactions=clicks(), **FEATURES)
    old, new = model_of(before), model_of(data, seed=1)
    grow.take_over(new, old, "x")
    rows = new.tokenizer.embedding.weight.detach()[1:]
    is_new = np.isin(new.item_ids, NEW)
    counts = grow.begin_new_items(rows, is_new, data, by_features=True)
    assert counts == {"from_neighbours": 0, "from_features": 3}
    table = {row["item_id"]: row for row in ITEMS.iter_rows(named=True)}
    scale = data.splits.item_schema.numeric[0].std
    for item in NEW:
        alike = {
            other: (table[other]["kind"] == table[item]["kind"])
            - abs(table[other]["price"] - table[item]["price"]) / scale
            for other in new.item_ids
            if other not in NEW
        }
        best = sorted(alike, key=lambda other: -alike[other])[: grow.N_ALIKE]
        if sorted(alike.values())[-grow.N_ALIKE - 1] == alike[best[-1]]:
            continue  # a tie at the last place
        mean = torch.stack([rows[new.item_ids.index(other)] for other in best]).mean(0)
        torch.testing.assert_close(rows[new.item_ids.index(item)], mean)


def test_rows_of_categories_go_by_name_on_both_sides():
    people = pl.DataFrame(
        {"user_id": [f"u{u}" for u in range(40)], "town": [f"t{u % 4}" for u in range(40)]}
    )
    kinds = ITEMS.with_columns(kind=pl.col("kind").replace({"k1": "k9"}))

    def data(users, items):
        return TableData(
            interactions=clicks(40).select("user_id", "item_id"), users=users, items=items,
            user_categorical=["town"], item_categorical=["kind"], min_relevant=1,
        )  # fmt: skip

    torch.manual_seed(0)
    old = TwoTower.for_data(data(people, ITEMS), backbone=Mamba(d_model=8, n_layers=1))
    moved = people.with_columns(town=pl.col("town").replace({"t0": "t7"}))
    new = TwoTower.for_data(data(moved, kinds), backbone=Mamba(d_model=8, n_layers=1))
    grow.take_over(new, old, "x")
    for name, names in new.row_names().items():
        before, known = dict(old.named_parameters())[name], old.row_names()[name]
        for each, parameter in zip(names, dict(new.named_parameters())[name], strict=True):
            if each in known:
                assert torch.equal(parameter, before[known.index(each)]), each
            else:
                assert each[1] in ("t7", "k9")
                same = [known.index(other) for other in known if other[0] == each[0]]
                torch.testing.assert_close(parameter, before[same].mean(0))
    everything = {each for names in new.row_names().values() for each in names}
    assert {("town", "t7"), ("kind", "k9"), ("town", "t1"), ("kind", None)} <= everything


def test_another_architecture_is_one_line(both):
    _, old, data, _ = both
    wide = NextItem.for_data(data, backbone=Mamba(d_model=16, n_layers=1))
    with pytest.raises(
        UserError, match=r"init_from=r: a run of another architecture: backbone.* \(16, 16\) there"
    ):
        grow.take_over(wide, old, "init_from=r")
    deep = NextItem.for_data(data, backbone=Mamba(d_model=8, n_layers=2))
    with pytest.raises(UserError, match="is absent there and"):
        grow.take_over(deep, old, "init_from=r")


def test_figures_before_and_after_are_those_of_recommend(both):
    _, old, data, new = both
    grow.take_over(new, old, "x")
    place = old.index_of(new.ids)
    new.evaluate(data)
    growth = grow.Growth("runs/x", old, place, {"old": 17, "new": 3, "dropped": 1})
    done = grow.compare(growth, new, data)
    splits = data.splits
    counts = splits.item_counts.tolist()
    by_count = sorted(range(len(counts)), key=lambda item: -counts[item])
    hits = {(kind, by): [] for kind in ("old", "new") for by in ("before", "after", "popularity")}
    for user, event in zip(*splits.test, strict=True):
        history = [
            splits.item_ids[i]
            for i in splits.histories.events[splits.histories.offsets[user] : event]
        ]
        target = splits.item_ids[splits.histories.events[event]]
        kind = "new" if target in NEW else "old"
        tops = {
            by: model.recommend([history], k=10, filter_seen=new.filter_seen)["item"].to_list()
            for by, model in (("before", old), ("after", new))
        }
        tops["popularity"] = [
            splits.item_ids[i]
            for i in by_count
            if not (new.filter_seen and splits.item_ids[i] in history)
        ][:10]
        for by, top in tops.items():
            hits[kind, by].append(1 / math.log2(top.index(target) + 2) if target in top else 0)
    for (kind, by), gains in hits.items():
        if (kind, by) == ("new", "before"):
            assert by not in done[kind]
            continue
        assert done[kind]["n_users"] == len(gains) > 0
        assert done[kind][by]["ndcg@10"] == pytest.approx(np.mean(gains))
        assert done[kind][by]["hr@10"] == pytest.approx(np.mean(np.array(gains) > 0))
    assert sum(done[kind]["n_users"] for kind in ("old", "new")) == splits.test.user.size


# Through the commands

SMALL = (
    "dataset=interactions", "dataset.interactions=clicks.csv", "backbone=mamba", "backbone.d_model=8",
    "dataset.max_length=8", "dataset.batch_positions=128", "trainer.enable_progress_bar=false", "logger=none",
    "trainer.max_epochs=2",
)  # fmt: skip
HELD = "dataset.filter=\"item_id not in ['i3','i11','i17']\""


@pytest.fixture
def run(cli, tmp_path: Path, monkeypatch):
    """Train ``runs/before`` without three items; return the command with its files in place."""
    clicks().write_csv(tmp_path / "clicks.csv")
    outcome = cli("train", *SMALL, "name=before", HELD)
    assert outcome.code == 0, outcome.text
    return cli


def only(folder: Path, name: str) -> dict:
    [path] = folder.glob(f"runs/{name}/*/metrics.json")
    return json.loads(path.read_text())


def test_a_run_grows_by_the_command(run, tmp_path):
    outcome = run("train", *SMALL, "name=after", "init_from=before", "dataset.since=3000")
    assert outcome.code == 0, outcome.text
    assert (
        "17 items taken over by id, 3 new (3 from the mean of their neighbours), 0 dropped"
        in outcome.text
    )
    assert "training events are targets, earlier ones are history alone" in outcome.text
    table = outcome.out[outcome.out.index("items, begun from") :]
    for word in ("before", "after", "popularity", "old", "new"):
        assert word in table
    results = only(tmp_path, "after")
    growth = results["growth"]
    assert growth["items"] == {"old": 17, "new": 3, "dropped": 0, "from_neighbours": 3}
    both = [(growth[kind]["n_users"], growth[kind]["after"]["hr@10"]) for kind in ("old", "new")]
    mean = sum(n * value for n, value in both) / sum(n for n, _ in both)
    assert mean == pytest.approx(results["metrics"]["hr@10"])
    [folder] = (tmp_path / "runs" / "after").iterdir()
    # The run stands by itself: it is tested and goes on without the one it began from.
    (tmp_path / "runs" / "before").rename(tmp_path / "moved")
    outcome = run("evaluate", f"run={folder}", "output_dir=again")
    assert outcome.code == 0, outcome.text
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["metrics"] == results["metrics"]


def test_a_smaller_catalogue_drops_items(run, tmp_path):
    outcome = run(
        "train", *SMALL, "name=after", "init_from=before", "dataset.filter='item_id != \"i4\"'"
    )
    assert outcome.code == 0, outcome.text
    assert only(tmp_path, "after")["growth"]["items"]["dropped"] == 1


def test_a_stopped_growth_goes_on_from_its_own_checkpoint(run, tmp_path):
    grown = ("name=after", "init_from=before", "output_dir=runs/after/1")
    assert run("train", *SMALL, *grown, "trainer.max_epochs=1").code == 0
    outcome = run("train", *SMALL, *grown, "ckpt_path=last", "output_dir=runs/after/1")
    assert outcome.code == 0, outcome.text
    assert (
        run("train", *SMALL, "name=whole", "init_from=before", "output_dir=runs/whole/1").code == 0
    )
    one, other = (
        json.loads((tmp_path / "runs" / name / "1" / "metrics.json").read_text())
        for name in ("after", "whole")
    )
    assert one["metrics"] == other["metrics"] and one["growth"] == other["growth"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("init_from=nowhere",), "init_from=nowhere: no checkpoints/best.ckpt in it"),
        (
            ("init_from=before", "backbone.d_model=16"),
            "init_from=before: a run of another architecture",
        ),
        (("init_from=before", "init_items=luck"), "init_items=luck: expected one of neighbours"),
        (("init_from=before", "init_items=features"), "the dataset's items have no features"),
        (("dataset.since=99999999",), "dataset.since=99999999: no user has an event to train on"),
        (("dataset.since=today",), "dataset.since=today: the times are numbers"),
        (("dataset.since=1", "dataset.timestamp=null"), "dataset.since: name the column of times"),
        (
            ("dataset.since=1", "dataset.objective=masked", "backbone=hydra"),
            "dataset.since=1: with dataset.objective=masked",
        ),
    ],
)
def test_mistakes_are_one_line(run, options, message):
    outcome = run("train", *SMALL, "name=after", *options)
    assert outcome.code == 1 and message in outcome.err and "Traceback" not in outcome.text
