"""Files to histories: formats, order of time, splits, filters, item features, the cache, mistakes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import hydra
import numpy as np
import polars as pl
import pytest

from recsys_ssm.cli.resolvers import register_resolvers
from recsys_ssm.data import cache, download
from recsys_ssm.data.formats import format_of
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import make
from recsys_ssm.paths import CONF_DIR

ROWS = [
    # user, item, rating, timestamp; u1's rows are not in the order of time, several times are equal
    ("u1", "c", 5, 30),
    ("u1", "a", 4, 10),
    ("u2", "b", 3, 10),
    ("u1", "d", 5, 30),
    ("u1", "b", 1, 20),
    ("u2", "a", 5, 10),
    ("u2", "d", 4, 10),
    ("u3", "e", 2, 40),
    ("u3", "a", 2, 50),
]
"""By user and time: u1 a b c d, u2 b a d, u3 e a."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


def frame(rows=ROWS) -> pl.DataFrame:
    return pl.DataFrame(rows, ["user_id", "item_id", "rating", "timestamp"], orient="row")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def lines(rows=ROWS, separator=",", header="") -> str:
    return header + "".join(separator.join(map(str, row)) + "\n" for row in rows)


@pytest.fixture
def table(tmp_path) -> Path:
    frame().write_csv(tmp_path / "rows.csv")
    return tmp_path / "rows.csv"


def sets_of(path, **options):
    return Interactions(interactions=path, **options).splits


def histories(splits) -> dict[str, list[str]]:
    events, offsets = splits.histories
    return {
        user: [splits.item_ids[i] for i in events[offsets[u] : offsets[u + 1]]]
        for u, user in enumerate(splits.user_ids)
    }


def held_out(splits, part) -> dict[str, tuple[str, list[str]]]:
    """Target and history of each user."""
    events, offsets = splits.histories
    return {
        splits.user_ids[int(u)]: (
            splits.item_ids[events[at]],
            [splits.item_ids[i] for i in events[offsets[u] : at]],
        )
        for u, at in zip(*getattr(splits, part), strict=True)
    }


def trained(splits) -> dict[str, list[str]]:
    events, offsets = splits.histories
    return {
        user: [splits.item_ids[i] for i in events[offsets[u] : splits.train_stop[u]]]
        for u, user in enumerate(splits.user_ids)
    }


IN_ORDER = {"u1": list("abcd"), "u2": list("bad"), "u3": list("ea")}


# Formats


def csv_without_header(folder):
    return write(folder / "ratings_Beauty.csv", lines()), {
        "names": ["user_id", "item_id", "rating", "timestamp"]
    }


def csv_with_header_though_names_are_given(folder):
    frame().write_csv(folder / "rows.csv")
    return folder / "rows.csv", {"names": ["a", "b", "c", "d"]}


def csv_in_gzip(folder):
    with gzip.open(folder / "rows.csv.gz", "wt") as file:
        file.write(lines(header="user_id,item_id,rating,timestamp\n"))
    return folder / "rows.csv.gz", {}


def tab_separated(folder):
    frame().write_csv(folder / "u.data", separator="\t", include_header=False)
    return folder / "u.data", {"names": ["user_id", "item_id", "rating", "timestamp"]}


def parquet(folder):
    frame().write_parquet(folder / "rows.parquet")
    return folder / "rows.parquet", {}


def parquet_of_dates_and_other_names(folder):
    made = frame().select(
        who=pl.col("user_id").cast(pl.Categorical),
        what="item_id",
        when=pl.from_epoch(pl.col("timestamp") * 86_400),
    )
    made.write_parquet(folder / "rows.pq")
    return folder / "rows.pq", {"user": "who", "item": "what", "timestamp": "when"}


def recbole(folder):
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    return write(folder / "x.inter", lines(separator="\t", header=header)), {}


def movielens(folder):
    return write(folder / "ratings.dat", lines(separator="::")), {}


def iso_dates(folder):
    rows = [(u, i, r, f"2020-01-{t:02d} 12:00:00") for u, i, r, t in ROWS if t <= 30] + [
        ("u3", "e", 2, "2020-02-01 00:00:00"),
        ("u3", "a", 2, "2020-02-01 00:00:01"),
    ]
    return write(folder / "rows.csv", lines(rows, header="user_id,item_id,rating,timestamp\n")), {}


