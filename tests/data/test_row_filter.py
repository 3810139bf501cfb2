"""Row filters: what they keep, and that nothing but comparisons is accepted."""

from __future__ import annotations

import datetime

import polars as pl
import pytest
from events import frame, histories, splits_of

from recsys_ssm.data.row_filter import RowFilter
from recsys_ssm.data.table import TableData
from recsys_ssm.errors import UserError

TABLE = pl.DataFrame(
    {
        "event": ["view", "purchase", None, "purchase", ""],
        "price": ["1", "2.5", "10", " 3 ", None],
        "n": [1, 2, 3, 4, None],
        "day": [datetime.date(2024, 5, day) for day in range(1, 6)],
        "two words": ["a", "b", "c", "d", "e"],
        "ok": [True, False, True, None, False],
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('event == "purchase"', [1, 3]),
        ("event != 'purchase'", [0, 2, 4]),
        ("event == 'purchase' and price > 2.6", [3]),
        ("event == 'purchase' or n == 1", [0, 1, 3]),
        ("not (event == 'purchase')", [0, 2, 4]),
        ("event in ('view', 'purchase')", [0, 1, 3]),
        ("event not in ['view']", [1, 2, 3, 4]),
        ("event is null", [2, 4]),
        ("event is not None and n <= 2", [0, 1]),
        ("price >= 3", [2, 3]),
        ("n > -1 and n < 2", [0]),
        ("day >= '2024-05-04'", [3, 4]),
        ("`two words` == 'c'", [2]),
        ("ok == true", [0, 2]),
        ("n in []", []),
    ],
)
def test_rows_that_fulfil_a_filter(text, rows):
    assert RowFilter(text).mask(TABLE, "x").arg_true().to_list() == rows


@pytest.mark.parametrize(
    "text",
    [
        "event",
        "event = 'purchase'",
        "__import__('os').system('id') == 1",
        "event.upper() == 'A'",
        "event == open('/etc/passwd')",
        "(lambda: 1)() == 1",
        "event == other",
        "1 < n < 3",
        "event == f'{n}'",
        "[n for n in event] == 1",
        "n == 1; n == 2",
        "(" * 500 + "n" + ")" * 500,
        "not " * 490 + "n == 1",
        "n == 1 " + "or n == 1 " * 500,
        "",
        "\0",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match=r"dataset.filter=.*write like event_type") as caught:
        RowFilter(text).mask(TABLE, "x")
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("event > 3", "row 1, column 'event': 'view' is not a number"),
        ("n == 'one'", "column 'n' has numbers"),
        ("day > 'soon'", "day has dates: compare with YYYY-MM-DD"),
        ("n > null", "n is compared with None"),
    ],
)
def test_columns_that_do_not_fit_are_named(text, message):
    with pytest.raises(UserError, match=message):
        RowFilter(text).mask(TABLE, "x")


def test_both_kinds_of_datasets_report_the_rows_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))
    frame().write_csv(tmp_path / "x.csv")
    splits = splits_of(tmp_path / "x.csv", filter="user_id == 'u1' and rating >= 1")
    assert histories(splits) == {"u1": list("abcd")}
    assert any("5 of 9 rows are left out by dataset.filter=" in note for note in splits.notes)
    many = pl.concat([frame().with_columns(pl.col("user_id") + str(i)) for i in range(20)])
    data = TableData(interactions=many, filter="item_id != 'e'")
    assert any("20 of 180 rows are left out" in note for note in data.splits.notes)
    assert "e" not in data.splits.item_ids
    with pytest.raises(UserError, match="leaves no row"):
        _ = TableData(interactions=many, filter="item_id == 'z'").splits
    with pytest.raises(UserError, match="no column 'event'"):
        splits_of(tmp_path / "x.csv", filter="event == 'a'")


def test_rows_are_named_by_their_number_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))
    text = "user_id,item_id,timestamp\nu,a,1\nu,b,2\nuser_id,item_id,timestamp\nu,c,soon\n"
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=r"row 4, column 'timestamp': 'soon'"):
        splits_of(tmp_path / "x.csv", filter="item_id != 'a'")
