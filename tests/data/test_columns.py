"""Columns of users' tables: the cells both kinds of tables accept, and those they refuse with the same message."""

from __future__ import annotations

import datetime as dt
import importlib.util

import numpy as np
import polars as pl
import pytest

from recsys_ssm.data.columns import (
    FeatureTable,
    instant,
    is_frame,
    keys,
    numbers,
    one_or_more,
    open_table,
    parse_dates,
    positions,
    times,
)
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.data.table import TableData
from recsys_ssm.errors import UserError
from recsys_ssm.features import as_frame

DAY = 86_400_000_000  # microseconds


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


def read(cells, **options):
    return times(pl.DataFrame({"t": pl.Series(cells, **options)}), "t", "x.csv")


# Times: each case is in ascending order

UTC = dt.timezone.utc  # noqa: UP017 (a short name)
FORMS = {
    "integers": [1, 2, 10],
    "integers as text": ["1", "2", "10"],
    "integers no float holds": [2**53, 2**53 + 1],
    "integers as text no float holds": [str(2**53), str(2**53 + 1)],
    "negative": [-5, 0, 3],
    "floats": [0.5, 1.5, 1e9],
    "floats as text": ["0.5", "1.5", " 1e9 "],
    "integers and floats as text": ["1", "1.5", "2"],
    "infinite": ["1", "2", "inf"],
    "dates as text": ["1969-12-31", "2020-01-01", "2020-01-02"],
    "to the second": ["2020-01-01 09:00:00", "2020-01-01 10:00:00"],
    "with T": ["2020-01-01T09:00:00", "2020-01-01T10:00:00"],
    "to the minute": ["2020-01-01 09:59", "2020-01-01 10:00"],
    "to the minute with T": ["2020-01-01T09:59", "2020-01-01T10:00"],
    "with fractions": ["2020-01-01 09:00:00.25", "2020-01-01 09:00:00.5"],
    "nanoseconds as text": ["2020-01-01 09:00:00.000000001", "2020-01-01 09:00:00.000000002"],
    "UTC": ["2020-01-01T09:00:00Z", "2020-01-01T10:00:00Z"],
    "zones": ["2020-01-01 11:00:00+02:00", "2020-01-01T10:00:00Z", "2020-01-01 10:00:00-0130"],
    "zones of hours": ["2020-01-01 11:00+02", "2020-01-01 10:00+00"],
    "mixed forms": ["2020-01-01", "2020-01-01 10:00", "2020-01-01T10:00:01", "2020-01-02"],
    "text after a date": ["2020-01-01", "2020-01-01 evening", "2020-01-02 noon"],
    "no such day": ["2020-02-28", "2020-02-31"],
    "date objects": [dt.date(2020, 1, 1), dt.date(2020, 1, 2)],
    "datetime objects": [dt.datetime(2020, 1, 1, 9), dt.datetime(2020, 1, 1, 10)],
    "zoned objects": [dt.datetime(2020, 1, 1, 9, tzinfo=UTC), dt.datetime(2020, 1, 1, 10, tzinfo=UTC)],
    "times of day": [dt.time(9), dt.time(10)],
    "durations": [dt.timedelta(hours=1), dt.timedelta(days=1)],
}  # fmt: skip


@pytest.mark.parametrize("cells", FORMS.values(), ids=FORMS.keys())
def test_forms_of_times_are_in_their_order(cells):
    values, _, note = read(cells)
    assert (np.diff(values) > 0).all(), values
    assert values.dtype in (np.int64, np.float64)
    mixed = np.random.default_rng(0).permutation(len(cells))
    assert (read([cells[i] for i in mixed]).values == values[mixed]).all()
    assert (note is not None) == (cells in (FORMS["text after a date"], FORMS["no such day"]))


@pytest.mark.parametrize("cells", FORMS.values(), ids=FORMS.keys())
def test_both_kinds_of_tables_accept_the_same_times(cells):
    """Four users with each time once, the last file row first: the last in time are held out."""
    n = len(cells)
    frame = pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in range(4) for _ in range(n + 2)],
            "item_id": [f"i{i}" for _ in range(4) for i in reversed(range(n + 2))],
            "timestamp": [*reversed([cells[0], cells[0], *cells])] * 4,
        }
    )
    table = TableData(interactions=frame, timestamp="timestamp", held_out=0.01).splits
    ranking = table.test_ranking.relevant.values
    assert [table.item_ids[i] for i in ranking] == [f"i{n + 1}"]
    splits = Interactions(interactions=frame).splits
    events = splits.histories.events
    assert {splits.item_ids[i] for i in events[splits.test.event]} == {f"i{n + 1}"}


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_dates_keep_the_resolution_of_their_column(unit):
    start = dt.datetime(2020, 1, 1)
    cells = pl.Series([start, start], dtype=pl.Datetime(unit)).to_physical() + pl.Series([0, 1])
    values, found, _ = read(cells.cast(pl.Datetime(unit)))
    assert found == unit and np.diff(values) == 1
    assert instant("2020-01-01", "val_from", unit) == values[0]
    zoned = read(cells.cast(pl.Datetime(unit)).dt.replace_time_zone("Europe/Berlin"))
    assert instant("2020-01-01 00:00:00+01:00", "val_from", unit) == zoned.values[0]