def another_separator(folder):
    frame().write_csv(folder / "rows.csv", separator=";")
    return folder / "rows.csv", {"separator": ";"}


@pytest.mark.parametrize(
    "make",
    [
        csv_without_header,
        csv_with_header_though_names_are_given,
        csv_in_gzip,
        tab_separated,
        parquet,
        parquet_of_dates_and_other_names,
        recbole,
        movielens,
        iso_dates,
        another_separator,
    ],
)
def test_every_format_gives_the_same_histories(tmp_path, make):
    path, options = make(tmp_path)
    splits = sets_of(path, **options)
    assert histories(splits) == IN_ORDER
    assert splits.item_ids == list("abcde") and splits.user_ids.to_list() == ["u1", "u2", "u3"]
    assert any("not in the order of time: sorted" in note for note in splits.notes)


def test_a_sequence_text_is_in_order_already(tmp_path):
    path = write(tmp_path / "x.txt", "u1 a b c d\n\nu2\tb  a d \nu3 e a\n")
    splits = sets_of(path)
    assert histories(splits) == IN_ORDER
    assert not any("sorted" in note for note in splits.notes)
    again = write(tmp_path / "y.txt", "u1 a b\nu2 b a d\nu1 c d\nu3 e a\n")
    splits = sets_of(again)
    assert histories(splits) == IN_ORDER
    assert any("1 lines go on with the user of an earlier one" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("make", "separator"),
    [(csv_without_header, b"\r\n"), (recbole, b"\r\n"), (movielens, b"\r\n"), (movielens, b"\n")],
)
def test_line_ends_and_byte_order_marks_of_windows(tmp_path, make, separator):
    path, options = make(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", separator))
    assert histories(sets_of(path, **options)) == IN_ORDER
    text = tmp_path / "x.txt"
    text.write_bytes(b"\xef\xbb\xbfu1 a b c d\r\nu2 b a d\r\nu3 e a\r\n")
    assert histories(sets_of(text)) == IN_ORDER


def test_formats_are_told_by_name(tmp_path):
    assert format_of("a/ratings.dat") == "movielens"
    assert format_of("x.CSV.GZ") == "csv" and format_of("plain") == "csv"
    path = write(tmp_path / "odd.name", lines(separator="::"))
    assert histories(sets_of(path, format="movielens")) == IN_ORDER


def test_ids_stay_what_they_are(tmp_path):
    """Leading zeros, 64-bit numbers that no float holds, spaces within, another alphabet."""
    big = 2**53 + 1
    rows = [(big, f"00{i}", 1, i) for i in range(4)] + [(big + 1, "é x", 1, i) for i in range(3, 6)]
    header = "user_id,item_id,rating,timestamp\n"
    splits = sets_of(write(tmp_path / "x.csv", lines(rows, header=header)), duplicates="keep")
    assert splits.user_ids.to_list() == [str(big), str(big + 1)]
    assert splits.item_ids == ["000", "001", "002", "003", "é x"]
    numbers = pl.DataFrame(
        {
            "user_id": [big] * 4 + [2**63 - 1],
            "item_id": [7, 8, 9, 6, 7],
            "timestamp": [1, 2, 3, 4, 5],
        }
    )
    numbers.write_parquet(tmp_path / "x.parquet")
    splits = sets_of(tmp_path / "x.parquet")
    assert histories(splits) == {str(big): ["7", "8", "9", "6"], str(2**63 - 1): ["7"]}


def test_times_that_differ_by_one_nanosecond_are_told_apart(tmp_path):
    start = 1_600_000_000_000_000_000
    rows = [("u", "abcd"[3 - i], 1, start + 3 - i) for i in range(4)]
    path = write(tmp_path / "x.csv", lines(rows, header="user_id,item_id,rating,timestamp\n"))
    assert histories(sets_of(path)) == {"u": list("abcd")}


# Leave one out


def test_leave_one_out(table):
    splits = sets_of(table)
    assert trained(splits) == {"u1": ["a", "b"], "u2": ["b"], "u3": ["e", "a"]}
    assert held_out(splits, "val") == {"u1": ("c", ["a", "b"]), "u2": ("a", ["b"])}
    assert held_out(splits, "test") == {"u1": ("d", ["a", "b", "c"]), "u2": ("d", ["b", "a"])}
    counts = dict(zip(splits.item_ids, splits.item_counts.tolist(), strict=True))
    assert counts == {"a": 2, "b": 2, "c": 0, "d": 0, "e": 1}
    assert any(
        "1 users with fewer than 3 events: trained on, not evaluated" in n for n in splits.notes
    )
    assert any(n.startswith("2 items are in no training event") for n in splits.notes)
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
    splits = sets_of(tmp_path / "x.csv", duplicates="keep")
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
    splits = sets_of(write(tmp_path / "ratings.dat", text))
    assert histories(splits) == {
        "1": ["3408", "2804", "1193", "919", "914", "1287", "661", "1197", "594", "2355"],
        "2": ["1357", "3068", "2194", "2268", "647", "1537", "648", "2628"],
    }
    assert held_out(splits, "test")["1"][0] == "2355" and held_out(splits, "val")["1"][0] == "594"


# By time


def timed(tmp_path, rows) -> Path:
    return write(tmp_path / "x.csv", lines(rows, header="user_id,item_id,timestamp\n"))


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
    splits = sets_of(path, split="time", val_from=10, test_from=20)
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
        "validation: 2 users" in n and "1 without an earlier event" in n for n in splits.notes
    )
    assert any("test: 3 users" in n and "1 without an earlier event" in n for n in splits.notes)
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
    splits = sets_of(tmp_path / "x.csv", split="time", val_share=0.2, test_share=0.1)
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
    dated = sets_of(
        timed(tmp_path, rows), split="time", val_from="2020-01-10", test_from="2020-01-20 00:00:00"
    )
    assert held_out(dated, "val") == {"u1": ("c", ["a", "b"]), "u4": ("d", ["a"])}
    assert len(held_out(dated, "test")) == 3


