"""Files to histories: formats, order of time, splits, filters, item features, the cache, mistakes."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import polars as pl
import pytest
import torch
from events import (
    IN_ORDER,
    frame,
    held_out,
    histories,
    lines,
    splits_of,
    timed,
    trained,
    write,
)
from omegaconf import OmegaConf

from recsys_ssm.batches import START
from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.data import files
from recsys_ssm.data.columns import coded_keys
from recsys_ssm.data.files import Compact, collect
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.errors import UserError
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.assemble import make_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def table(tmp_path) -> Path:
    frame().write_csv(tmp_path / "rows.csv")
    return tmp_path / "rows.csv"


# Leave one out


def test_times_that_differ_by_one_nanosecond_are_told_apart(tmp_path):
    start = 1_600_000_000_000_000_000
    rows = [("u", "abcd"[3 - i], 1, start + 3 - i) for i in range(4)]
    path = write(tmp_path / "x.csv", lines(rows, header="user_id,item_id,rating,timestamp\n"))
    assert histories(splits_of(path)) == {"u": list("abcd")}


def test_leave_one_out(table):
    splits = splits_of(table)
    assert trained(splits) == {"u1": ["a", "b"], "u2": ["b"], "u3": ["e", "a"]}
    assert held_out(splits, "val") == {"u1": ("c", ["a", "b"]), "u2": ("a", ["b"])}
    assert held_out(splits, "test") == {"u1": ("d", ["a", "b", "c"]), "u2": ("d", ["b", "a"])}
    counts = dict(zip(splits.item_ids, splits.item_counts.tolist(), strict=True))
    assert counts == {"a": 2, "b": 2, "c": 0, "d": 0, "e": 1}
    assert any(
        "1 users with fewer than 3 events: trained on, not evaluated" in n for n in splits.notes
    )
    assert any(n.startswith("2 items have no training event") for n in splits.notes)
    assert not any("had before" in note for note in splits.notes)


def test_equal_times_keep_the_order_of_the_file(tmp_path):
    """Enough rows that an unstable sort would show: thousands of users, all times tied."""
    generator = np.random.default_rng(0)
    user = generator.integers(0, 500, 20_000)
    item = generator.integers(0, 1000, 20_000)
    time = generator.integers(0, 3, 20_000)
    pl.DataFrame({"user_id": user, "item_id": item, "timestamp": time}).write_csv(
        tmp_path / "x.csv"
    )
    splits = splits_of(tmp_path / "x.csv", duplicates="keep")
    expected = {
        str(u): [str(i) for t in range(3) for i in item[(user == u) & (time == t)]]
        for u in range(500)
    }
    assert histories(splits) == expected


def test_the_official_file_of_movielens_1m_with_its_ties(tmp_path):
    """The layout of ratings.dat: users one after another, times descending here and there, many equal."""
    text = (
        "1::1193::5::978300760\n1::661::3::978302109\n1::914::3::978301968\n"
        "1::3408::4::978300275\n1::2355::5::978824291\n1::1197::3::978302268\n"
        "1::1287::5::978302039\n1::2804::5::978300719\n1::594::4::978302268\n"
        "1::919::4::978301368\n2::1357::5::978298709\n2::3068::4::978299000\n"
        "2::1537::4::978299620\n2::647::3::978299351\n2::2194::4::978299297\n"
        "2::648::4::978299913\n2::2268::5::978299297\n2::2628::3::978300051\n"
    )
    splits = splits_of(write(tmp_path / "ratings.dat", text))
    assert histories(splits) == {
        "1": ["3408", "2804", "1193", "919", "914", "1287", "661", "1197", "594", "2355"],
        "2": ["1357", "3068", "2194", "2268", "647", "1537", "648", "2628"],
    }
    assert held_out(splits, "test")["1"][0] == "2355" and held_out(splits, "val")["1"][0] == "594"


# By time


TIMED = [
    *(("u1", i, t) for i, t in (("a", 1), ("b", 2), ("c", 11), ("d", 12), ("e", 21), ("f", 22))),
    *(("u2", i, t) for i, t in (("a", 3), ("b", 9), ("e", 20))),
    *(("u3", i, t) for i, t in (("a", 10), ("d", 15))),
    *(("u4", i, t) for i, t in (("a", 4), ("d", 10), ("g", 19), ("a", 30))),
    ("u5", "b", 25),
    *(("u6", i, t) for i, t in (("a", 5), ("b", 6))),
]


def test_split_by_time(tmp_path):
    path = timed(tmp_path, TIMED)
    splits = splits_of(path, split="time", val_from=10, test_from=20)
    assert trained(splits) == {
        "u1": ["a", "b"],
        "u2": ["a", "b"],
        "u3": [],
        "u4": ["a"],
        "u5": [],
        "u6": ["a", "b"],
    }
    # The first event of the period, from all before the period; the rest of the period is not a target.
    assert held_out(splits, "val") == {"u1": ("c", ["a", "b"]), "u4": ("d", ["a"])}
    assert held_out(splits, "test") == {
        "u1": ("e", ["a", "b", "c", "d"]),
        "u2": ("e", ["a", "b"]),
        "u4": ("a", ["a", "d", "g"]),
    }
    assert any(
        "validation: 2 users" in n and "1 users without an earlier event" in n for n in splits.notes
    )
    assert any(
        "test: 3 users" in n and "1 users without an earlier event" in n for n in splits.notes
    )
    counts = dict(zip(splits.item_ids, splits.item_counts.tolist(), strict=True))
    assert counts == {"a": 4, "b": 3, "c": 0, "d": 0, "e": 0, "f": 0, "g": 0}


def test_no_event_of_training_is_as_late_as_one_that_is_predicted(tmp_path):
    generator = np.random.default_rng(0)
    n = 4000
    made = pl.DataFrame(
        {
            "user_id": generator.integers(0, 200, n),
            "item_id": np.arange(n),  # an item is one row: its time is known
            "timestamp": generator.integers(0, 300, n),
        }
    )
    made.write_csv(tmp_path / "x.csv")
    time = dict(made.select(pl.col("item_id").cast(pl.String), "timestamp").rows())
    splits = splits_of(tmp_path / "x.csv", split="time", val_share=0.2, test_share=0.1)
    latest = max(time[i] for items in trained(splits).values() for i in items)
    validated, tested = (
        [time[t] for t, _ in held_out(splits, part).values()] for part in ("val", "test")
    )
    assert latest < min(validated) and max(validated) < min(tested)
    assert int(splits.item_counts.sum()) == pytest.approx(0.7 * n, rel=0.02)
    assert len(tested) > 100
    for target, history in held_out(splits, "test").values():
        assert max(time[i] for i in history) < min(tested) <= time[target]


def test_instants_may_be_dates(tmp_path):
    rows = [(u, i, f"2020-01-{t:02d}") for u, i, t in TIMED]
    dated = splits_of(
        timed(tmp_path, rows), split="time", val_from="2020-01-10", test_from="2020-01-20 00:00:00"
    )
    assert held_out(dated, "val") == {"u1": ("c", ["a", "b"]), "u4": ("d", ["a"])}
    assert len(held_out(dated, "test")) == 3


# Filters


def test_ratings_below_the_least_are_no_events(table):
    splits = splits_of(table, rating="rating", min_rating=4)
    assert histories(splits) == {"u1": ["a", "c", "d"], "u2": ["a", "d"]}
    assert any("4 rows with rating below 4 dropped" in note for note in splits.notes)


def test_what_counts_once(tmp_path):
    rows = [
        *[("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("u", "a", 3), ("u", "c", 4), ("u", "b", 5)],
        *[("v", i, t) for t, i in enumerate("abcd")],
    ]
    path = timed(tmp_path, rows)
    expected = {"identical": "abacb", "keep": "abaacb", "first": "abc", "last": "acb"}
    for duplicates, kept in expected.items():
        splits = splits_of(path, duplicates=duplicates)
        before = any(
            "1 users are tested on an item they had before" in note for note in splits.notes
        )
        assert before == (duplicates in ("identical", "keep"))
        assert histories(splits) == {"u": list(kept), "v": list("abcd")}, duplicates
        dropped = 6 - len(kept)
        told = [note for note in splits.notes if f"(duplicates={duplicates})" in note]
        assert bool(told) == bool(dropped) and all(f"{dropped} rows" in note for note in told)
    # Without times a repetition is an event.
    splits = splits_of(path, timestamp=None)
    assert histories(splits)["u"] == list("abaacb")
    assert histories(splits_of(path, timestamp=None, duplicates="last"))["u"] == list("acb")


def test_core_is_what_is_left_when_nothing_more_falls_out(tmp_path):
    generator = np.random.default_rng(1)
    pairs = {
        (int(u), int(i))
        for u, i in zip(generator.zipf(1.4, 900) % 70, generator.zipf(1.3, 900) % 60, strict=True)
    }
    rows = [(f"u{u}", f"i{i}", n) for n, (u, i) in enumerate(sorted(pairs))]
    splits = splits_of(timed(tmp_path, rows), k_core=4)
    left = list(rows)
    while True:  # one user or item at a time
        count: dict[str, int] = {}
        for u, i, _ in left:
            count[u], count[i] = count.get(u, 0) + 1, count.get(i, 0) + 1
        few = [key for key, n in count.items() if n < 4]
        if not few:
            break
        left = [row for row in left if few[0] not in row[:2]]
    assert 0 < len(left) < len(rows)
    assert {(u, i) for u, items in histories(splits).items() for i in items} == {
        r[:2] for r in left
    }
    note = next(note for note in splits.notes if note.startswith("k_core=4"))
    assert f"{len(rows) - len(left)} events" in note
    with pytest.raises(UserError, match=r"dataset\.k_core=50 leaves none of"):
        splits_of(timed(tmp_path, rows), k_core=50)


# Item features


def test_item_features_are_learnt_from_training_items(tmp_path, table):
    write(
        tmp_path / "items.csv",
        "item_id,price,kind\na,1,x\nb,3,y\nc,100,z\ne,2,x\nzz,5,q\n",
    )
    data = Interactions(
        interactions="rows.csv",
        root=tmp_path,
        items="items.csv",
        item_numeric=["price"],
        item_categorical=["kind"],
    )
    schema, items = data.splits.item_schema, data.splits.items
    assert schema.numeric[0].mean == 2 and schema.categorical[0].values == ("x", "y")
    # Kind z is of no training item, and d is not in the file.
    assert items.categorical[:, 0].tolist() == [1, 2, 0, 0, 1]
    assert items.numeric[:, 0].tolist() == pytest.approx([-1.2247, 1.2247, 120.02, 0, 0], rel=1e-3)
    notes = "\n".join(data.splits.notes)
    assert (
        "1 items of the interactions are not in it, for example 'd': kept, their features missing"
        in notes
    )
    assert "1 items without an interaction: not in the catalogue" in notes


def test_item_tables_of_recbole_and_movielens(tmp_path, table):
    write(
        tmp_path / "x.item",
        'item_id:token\tname:token_seq\tyear:float\na\tA "b\t1990\nb\tB\t1992\n',
    )
    splits = splits_of(table, items=tmp_path / "x.item", item_numeric="year")
    assert splits.items.numeric[:2, 0].tolist() == [-1, 1]
    (tmp_path / "movies.dat").write_bytes(
        "a::Café (1990)::Drama\nb::B::Comedy|Drama\n".encode("latin-1")
    )
    splits = splits_of(
        table,
        items=tmp_path / "movies.dat",
        item_categorical=["genres"],
        item_names=["item_id", "title", "genres"],
    )
    assert splits.item_schema.categorical[0].values == ("Comedy|Drama", "Drama")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "item_id,price\na,1\na,2\n",
            "row 2, column 'item_id': 'a' is the id of row 1 already",
        ),
        ("item_id,price\nq,1\n", "none of the 5 items of the interactions is in it"),
        ("item_id,price\na,much\n", "row 1, column 'price': 'much' is not a finite number"),
        ("item_id,cost\na,1\n", "no column 'price'"),
    ],
)
def test_mistakes_in_the_item_table(tmp_path, table, text, message):
    write(tmp_path / "items.csv", text)
    with pytest.raises(UserError, match=message):
        splits_of(table, items=tmp_path / "items.csv", item_numeric=["price"])


# Data frames


def test_data_frames_stand_in_place_of_files(tmp_path, table):
    items = pl.DataFrame({"item_id": list("abcde"), "price": [1, 2, 3, 4, 5]})
    of_files = splits_of(table)
    data = Interactions(interactions=frame(), items=items, item_numeric="price")
    assert histories(data.splits) == histories(of_files) == IN_ORDER
    assert held_out(data.splits, "test") == held_out(of_files, "test")
    assert data.splits.items.numeric.shape == (5, 1)
    assert set(data.sources) == {"interactions", "items"}
    user_ids, item_ids, (events, _) = data.read_histories(frame())
    assert user_ids.to_list() == ["u1", "u2", "u3"]
    assert [item_ids[i] for i in events[:4]] == list("abcd")
    for change, message in (
        (frame().drop("item_id"), "interactions: no column 'item_id'; its columns are user_id"),
        (frame().with_columns(timestamp=None), "interactions: column 'timestamp' holds Null"),
        (frame().clear(), "interactions: the data frame has no row"),
        (frame()[:2], "interactions: no validation user is left"),
    ):
        with pytest.raises(UserError, match=message):
            splits_of(change)


def test_the_file_of_item_features_may_call_its_ids_otherwise(table):
    items = pl.DataFrame({"asin": list("abcde"), "kind": list("xxyzy")})
    splits = splits_of(table, items=items, items_id="asin", item_categorical=["kind"])
    assert splits.items.categorical[:, 0].tolist() == [1, 1, 2, 0, 2]


def test_sources_are_the_hashes_of_the_files(tmp_path, table):
    items = write(tmp_path / "items.csv", "item_id,kind\na,x\nb,y\n")
    data = Interactions(interactions=table, items=items, item_categorical=["kind"])
    assert data.sources == {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (table, items)
    }


def test_times_that_are_compared_as_text_are_noted(tmp_path):
    days = ("2020-01-01", "2020-01-02 noon", "2020-01-03", "2020-01-03")
    rows = [("u", item, day) for item, day in zip("abcd", days, strict=True)]
    splits = splits_of(timed(tmp_path, rows))
    assert histories(splits) == {"u": list("abcd")}
    assert any("is compared as text: '2020-01-02 noon' only" in note for note in splits.notes)


# Mistakes

HEADER = "user_id,item_id,rating,timestamp\n"


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("x.csv", "", {}, "the file is empty"),
        ("x.csv", HEADER, {}, "no row below the header line"),
        ("x.csv", lines(header="user,item_id,rating,timestamp\n"), {}, "no column 'user_id'; its"),
        (
            "x.csv",
            lines(),
            {},
            "if the file has no header line, name its columns with dataset.names",
        ),
        ("x.csv", lines(header=HEADER), {"timestamp": "when"}, "no column 'when'"),
        (
            "x.csv",
            lines(),
            {"names": ["user_id", "item_id"]},
            "dataset.names names 2 columns, but the file has 4",
        ),
        ("x.csv", HEADER + "u,a,1,1\n,b,1,2\n", {}, "row 2, column 'user_id': empty"),
        (
            "x.csv",
            HEADER + "u,a,1,1\nu,b,1,soon\nu,c,1,3\n",
            {},
            "row 2, column 'timestamp': 'soon' is not a time",
        ),
        (
            "x.csv",
            HEADER + "u,a,1,1\nu,b,1,\n",
            {},
            "row 2, column 'timestamp': empty; give numbers",
        ),
        (
            "x.csv",
            HEADER + "u,a,1,now\nu,b,1,soon\n",
            {},
            "row 1, column 'timestamp': 'now' is not a time",
        ),
        (
            "x.csv",
            HEADER + "u,a,1,1\nu,b,1,nan\n",
            {},
            "row 2, column 'timestamp': 'nan' is not a time",
        ),
        (
            "x.csv",
            HEADER + "u,a,good,1\nu,b,1,2\n",
            {"rating": "rating", "min_rating": 3},
            "row 1, column 'rating': 'good' is not a finite number; every row needs a number",
        ),
        (
            "x.csv",
            HEADER + "u,a,3,1\nu,b,,2\n",
            {"rating": "rating", "min_rating": 3},
            "row 2, column 'rating': empty; every row needs a number .dataset.min_rating",
        ),
        (
            "x.csv",
            HEADER + "u,a,3,1\nu,b,2,2\n",
            {"rating": "rating", "min_rating": 4},
            "no rating is 4 or more, the highest is 3; lower dataset.min_rating",
        ),
        ("x.csv", HEADER + "u,a,1,1\nv,a,1,2\n", {}, "no training pair is left"),
        ("x.csv", HEADER + "u,a,1,1\nu,a,1,2\n", {}, "no validation user is left"),
        ("x.txt", "", {}, "the file is empty"),
        ("x.txt", "\n \n", {}, "every line is blank"),
        ("x.txt", "1 2 3 4\n2\n", {}, "line 2: one id alone \\('2'\\)"),
        ("x.txt", "1 2 3 4\n", {"split": "time"}, "a sequence text has no times"),
        ("x.txt", "1 2 3\n", {"rating": "r", "min_rating": 3}, "a sequence text has no ratings"),
        ("x.dat", "1::2::3::4\n1::2\n", {}, "row 2, column 'timestamp': empty; give numbers"),
        ("x.dat", "1,2\n", {}, "no column 'user_id'; its columns are 1, 2; .* with dataset.names"),
        (
            "x.inter",
            "user_id:token\titem:token\ttimestamp:float\n1\t2\t3\n",
            {},
            "no column 'item_id'",
        ),
        ("x.parquet", "no parquet", {}, "not a readable Parquet file"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_place(tmp_path, name, text, options, message):
    path = write(tmp_path / name, text)
    with pytest.raises(UserError, match=message) as caught:
        splits_of(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"1 2 \xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8"):
        splits_of(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interactions": None}, "dataset.interactions: not set"),
        ({"format": "xml"}, "dataset.format=xml: expected one of csv"),
        ({"duplicates": "some"}, "dataset.duplicates=some"),
        ({"split": "random"}, "dataset.split=random: expected one of leave_one_out, time"),
        ({"k_core": -1}, "dataset.k_core=-1"),
        ({"user": "x", "item": "x"}, "both are 'x'"),
        ({"min_rating": 3}, "name the column of ratings with dataset.rating"),
        ({"split": "time", "timestamp": None}, "name the column of times"),
        ({"val_share": 0}, "dataset.val_share=0"),
        ({"val_share": 0.5, "test_share": 0.5}, "leave some events to train on"),
        ({"split": "time", "val_from": 3}, "give both instants, or neither"),
        ({"val_from": 3, "test_from": 4}, "dataset.val_from: needs dataset.split=time"),
        ({"item_numeric": ["price"]}, "dataset.items: not set"),
        ({"items": "items.csv"}, "name its feature columns"),
        ({"download": {"url": "https://x"}}, "expected url, md5 and member, got url"),
        ({"max_length": 0}, "dataset.max_length=0"),
        ({"batch_positions": 10}, "dataset.batch_positions=10"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Interactions(**{"interactions": "x.csv", **options})


@pytest.mark.parametrize(
    ("instants", "message"),
    [
        ((20, 20), "let the test begin later"),
        (("soon", 20), "dataset.val_from=soon: the times are numbers"),
    ],
)
def test_impossible_instants(tmp_path, instants, message):
    with pytest.raises(UserError, match=message):
        splits_of(timed(tmp_path, TIMED), split="time", val_from=instants[0], test_from=instants[1])


# Named files, fetching


def test_the_first_file_that_is_there_is_read(tmp_path, table):
    data = Interactions(interactions=["none.inter", "rows.csv"], root=tmp_path)
    assert histories(data.splits) == IN_ORDER
    absent = Interactions(interactions=["a.inter", "b.csv"], root=tmp_path, source="example.org")
    with pytest.raises(UserError, match="is a folder; name the file in it"):
        splits_of(tmp_path)
    with pytest.raises(UserError) as caught:
        _ = absent.splits
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a.inter'}: no such file")
    assert (
        "put a.inter or b.csv there, from example.org, or name another folder with dataset.root"
        in text
    )


NAMED = sorted(
    path.stem
    for path in (CONF_DIR / "dataset").glob("*.yaml")
    if "root: ${oc.env:RECSYS_SSM_DATA" in path.read_text() and "interactions:" in path.read_text()
)


def write_official(path: Path) -> None:
    """The same events in the layout that a file of this name has officially."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {
        ".txt": "".join(f"{user} {' '.join(items)}\n" for user, items in IN_ORDER.items()),
        ".inter": lines(
            separator="\t", header="user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        ),
        ".dat": lines(separator="::"),
        ".data": lines(separator="\t"),
        ".csv": lines(header="user_id,parent_asin,rating,timestamp\n")
        if "2023" in str(path)
        else lines(),
    }[next(suffix for suffix in path.suffixes if suffix != ".gz")]
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