def test_dates_are_microseconds_since_1970():
    texts = ["1970-01-02", "1970-01-02 00:00", "1970-01-02T01:00:00+01:00", "1970-01-01T23:00-0100"]
    assert read(texts) == (pytest.approx([DAY] * 4), "us", None)
    assert parse_dates(pl.Series(["1970-01-02", "soon", None, "1970-13-01"])).to_list() == [
        DAY, None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "row", "cell"),
    [
        (["1", "soon", "3"], 2, "'soon'"),
        (["2020-01-01", "soon", "2020-01-03"], 2, "'soon'"),
        (["now", "soon"], 1, "'now'"),
        (["1", None, "3"], 2, "None"),
        (["1", None, None], 2, "None"),
        (["", "2"], 1, "''"),
        ([1, None], 2, "None"),
        ([1.0, float("nan")], 2, "nan"),
        (["1", "nan"], 2, "'nan'"),
        ([dt.date(2020, 1, 1), None], 2, "None"),
        (["2020-01-01", "17", "2020-01-03"], 2, "'17'"),
    ],
)
def test_cells_that_are_not_times_are_named(cells, row, cell):
    what = "empty" if cell in ("None", None) else f"{cell} is not a time"
    with pytest.raises(UserError) as caught:
        read(cells)
    assert str(caught.value) == (
        f"x.csv, row {row}, column 't': {what}; give numbers, or dates as "
        "YYYY-MM-DD hh:mm:ss, in every row"
    )


@pytest.mark.parametrize("cells", [[[1], [2]], [True, False], [b"1", b"2"]])
def test_columns_that_are_not_times(cells):
    with pytest.raises(UserError, match=r"x\.csv: column 't' holds .*, not times; give numbers or"):
        read(cells)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (3, "number", 3),
        ("3.5", "number", 3.5),
        ("1970-01-02", "us", DAY),
        (" 1970-01-02 00:00 ", "ms", DAY // 1000),
        ("soon", "number", "dataset.val_from=soon: the times are numbers; give a number"),
        (20, "us", "dataset.val_from=20: the times are dates; give it as YYYY"),
        ("2020-01-01", "text", "the times are texts; give them as YYYY"),
    ],
)
def test_instants(value, unit, expected):
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            instant(value, "val_from", unit)
    else:
        assert instant(value, "val_from", unit) == expected


# Ids and numbers


def test_ids_are_text_however_they_are_stored():
    frame = pl.DataFrame({"a": ["007", "7"], "b": [7.0, 8.5], "c": [2**63 - 1, 1]})
    assert keys(frame, "a", "x").to_list() == ["007", "7"]
    assert keys(frame, "b", "x").to_list() == ["7", "8.5"]
    assert keys(frame, "c", "x").to_list() == [str(2**63 - 1), "1"]
    with pytest.raises(UserError, match="x, row 2, column 'a': empty"):
        keys(pl.DataFrame({"a": ["1", ""]}), "a", "x")
    found = positions(pl.Series(["b", "a", "b"]), pl.Series(["a", "b"]), np.int32)
    assert found.tolist() == [1, 0, 1] and found.dtype == np.int32


def test_numbers():
    frame = pl.DataFrame({"a": [" 1 ", "2.5"], "b": [1, 0], "c": [True, False]})
    for name, expected in (("a", [1, 2.5]), ("b", [1, 0]), ("c", [1, 0])):
        assert numbers(frame, name, "x", "dataset.target").tolist() == expected
    for cells, what in (
        (["1", "good"], "row 2, column 'a': 'good' is not a finite number; every row needs"),
        (["1", "inf"], "row 2, column 'a': 'inf' is not a finite number"),
        ([1.0, None], r"row 2, column 'a': empty; every row needs a number \(dataset.target\)"),
        ([dt.date(2020, 1, 1)], "column 'a' holds Date, not numbers"),
    ):
        with pytest.raises(UserError, match=what):
            numbers(pl.DataFrame({"a": cells}), "a", "x", "dataset.target")