# Filters


def test_ratings_below_the_least_are_no_events(table):
    splits = sets_of(table, rating="rating", min_rating=4)
    assert histories(splits) == {"u1": ["a", "c", "d"], "u2": ["a", "d"]}
    assert any("4 rows with rating below 4 left out" in note for note in splits.notes)


def test_what_counts_once(tmp_path):
    rows = [
        *[("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("u", "a", 3), ("u", "c", 4), ("u", "b", 5)],
        *[("v", i, t) for t, i in enumerate("abcd")],
    ]
    path = timed(tmp_path, rows)
    expected = {"identical": "abacb", "keep": "abaacb", "first": "abc", "last": "acb"}
    for duplicates, kept in expected.items():
        splits = sets_of(path, duplicates=duplicates)
        before = any(
            "1 users are tested on an item they had before" in note for note in splits.notes
        )
        assert before == (duplicates in ("identical", "keep"))
        assert histories(splits) == {"u": list(kept), "v": list("abcd")}, duplicates
        dropped = 6 - len(kept)
        told = [note for note in splits.notes if f"(duplicates={duplicates})" in note]
        assert bool(told) == bool(dropped) and all(f"{dropped} rows" in note for note in told)
    # Without times a repetition is an event.
    splits = sets_of(path, timestamp=None)
    assert histories(splits)["u"] == list("abaacb")
    assert histories(sets_of(path, timestamp=None, duplicates="last"))["u"] == list("acb")


def test_core_is_what_is_left_when_nothing_more_falls_out(tmp_path):
    generator = np.random.default_rng(1)
    pairs = {
        (int(u), int(i))
        for u, i in zip(generator.zipf(1.4, 900) % 70, generator.zipf(1.3, 900) % 60, strict=True)
    }
    rows = [(f"u{u}", f"i{i}", n) for n, (u, i) in enumerate(sorted(pairs))]
    splits = sets_of(timed(tmp_path, rows), k_core=4)
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
        sets_of(timed(tmp_path, rows), k_core=50)


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
    assert "1 items are not in it: their features are missing" in notes
    assert "1 items without an event: not in the catalogue" in notes


def test_item_tables_of_recbole_and_movielens(tmp_path, table):
    write(
        tmp_path / "x.item",
        'item_id:token\tname:token_seq\tyear:float\na\tA "b\t1990\nb\tB\t1992\n',
    )
    splits = sets_of(table, items=tmp_path / "x.item", item_numeric="year")
    assert splits.items.numeric[:2, 0].tolist() == [-1, 1]
    (tmp_path / "movies.dat").write_bytes(
        "a::Café (1990)::Drama\nb::B::Comedy|Drama\n".encode("latin-1")
    )
    splits = sets_of(
        table,
        items=tmp_path / "movies.dat",
        item_categorical=["genres"],
        item_names=["item_id", "title", "genres"],
    )
    assert splits.item_schema.categorical[0].values == ("Comedy|Drama", "Drama")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,price\na,1\na,2\n", "row 2, column 'item_id': this id stands in an earlier row"),
        ("item_id,price\nq,1\n", "none of the 5 items of the interactions is in it"),
        ("item_id,price\na,much\n", "row 1, column 'price': 'much' is not a finite number"),
        ("item_id,cost\na,1\n", "no column 'price'"),
    ],
)
def test_mistakes_in_the_item_table(tmp_path, table, text, message):
    write(tmp_path / "items.csv", text)
    with pytest.raises(UserError, match=message):
        sets_of(table, items=tmp_path / "items.csv", item_numeric=["price"])