@pytest.mark.parametrize("name", NAMED)
def test_named_datasets_read_their_official_layouts(tmp_path, monkeypatch, name):
    register_resolvers()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = hydra.compose("train", [f"dataset={name}", "++dataset.download=null", "name=x"])
    monkeypatch.setenv("RECSYS_SSM_DATA", str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"no such file .* put .* there, from "):
        _ = make_data(cfg).splits
    OmegaConf.update(cfg, "dataset.k_core", 0, force_add=True)
    for file in cfg.dataset.interactions:
        write_official(tmp_path / "data" / file)
        data = make_data(cfg)
        assert histories(data.splits) == IN_ORDER, file
        assert data.name == name
        (tmp_path / "data" / file).unlink()


def test_there_are_as_many_named_datasets_as_promised():
    years = {"beauty": (2014, 2023), "games": (2014, 2023), "sports": (2014,), "toys": (2014,)}
    amazon = {f"amazon_{what}_{year}" for what, of in years.items() for year in of}
    assert amazon | {"ml_100k", "ml_1m"} <= set(NAMED)


# Real files


@pytest.mark.parametrize(
    ("file", "users", "items", "events"),
    [
        ("amazon-2014/Beauty.txt", 22_363, 12_101, 198_502),
        ("amazon-2014/Sports_and_Outdoors.txt", 35_598, 18_357, 296_337),
        ("ml-100k/ml-100k.inter", 943, 1_682, 100_000),
        ("ml-1m/ml-1m.txt", 6_040, 3_416, 999_611),
    ],
)
def test_counts_of_real_files(shared_data, file, users, items, events):
    if not (shared_data / file).is_file():
        pytest.skip(f"no {file} in the data folder")
    data = Interactions(interactions=shared_data / file, k_core=0 if "100k" in file else 5)
    splits = data.splits
    assert (splits.user_ids.len(), len(splits.item_ids)) == (users, items)
    assert splits.histories.events.size == events
    assert splits.test.user.size == splits.val.user.size == users
    assert int(splits.item_counts.sum()) == events - 2 * users
    assert len(data.train_dataloader().windows) == (np.diff(splits.histories.offsets) > 3).sum()
    if file.endswith(".txt"):
        first = (shared_data / file).read_text().splitlines()[0].split()
        assert histories(splits)[first[0]] == first[1:]


