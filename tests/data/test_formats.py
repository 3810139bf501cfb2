"""Formats of files of interactions: each gives the same histories."""

from __future__ import annotations

import gzip

import polars as pl
import pytest
from events import IN_ORDER, ROWS, frame, histories, lines, splits_of, write

from recsys_ssm.data.formats import format_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


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
    splits = splits_of(path, **options)
    assert histories(splits) == IN_ORDER
    assert splits.item_ids == list("abcde") and splits.user_ids.to_list() == ["u1", "u2", "u3"]
    assert any("not in the order of time: sorted" in note for note in splits.notes)


def test_a_sequence_text_is_in_order_already(tmp_path):
    path = write(tmp_path / "x.txt", "u1 a b c d\n\nu2\tb  a d \nu3 e a\n")
    splits = splits_of(path)
    assert histories(splits) == IN_ORDER
    assert not any("sorted" in note for note in splits.notes)
    again = write(tmp_path / "y.txt", "u1 a b\nu2 b a d\nu1 c d\nu3 e a\n")
    splits = splits_of(again)
    assert histories(splits) == IN_ORDER
    assert any("1 lines continue the user of an earlier line" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("make", "separator"),
    [(csv_without_header, b"\r\n"), (recbole, b"\r\n"), (movielens, b"\r\n"), (movielens, b"\n")],
)
def test_line_ends_and_byte_order_marks_of_windows(tmp_path, make, separator):
    path, options = make(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", separator))
    assert histories(splits_of(path, **options)) == IN_ORDER
    text = tmp_path / "x.txt"
    text.write_bytes(b"\xef\xbb\xbfu1 a b c d\r\nu2 b a d\r\nu3 e a\r\n")
    assert histories(splits_of(text)) == IN_ORDER


def test_formats_are_told_by_name(tmp_path):
    assert format_of("a/ratings.dat") == "movielens"
    assert format_of("x.CSV.GZ") == "csv" and format_of("plain") == "csv"
    path = write(tmp_path / "odd.name", lines(separator="::"))
    assert histories(splits_of(path, format="movielens")) == IN_ORDER


def test_ids_stay_what_they_are(tmp_path):
    """Leading zeros, 64-bit numbers that no float holds, spaces within, another alphabet."""
    big = 2**53 + 1
    rows = [(big, f"00{i}", 1, i) for i in range(4)] + [(big + 1, "é x", 1, i) for i in range(3, 6)]
    header = "user_id,item_id,rating,timestamp\n"
    splits = splits_of(write(tmp_path / "x.csv", lines(rows, header=header)), duplicates="keep")
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
    splits = splits_of(tmp_path / "x.parquet")
    assert histories(splits) == {str(big): ["7", "8", "9", "6"], str(2**63 - 1): ["7"]}