# The cache


def entries(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache" / "interactions").glob("*.json"))


def count_preparations(monkeypatch) -> list[int]:
    made = []
    prepare = Interactions._prepare
    monkeypatch.setattr(
        Interactions, "_prepare", lambda self, path: made.append(1) or prepare(self, path)
    )
    return made


def test_prepared_data_is_kept_and_memory_mapped(tmp_path, table, monkeypatch):
    made = count_preparations(monkeypatch)
    first, second = sets_of(table), sets_of(table)
    assert len(made) == 1
    for splits in (first, second):
        base = splits.histories.events
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) and base.mode == "r"
        assert not splits.histories.events.flags.writeable
        assert histories(splits) == IN_ORDER
    assert first.notes == second.notes
    assert Interactions(interactions=table, cache_dir=tmp_path / "other").splits.notes
    assert (tmp_path / "other").is_dir() and len(made) == 2


def test_a_changed_file_is_read_anew_whatever_its_date_and_size(table, monkeypatch):
    made = count_preparations(monkeypatch)
    assert histories(sets_of(table))["u1"] == list("abcd")
    before = table.stat()
    table.write_text(table.read_text().replace("u1,c", "u1,e"))
    os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert table.stat().st_size == before.st_size
    assert histories(sets_of(table))["u1"] == list("abed")
    assert len(made) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"k_core": 2},
        {"rating": "rating", "min_rating": 3},
        {"duplicates": "keep"},
        {"timestamp": None},
        {"user": "item_id", "item": "user_id"},
        {"split": "time"},
        {"split": "time", "val_share": 0.2},
        {"split": "time", "val_from": 20, "test_from": 30},
    ],
)
def test_other_settings_are_another_entry(tmp_path, table, options):
    def again(**options):
        with contextlib.suppress(UserError):  # too little data for that split: kept all the same
            sets_of(table, **options)

    again()
    again(split="time")
    n = len(entries(tmp_path))
    again(**options)
    known = options == {"split": "time"}
    assert len(entries(tmp_path)) == n + (not known)


def test_options_of_the_loader_share_an_entry(tmp_path, table):
    sets_of(table, name="my/set")
    assert entries(tmp_path)[0].name.startswith("my_set-")
    entries(tmp_path)[0].unlink()
    sets_of(table)
    sets_of(table, max_length=3, batch_positions=9, objective="last", seed=4)
    assert len(entries(tmp_path)) == 1


def test_another_version_is_another_entry(tmp_path, table, monkeypatch):
    sets_of(table)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    sets_of(table)
    assert len(entries(tmp_path)) == 2