@pytest.mark.parametrize(
    ("file", "row_length"), [("amazon-2014/Beauty.txt", 50), ("ml-100k/ml-100k.inter", 100)]
)
def test_little_padding_on_real_files(shared_data, file, row_length):
    data = Interactions(interactions=shared_data / file, row_length=row_length)
    for loader in (data.train_dataloader(), data.test_dataloader()):
        cells = valid = 0
        for batch in loader:
            cells, valid = cells + batch.item.numel(), valid + int((batch.item >= 0).sum())
        assert 1 - valid / cells < 0.03


# Memory

_PEAK = """
import resource, sys
from recsys_ssm.data.interactions import Interactions
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = Interactions(interactions=sys.argv[1], objective="last")
before = peak()
next(iter(data.train_dataloader()))
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_two_million_rows_are_prepared_and_served_in_bounded_memory(tmp_path):
    """60 MB of CSV; prefixes of 50 items each, copied, would be 800 MB (8 bytes an item)."""
    generator = np.random.default_rng(0)
    n = 2_000_000
    made = pl.DataFrame(
        {
            "user_id": generator.integers(10**9, 10**9 + 20_000, n),
            "item_id": generator.integers(10**6, 10**6 + 30_000, n),
            "timestamp": generator.integers(1_500_000_000, 1_600_000_000, n),
        }
    )
    made.write_csv(tmp_path / "x.csv")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "x.csv")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "POLARS_MAX_THREADS": "2"},
    )
    assert int(done.stdout) < 500e6


# Columns in little memory


def _mixed(rng: np.random.Generator, times: list[str], n: int = 400) -> list[tuple[str, ...]]:
    """Return rows of ids in many spellings, equal times and repeated rows."""
    users = ["007", "7", "u 1", "ü", "12.0", "Ω" * 70, "NaNa", "-3", "1e5"]
    items = [str(number) for number in range(30)] + ["x", "X"]
    rows = [
        (rng.choice(users), rng.choice(items), str(rng.integers(1, 6)), rng.choice(times))
        for _ in range(n)
    ]
    return [*rows, *rows[: n // 4]]


_TIMES = {
    "numbers": [str(number) for number in range(50, 90)],
    "later floats": [*(str(number) for number in range(50, 60)), "61.5", " 62 "],
    "dates": [f"2024-05-{day:02}" for day in range(1, 29)],
    "instants": [f"2024-05-{day:02}T10:{day:02}:00+02:00" for day in range(1, 29)],
    "texts": [f"2024-05-{day:02}, evening" for day in range(1, 29)],
}


@pytest.mark.parametrize("kind", _TIMES)
@pytest.mark.parametrize("name", ["x.csv", "x.inter", "x.parquet"])
@pytest.mark.parametrize("duplicates", ["identical", "first", "last", "keep"])
def test_reading_in_little_memory_changes_nothing(tmp_path, monkeypatch, kind, name, duplicates):
    rows = _mixed(np.random.default_rng(3), _TIMES[kind])
    if kind == "later floats":
        rows.sort(
            key=lambda row: "." in row[3]
        )  # numbers first: the choice by the first rows is wrong
    path = tmp_path / name
    if path.suffix == ".parquet":
        frame(rows).write_parquet(path)
    else:
        types = (":token", ":token", ":float", ":float") if path.suffix == ".inter" else ("",) * 4
        names = ("user_id", "item_id", "rating", "timestamp")
        mark = "\t" if path.suffix == ".inter" else ","
        cells = [[name + kind for name, kind in zip(names, types, strict=True)], *rows]
        if mark == ",":
            cells = [[f'"{cell}"' if "," in cell else cell for cell in line] for line in cells]
        write(path, "".join(mark.join(line) + "\n" for line in cells))
    options = {"rating": "rating", "min_rating": 3, "duplicates": duplicates}
    monkeypatch.setattr(files, "_HEAD", 40)
    found = _prepared(path, tmp_path / "a", options)
    monkeypatch.setattr(
        Compact, "collect", lambda self, frame, path, **options: collect(frame, path, **options)
    )
    expected = _prepared(path, tmp_path / "b", options)
    assert found.notes == expected.notes
    assert found.item_ids == expected.item_ids
    assert found.user_ids.to_list() == expected.user_ids.to_list()
    for one, other in (
        (found.histories, expected.histories),
        (found.val, expected.val),
        (found.test, expected.test),
    ):
        for array, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, same)
    np.testing.assert_array_equal(found.train_stop, expected.train_stop)


def _prepared(path, cache, options):
    return Interactions(interactions=path, cache_dir=cache, **options).splits


def test_columns_that_repeat_are_codes_and_others_are_not(tmp_path):
    rows = [(f"u{n % 5}", f"i{n % 3}", n % 2, 10**9 + n, f"t{n}") for n in range(300)]
    names = ["user_id", "item_id", "rating", "timestamp", "title"]
    path = write(tmp_path / "x.csv", lines(rows, header=",".join(names) + "\n"))
    compact = Compact(names[:2], ["rating", "timestamp", "title"])
    table = files.read_table(path, columns=names, compact=compact)
    kinds = [type(kind) if isinstance(kind, pl.Categorical) else kind for kind in table.dtypes]
    assert kinds == [pl.Categorical, pl.Categorical, pl.Int64, pl.Int64, pl.String]
    plain = files.read_table(path, columns=names)
    assert table.cast(pl.String).equals(plain)


@pytest.mark.parametrize("kind", [pl.Categorical, pl.Enum, pl.Int32, pl.UInt64, pl.Int64])
def test_ids_of_any_kind_get_the_codes_of_their_sorted_texts(kind):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 40, 500)
    cells = pl.Series("id", values)
    if kind is pl.Enum:
        kind = pl.Enum([str(value) for value in rng.permutation(40)])
        cells = cells.cast(pl.String)
    elif kind is pl.Categorical:
        cells = cells.cast(pl.String)
    codes, ids = coded_keys(cells.cast(kind).to_frame(), "id", "x")
    assert codes.dtype == np.int32
    assert ids.to_list() == sorted({str(value) for value in values})
    assert [ids[int(code)] for code in codes] == [str(value) for value in values]
    wide = pl.DataFrame({"id": [2**60, -5, 2**60, 7]})
    codes, ids = coded_keys(wide, "id", "x")
    assert [ids[int(code)] for code in codes] == [str(2**60), "-5", str(2**60), "7"]


@pytest.mark.parametrize(
    ("cell", "message"), [("", "row 4, column 'item_id': empty"), ("NULL", "row 4, column")]
)
def test_a_wrong_id_among_codes_is_named_by_its_row(tmp_path, cell, message):
    rows = [("u1", "a", 1, 1), ("u1", "b", 1, 2), ("u2", "a", 1, 3), ("u2", cell, 1, 4)]
    path = write(tmp_path / "x.csv", lines(rows, header="user_id,item_id,rating,timestamp\n"))
    with pytest.raises(UserError, match=message):
        _ = splits_of(path)
    ints = pl.DataFrame({"user_id": [1, 1, 2], "item_id": [4, None, 5], "timestamp": [1, 2, 3]})
    with pytest.raises(UserError, match="row 2, column 'item_id': empty"):
        _ = splits_of(ints)


CONTEXT = pl.DataFrame(
    {
        "user_id": ["a"] * 5 + ["b"] * 4,
        "item_id": ["x", "y", "z", "x", "w", "y", "x", "w", "z"],
        "timestamp": [30, 10, 20, 40, 90, 5, 6, 6, 70],
        "kind": ["view", "buy", None, "view", "gift", "view", "view", "buy", "view"],
        "shop": [1, 1, 2, 2, 2, 3, 3, 3, 4],
    }
)


def test_times_and_columns_follow_their_events(tmp_path: Path) -> None:
    data = Interactions(
        interactions=CONTEXT,
        times=True,
        event_columns=["kind", "shop"],
        duplicates="keep",
        cache_dir=tmp_path,
    )
    splits = data.splits
    assert splits.context.times is not None and splits.context.codes is not None
    assert splits.context.times.tolist() == [10, 20, 30, 40, 90, 5, 6, 6, 70]
    # The training events are y z x of user a, y x of user b: "gift" and the shop 4 have no code.
    assert splits.event_columns == {"kind": ["buy", "view"], "shop": ["1", "2", "3"]}
    kinds = [1, 0, 2, 2, 0, 2, 2, 1, 2]
    shops = [1, 2, 1, 2, 2, 3, 3, 3, 0]
    assert splits.context.codes.tolist() == [list(pair) for pair in zip(kinds, shops, strict=True)]
    assert splits.typical_gap == 10  # 10 and 10 of user a, 1 of user b

    batch = next(iter(data.test_dataloader()))
    assert batch.times is not None and batch.columns is not None
    valid = batch.seq_idx >= 0
    assert batch.times.event[valid].tolist() == [10, 20, 30, 40, 5, 6, 6]
    assert batch.times.next[valid].tolist() == [20, 30, 40, 90, 6, 6, 70]
    assert batch.columns[valid].tolist() == [
        list(pair) for pair in zip(kinds[:4] + kinds[5:8], shops[:4] + shops[5:8], strict=True)
    ]
    for objective in ("all", "last"):
        started = Interactions(
            interactions=CONTEXT,
            times=True,
            event_columns="kind",
            duplicates="keep",
            start_token=True,
            objective=objective,
            cache_dir=tmp_path,
        )
        for batch in (*started.train_dataloader(), *started.test_dataloader()):
            starts = batch.item == START
            assert starts.any()
            assert torch.equal(batch.times.event[starts], batch.times.next[starts])
            assert not batch.columns[starts].any()
            assert set(batch.times.event[starts].tolist()) == {10, 5}
    plain = Interactions(interactions=CONTEXT, duplicates="keep", cache_dir=tmp_path)
    batch = next(iter(plain.train_dataloader()))
    assert batch.times is None and batch.columns is None and plain.splits.typical_gap is None
    assert set(data.identity()) - set(plain.identity()) == {"times", "columns"}


def test_times_are_seconds_whatever_their_unit(tmp_path: Path) -> None:
    seconds = [1_700_000_000 + 60 * t for t in (3, 1, 2, 4, 9, 0, 1, 2, 7)]
    dates = pl.from_epoch(pl.Series(seconds), time_unit="s")
    found = []
    for column in (pl.Series(seconds), dates, dates.dt.to_string("%Y-%m-%d %H:%M:%S")):
        frame = CONTEXT.with_columns(column.alias("timestamp"))
        times = Interactions(
            interactions=frame, times=True, cache_dir=tmp_path
        ).splits.context.times
        assert times is not None
        found.append((times - times.min()).tolist())
    assert found[0] == found[1] == found[2] and max(found[0]) == 540


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"times": True, "timestamp": None}, "dataset.times=true: name the column"),
        ({}, {"event_columns": ["colour"]}, "colour"),
        (
            {"timestamp": [f"2024-05-0{d} early" for d in range(1, 10)]},
            {"times": True},
            "compared as text and have no differences",
        ),
    ],
)
def test_times_and_columns_that_are_not_there_are_one_line(
    tmp_path: Path, change: dict, options: dict, message: str
) -> None:
    frame = CONTEXT.with_columns(**{name: pl.Series(cells) for name, cells in change.items()})
    with pytest.raises(UserError, match=message):
        _ = Interactions(interactions=frame, cache_dir=tmp_path, **options).splits


def test_a_sequence_text_has_neither_times_nor_columns(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    path.write_text("u a b c d\nv a c d b e\n")
    for options in ({"times": True}, {"event_columns": ["kind"]}):
        with pytest.raises(UserError, match="a sequence text has no"):
            _ = Interactions(
                interactions=path, format="sequences", cache_dir=tmp_path, **options
            ).splits