def test_one_name_is_one_column():
    assert one_or_more("price") == ("price",)
    assert one_or_more(["a", "b"]) == ("a", "b")
    assert one_or_more(None) == one_or_more([]) == ()


# Tables

FRAME = pl.DataFrame({"user_id": ["a", "b"], "x": [1.5, None], "y": [1, 2]})


def test_data_frames_of_other_libraries():
    plain = {name: FRAME[name].to_list() for name in FRAME.columns}
    sources = [FRAME, FRAME.lazy(), plain]
    if importlib.util.find_spec("pandas"):  # not a dependency
        sources.append(importlib.import_module("pandas").DataFrame(plain))
    for source in sources:
        assert is_frame(source)
        frame, where = open_table(source, "users", ["x", "user_id", "x"])
        assert where == "users" and frame.columns == ["x", "user_id"]
        assert frame.equals(FRAME.select("x", "user_id"))
    for path in ("a.csv", ["a.csv", "b.csv"], None):
        assert not is_frame(path)


class _Stream:
    """A data frame of an unknown library that offers its columns as Arrow does."""

    def __arrow_c_stream__(self, requested_schema=None):
        return FRAME.__arrow_c_stream__(requested_schema)


def test_any_data_frame_with_arrow_columns():
    assert as_frame(_Stream(), "users").equals(FRAME)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (object(), "users: expected a Polars or pandas data frame, got object"),
        (FRAME.drop("x"), "users: no column 'x'; its columns are user_id, y"),
        (FRAME.clear(), "users: the data frame has no row"),
    ],
)
def test_what_is_not_such_a_data_frame(source, message):
    with pytest.raises(UserError, match=message):
        open_table(source, "users", ["user_id", "x"])


# Features


def features(**options):
    return FeatureTable(**{"kind": "user", "source": FRAME, "key": "user_id", **options})


def test_features_are_joined_in_the_order_of_the_ids():
    table = features(numeric=("x",), categorical=("y",))
    frame, where = table.read()
    assert where == "users"
    ids = pl.Series(["c", "b", "a"])
    unknown = table.unknown(frame, ids, where)
    assert unknown.to_list() == ["c"]
    assert table.join(ids, frame).rows() == [("c", None, None), ("b", None, "2"), ("a", 1.5, "1")]
    assert table.describe(frame, ids, unknown, where, idle="left out", n_rows=3) == [
        (
            "users: 1 users of the interactions (3 rows) are not in it, for example 'c': kept, their "
            "features missing"
        )
    ]
    only = pl.Series(["a"])
    assert table.describe(frame, only, unknown[:0], where, idle="left out") == [
        "users: 1 users without an interaction: left out"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numeric": ("x",), "categorical": ("x",)}, "column 'x' is named twice; a column is read"),
        ({"numeric": ("user_id",)}, "'user_id' is the id column; leave it out"),
        ({"source": None, "numeric": ("x",)}, r"dataset.users: not set, .*\(x\); give the file"),
    ],
)
def test_feature_columns_that_are_not_possible(options, message):
    with pytest.raises(UserError, match=message):
        features(**options)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"user_id": ["a", "a"]}, "users, row 2, column 'user_id': 'a' is the id of row 1 already"),
        ({"user_id": ["a", None]}, "users, row 2, column 'user_id': empty"),
        ({"x": ["1", "much"]}, "users, row 2, column 'x': 'much' is not a finite number"),
    ],
)
def test_cells_of_features_are_checked(cells, message):
    frame = FRAME.with_columns(**{name: pl.Series(values) for name, values in cells.items()})
    with pytest.raises(UserError, match=message):
        features(source=frame, numeric=("x",)).read()


@pytest.mark.parametrize("kind", ["table", "interactions"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id": [*"abc", "a"]}, "items, row 4, column 'item_id': 'a' is the id of row 1"),
        ({"price": [*"123", "much"]}, "items, row 4, column 'price': 'much' is not a finite"),
        ({"item_id": [*"pqrs"]}, "items: none of the 4 items of the interactions is in it, for "),
    ],
)
def test_both_kinds_of_tables_refuse_features_with_the_same_message(kind, change, message):
    rows = pl.DataFrame(
        {"user_id": [*"uuuuvvvvwwww"], "item_id": [*"abcd"] * 3, "timestamp": [*range(4)] * 3}
    )
    items = pl.DataFrame({"item_id": [*"abcd"], "price": [*"1234"]} | change)
    make = {"table": TableData, "interactions": Interactions}[kind]
    with pytest.raises(UserError, match=message):
        _ = make(interactions=rows, items=items, item_numeric="price").splits