def garble(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


@pytest.mark.parametrize(
    "damage",
    [
        lambda index, folder: garble(folder / "events.npy"),
        lambda index, folder: (folder / "offsets.npy").unlink(),
        lambda index, folder: (folder / "item_ids.parquet").write_bytes(b""),
        lambda index, folder: garble(folder / "notes.json"),
        lambda index, folder: index.write_text("{"),
        lambda index, folder: index.write_text("[]"),
        lambda index, folder: index.write_text('{"folder": "..", "checksums": {}}'),
        lambda index, folder: index.unlink(),
    ],
)
def test_a_damaged_entry_is_made_again(tmp_path, table, damage, monkeypatch):
    made = count_preparations(monkeypatch)
    sets_of(table)
    (index,) = entries(tmp_path)
    folder = index.parent / json.loads(index.read_text())["folder"]
    damage(index, folder)
    assert histories(sets_of(table)) == IN_ORDER
    assert histories(sets_of(table)) == IN_ORDER
    assert len(made) == 2
    assert len(entries(tmp_path)) == 1


def test_an_interrupted_preparation_leaves_nothing(tmp_path, table, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        sets_of(table)
    assert list((tmp_path / "cache" / "interactions").iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, table, monkeypatch):
    prepare = Interactions._prepare

    def meanwhile(self, path):
        prepared = prepare(self, path)
        path.write_text(path.read_text() + "u9,a,1,1\n")
        return prepared

    monkeypatch.setattr(Interactions, "_prepare", meanwhile)
    with pytest.raises(UserError, match="changed while it was being read"):
        sets_of(table)
    assert not (tmp_path / "cache").exists()


_TOGETHER = """
import sys, time
from pathlib import Path
import numpy as np, polars as pl
from recsys_ssm.data.cache import Prepared, load_or_make
folder, me = Path(sys.argv[1]), sys.argv[2]

def make():
    (folder / f"ready{me}").touch()
    while len(list(folder.glob("ready*"))) < 3:  # all have found nothing
        time.sleep(0.01)
    return Prepared({"numbers": np.arange(9)}, {"names": pl.Series(["a"])}, ["made"])

entry = load_or_make(folder / "cache", "x", [folder / "input"], {}, make)
assert entry.arrays["numbers"].tolist() == list(range(9)), entry
assert entry.texts["names"].to_list() == ["a"] and entry.notes == ["made"]
"""


def test_processes_may_prepare_the_same_at_once(tmp_path):
    write(tmp_path / "input", "x")
    command = [sys.executable, "-c", _TOGETHER, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(i)]) for i in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    (index,) = (tmp_path / "cache").glob("*.json")
    kept = [path.name for path in index.parent.iterdir() if path.is_dir()]
    assert kept == [json.loads(index.read_text())["folder"]]


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UserError, match=r"none: not readable \(No such file"):
        cache.load_or_make(tmp_path, "x", [tmp_path / "none"], {}, lambda: cache.Prepared({}, {}))


def test_a_cache_that_cannot_be_written_is_told(tmp_path, table):
    write(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"dataset.cache_dir or the variable RECSYS_SSM_CACHE"):
        sets_of(table, cache_dir=tmp_path / "file")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache.cache_folder("/zero") == Path("/zero")
    assert cache.cache_folder() == Path("/one")
    monkeypatch.delenv("RECSYS_SSM_CACHE")
    assert cache.cache_folder() == Path("/two/recsys_ssm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path("~/.cache/recsys_ssm").expanduser()


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
            "row 2, column 'timestamp': 'soon' is no time",
        ),
        ("x.csv", HEADER + "u,a,1,1\nu,b,1,\n", {}, "row 2, column 'timestamp': None is no time"),
        (
            "x.csv",
            HEADER + "u,a,1,now\nu,b,1,soon\n",
            {},
            "row 1, column 'timestamp': 'now' is no time",
        ),
        (
            "x.csv",
            HEADER + "u,a,1,1\nu,b,1,inf\n",
            {},
            "row 2, column 'timestamp': 'inf' is no time",
        ),
        (
            "x.csv",
            HEADER + "u,a,good,1\nu,b,1,2\n",
            {"rating": "rating", "min_rating": 3},
            "row 1, column 'rating': 'good' is no number",
        ),
        (
            "x.csv",
            HEADER + "u,a,3,1\nu,b,,2\n",
            {"rating": "rating", "min_rating": 3},
            "row 2, column 'rating': None is no number",
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
        ("x.dat", "1::2::3::4\n1::2\n", {}, "row 2, column 'timestamp': None is no time"),
        ("x.dat", "1,2,3,4\n", {}, "row 1, column 'item_id': empty"),
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
        sets_of(path, **options)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"1 2 \xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8"):
        sets_of(tmp_path / "x.txt")


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
        ({"val_share": 0.5, "test_share": 0.5}, "leave some to train on"),
        ({"split": "time", "val_from": 3}, "give both instants, or neither"),
        ({"val_from": 3, "test_from": 4}, "only split=time has instants"),
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
        ((20, 20), "the test comes later"),
        (("soon", 20), "dataset.val_from=soon: the times are numbers"),
    ],
)
def test_impossible_instants(tmp_path, instants, message):
    with pytest.raises(UserError, match=message):
        sets_of(timed(tmp_path, TIMED), split="time", val_from=instants[0], test_from=instants[1])


# Named files, fetching


def test_the_first_file_that_is_there_is_read(tmp_path, table):
    data = Interactions(interactions=["none.inter", "rows.csv"], root=tmp_path)
    assert histories(data.splits) == IN_ORDER
    absent = Interactions(interactions=["a.inter", "b.csv"], root=tmp_path, source="example.org")
    with pytest.raises(UserError, match="is a folder; name the file in it"):
        sets_of(tmp_path)
    with pytest.raises(UserError) as caught:
        _ = absent.splits
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a.inter'}: no such file")
    assert (
        "put a.inter or b.csv there, from example.org, or name another folder with dataset.root"
        in text
    )


class Answer(io.BytesIO):
    headers: dict[str, str] = {}  # noqa: RUF012


@pytest.fixture
def archive(monkeypatch):
    """A server that has one zip; every request it gets."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as pack:
        pack.writestr("ml/ratings.dat", lines(separator="::"))
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return Answer(content.getvalue())

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
    md5 = hashlib.md5(content.getvalue()).hexdigest()
    return {"url": "https://example.org/ml.zip", "md5": md5, "member": "ml/ratings.dat"}, asked


def test_a_file_is_fetched_once_and_checked(tmp_path, archive):
    option, asked = archive
    for _ in range(2):
        data = Interactions(interactions="ratings.dat", root=tmp_path / "no", download=option)
        assert histories(data.splits) == IN_ORDER
    assert asked == ["https://example.org/ml.zip"]
    kept = [path for path in (tmp_path / "cache" / "downloads").rglob("*") if path.is_file()]
    assert [path.name for path in kept] == ["ratings.dat"], "neither archive nor scratch is left"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"md5": "0" * 32}, "its md5 is .*, not the published 0000"),
        ({"member": "ml/other"}, "there is no ml/other in it"),
        ({"url": "http://example.org/x"}, "begins with https"),
    ],
)
def test_what_is_fetched_wrongly_is_not_kept(tmp_path, archive, change, message):
    option, _ = archive
    data = Interactions(interactions="ratings.dat", root=tmp_path, download={**option, **change})
    with pytest.raises(UserError, match=message):
        _ = data.splits
    kept = tmp_path / "cache" / "downloads"
    assert not kept.exists() or not [path for path in kept.rglob("*") if path.is_file()]


def test_without_network_one_line_says_what_to_put_where(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise download.urllib.error.URLError("no route")

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
    option = {"url": "https://example.org/x.zip", "md5": "0" * 32, "member": "m/ratings.dat"}
    data = Interactions(interactions="m/ratings.dat", root=tmp_path, download=option)
    with pytest.raises(UserError) as caught:
        _ = data.splits
    text = str(caught.value)
    assert "put ratings.dat there" in text and "could not be fetched (no route)" in text
    assert "\n" not in text


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
        cfg = hydra.compose("train", [f"dataset={name}", "dataset.download=null", "name=x"])
    monkeypatch.setenv("RECSYS_SSM_DATA", str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"no such file .* put .* there, from "):
        _ = make(cfg.dataset, "dataset").splits
    cfg.dataset.k_core = 0
    for file in cfg.dataset.interactions:
        write_official(tmp_path / "data" / file)
        data = make(cfg.dataset, "dataset")
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
    ],
)
def test_counts_of_real_files(shared_data, file, users, items, events):
    data = Interactions(interactions=shared_data / file, k_core=5 if "amazon" in file else 0)
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
