"""No row vanishes: quotation marks, names that look like patterns, tables in many layouts, missing ids."""

from __future__ import annotations

import gzip
import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from events import IN_ORDER, ROWS, frame, histories, lines, splits_of, write

from recsys_ssm.data.columns import keys, times
from recsys_ssm.data.files import read_table, scan_table
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.data.table import TableData
from recsys_ssm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


def shop(titles: dict[int, str], n: int = 400) -> str:
    """Return a table of n rows, with some titles (by row, from 1) as they are given."""
    rows = [
        f"u{row % 20},i{row % 7},{1000 + row},{titles.get(row, 'Track 8')}"
        for row in range(1, n + 1)
    ]
    return "\n".join(["user_id,item_id,timestamp,title", *rows]) + "\n"


# Quotation marks


@pytest.mark.parametrize(
    "titles",
    [
        {50: '7" mix', 78: '7" mix'},
        {50: '7" mix'},
        {50: '"Heroes', 78: '"Heroes'},
        {50: '"Heroes', 78: 'Heroes"'},
        {50: 'Heroes"', 78: '"Heroes'},
        dict.fromkeys(range(1, 401), '15" screen'),
    ],
)
def test_stray_marks_in_a_column_that_is_not_read_join_no_rows(tmp_path, titles):
    path = write(tmp_path / "x.csv", shop(titles))
    plain = write(tmp_path / "y.csv", shop({}))
    splits = splits_of(path)
    assert histories(splits) == histories(splits_of(plain))
    (note,) = (note for note in splits.notes if "quotation" in note)
    line = min(titles) + 1
    assert f"stray quotation marks in {len(titles)} lines, the first in line {line}:" in note
    table = TableData(interactions=path, timestamp="timestamp").splits
    assert any("400 rows, 20 users, 7 items" in note for note in table.notes)
    assert any("stray quotation marks" in note for note in table.notes)


def test_a_pair_of_stray_marks_does_not_make_one_id_of_many_rows(tmp_path):
    """From a user's id in line 11 to a user's id in line 31: each line still is a row."""
    lines = shop({}).splitlines()
    lines[10], lines[30] = '"' + lines[10], lines[30].replace(",", '",', 1)
    with pytest.raises(UserError, match='quotation mark " opened in line 11 is not closed'):
        splits_of(write(tmp_path / "x.csv", "\n".join(lines) + "\n"))
    lines[10] = lines[10].replace('"u', 'u"', 1)
    splits = splits_of(write(tmp_path / "y.csv", "\n".join(lines) + "\n"))
    assert {'u"10', 'u10"'} <= set(splits.user_ids) and splits.histories.events.size == 400
    assert any("stray quotation marks in 2 lines" in note for note in splits.notes)


def test_marks_that_are_needed_are_kept_beside_stray_ones(tmp_path):
    """Titles with separators need their marks; a stray mark elsewhere is a character."""
    content = shop({3: '"Tea, green"', 9: '7" mix', 12: '"say ""hi"""', 15: '"two\nlines"'})
    notes: list[str] = []
    table = read_table(write(tmp_path / "x.csv", content), notes=notes)
    assert table.height == 400
    assert table["title"][2] == "Tea, green" and table["title"][8] == '7" mix'
    assert table["title"][11] == 'say "hi"' and table["title"][14] == "two\nlines"
    assert any("1 rows have a cell of several lines" in n and "line 16" in n for n in notes)
    assert any("stray quotation marks in 1 lines, the first in line 10" in n for n in notes)
    stray = shop({3: '"Tea, green"', 50: '"Heroes', 78: 'Heroes"'})
    with pytest.raises(UserError, match="opened in line 51 closes in line 79, and the lines"):
        read_table(write(tmp_path / "y.csv", stray))
    stray = shop({3: '"Tea, green"', 50: '"Heroes', 78: '"Heroes'})
    with pytest.raises(UserError, match='mark " opened in line 51 is not closed'):
        read_table(write(tmp_path / "z.csv", stray))


def test_a_pair_of_stray_marks_within_a_line_does_not_join_cells(tmp_path):
    text = 'user_id,item_id,rating\nu1,i1,5\n"u1,i2",5\nu1,i3,5\nu1,i4,5\n'
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(UserError, match='mark " opened in line 3 is not closed'):
        splits_of(path, timestamp=None)
    assert read_table(path, columns=["item_id", "rating"])["item_id"].to_list()[1] == 'i2"'
    text += 'u1,"i5, large",5\n'
    with pytest.raises(UserError, match='mark " opened in line 3 is not closed'):
        splits_of(write(tmp_path / "y.csv", text), timestamp=None)


def test_cells_of_several_lines_are_cells_and_are_noted(tmp_path):
    path = write(tmp_path / "x.csv", 'id,text\n1,"good\nvery good"\n2,"a, b"\n3,bad\n')
    notes: list[str] = []
    table = read_table(path, notes=notes)
    assert table.rows() == [("1", "good\nvery good"), ("2", "a, b"), ("3", "bad")]
    assert len(notes) == 1 and "1 rows have a cell of several lines" in notes[0]
    assert read_table(write(tmp_path / "y.csv", 'text\n"one\ntwo"\nthree\n')).height == 2


def test_marks_around_cells_are_removed_where_others_are_stray(tmp_path):
    path = write(tmp_path / "x.csv", '"id","text"\n"1","good"\n2,"7"" mix"\n3,7" mix\n4,""\n')
    table = read_table(path)
    assert table.columns == ["id", "text"]
    assert table.rows() == [("1", "good"), ("2", '7" mix'), ("3", '7" mix'), ("4", None)]


def test_cells_larger_than_the_limit_of_csv(tmp_path):
    big = "x" * 200_000
    path = write(tmp_path / "x.csv", f'id,text\n1,"{big}\n{big}"\n2,7" mix\n')
    assert read_table(path)["text"].str.len_bytes().to_list() == [400_001, 6]


def test_messages_are_short_whatever_a_cell_has(tmp_path):
    big = "x" * 6_000_000
    for text in (f"user_id,item_id,timestamp\nu,a,{big}\n", big + "\n", f"{big},b\n1,2\n"):
        with pytest.raises(UserError) as caught:
            splits_of(write(tmp_path / "x.csv", text))
        assert len(str(caught.value)) <= 400
    (tmp_path / "many.csv").write_text(",".join(f"column_{i}" for i in range(500)) + "\n1\n")
    with pytest.raises(UserError) as caught:
        splits_of(tmp_path / "many.csv")
    assert len(str(caught.value)) <= 400


# Names


@pytest.mark.parametrize("name", ["a?.csv", "a*.csv", "data[12].csv", "a{1,2}.csv", "a[.csv"])
def test_a_name_is_no_pattern(tmp_path, name):
    for other in ("a1.csv", "a2.csv", "data1.csv", "data2.csv"):
        write(tmp_path / other, "user_id,item_id\nother,other\n")
    folder = tmp_path / "project [v2]"
    folder.mkdir()
    for place in (tmp_path, folder):
        frame().write_csv(place / name)
        assert histories(splits_of(place / name)) == IN_ORDER
        parquet = place / name.replace("csv", "parquet")
        frame().write_parquet(parquet)
        assert histories(splits_of(parquet)) == IN_ORDER
        assert scan_table(parquet).collect().height == len(ROWS)
        text = write(place / name.replace("csv", "txt"), "u1 a b c d\nu2 b a d\nu3 e a\n")
        assert histories(splits_of(text)) == IN_ORDER
        dat = write(place / name.replace("csv", "dat"), lines(separator="::"))
        assert histories(splits_of(dat)) == IN_ORDER


def test_a_cache_in_a_folder_that_looks_like_a_pattern(tmp_path):
    frame().write_csv(tmp_path / "x.csv")
    for _ in range(2):
        splits = splits_of(tmp_path / "x.csv", cache_dir=tmp_path / "c[1]*")
        assert histories(splits) == IN_ORDER


# Layouts


@pytest.mark.parametrize("separator", [" ", "\t", ",", "::", ";"])
def test_a_text_with_named_columns_is_a_table(tmp_path, separator):
    path = write(tmp_path / "x.txt", lines(separator=separator))
    names = ["user_id", "item_id", "rating", "timestamp"]
    assert histories(splits_of(path, names=names)) == IN_ORDER
    header = separator.join(names) + "\n"
    assert (
        histories(splits_of(write(tmp_path / "y.txt", lines(separator=separator, header=header))))
        == IN_ORDER
    )


def test_names_are_never_ignored_silently(tmp_path):
    names = ["user_id", "item_id", "rating", "timestamp"]
    sequences = write(tmp_path / "x.txt", "u1 a b c d\nu2 b a d\nu3 e a\n")
    splits = splits_of(sequences, names=names)  # as the configs of Amazon's files have them
    assert histories(splits) == IN_ORDER
    assert any("read as sequences" in note for note in splits.notes)
    with pytest.raises(UserError, match=r"not every line has as many cells; set dataset.format"):
        splits_of(write(tmp_path / "y.txt", lines(separator=" ") + "u1 a 1 1 x\n"), names=names)
    with pytest.raises(UserError, match=r"dataset.user=who: the file has no such header line"):
        splits_of(sequences, user="who")
    item = write(tmp_path / "u.item", "a|1\nb|2\nc|1\nd|2\ne|1\n")
    frame().write_csv(tmp_path / "rows.csv")
    splits = splits_of(
        tmp_path / "rows.csv",
        items=item,
        item_names=["item_id", "kind"],
        item_categorical=["kind"],
        items_separator="|",
    )
    assert splits.items is not None and splits.items.categorical[:, 0].tolist() == [1, 2, 1, 2, 1]


def test_a_dat_file_with_tabs_and_a_header_line(tmp_path):
    header = "who\twhat\tstars\twhen\n"
    path = write(tmp_path / "x.dat", lines(separator="\t", header=header))
    assert histories(splits_of(path, user="who", item="what", timestamp="when")) == IN_ORDER
    with pytest.raises(UserError, match="no column 'user_id'; its columns are who, what, stars"):
        splits_of(path)
    assert (
        histories(splits_of(write(tmp_path / "y.dat", lines(separator="::", header=""))))
        == IN_ORDER
    )


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "list.json"])
def test_json(tmp_path, name):
    rows = frame().to_dicts()
    text = "".join(json.dumps(row | {"other": {"a": 1}}) + "\n\n" for row in rows)
    text = json.dumps(rows) if name == "list.json" else text
    content = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
    (tmp_path / name).write_bytes(content)
    assert histories(splits_of(tmp_path / name)) == IN_ORDER


def test_mistakes_in_json_are_named(tmp_path):
    for text, message in (
        ('{"user_id": "u"}\n{"user_id"\n', "line 2: not JSON"),
        ('{"user_id": "u"}\n', "no column 'item_id'; its columns are user_id"),
        ("[1]\n", "object 1: not a JSON object"),
        ("3\n", "line 1: not a JSON object"),
        ("\n", "no object"),
        ('{"user_id": "u", "item_id": {"a": 1}, "timestamp": []}\n', "not a time|not times|empty"),
    ):
        with pytest.raises(UserError, match=message):
            splits_of(write(tmp_path / "x.json", text))


def test_a_folder_of_parquet_parts(tmp_path):
    folder = tmp_path / "rows.parquet"
    folder.mkdir()
    (folder / "_SUCCESS").write_text("")
    frame(ROWS[:4]).write_parquet(folder / "part-00000.snappy.parquet")
    frame(ROWS[4:]).write_parquet(folder / "part-00001.snappy.parquet")
    data = Interactions(interactions=folder)
    assert histories(data.splits) == IN_ORDER
    before = data.sources
    frame(ROWS[4:8]).write_parquet(folder / "part-00001.snappy.parquet")
    assert Interactions(interactions=folder).sources != before


def test_lists_have_a_row_for_each_element(tmp_path):
    made = frame().sort("user_id", "timestamp", maintain_order=True)
    lists = made.group_by("user_id", maintain_order=True).agg("item_id", "timestamp")
    lists = pl.concat(
        [lists, lists[:1].with_columns(user_id=pl.lit("none"), item_id=[], timestamp=[])]
    )
    lists.write_parquet(tmp_path / "x.parquet")
    splits = splits_of(tmp_path / "x.parquet")
    assert histories(splits) == IN_ORDER
    assert any(
        "4 rows have lists of 9 elements; 1 rows with an empty list" in n for n in splits.notes
    )
    uneven = lists.with_columns(timestamp=pl.lit([1, 2]))
    with pytest.raises(UserError, match="row 1, column 'timestamp': its list has another length"):
        splits_of(uneven)


def test_an_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("x.csv", "user_id,item_id\n")
    with pytest.raises(UserError, match="is an archive; unpack it"):
        splits_of(tmp_path / "x.zip")


def test_a_header_line_among_the_rows_is_not_a_user(tmp_path):
    text = lines(header="user_id,item_id,rating,timestamp\n")
    path = write(tmp_path / "x.csv", text + text)
    for options in ({"timestamp": None, "duplicates": "first"}, {}):
        splits = splits_of(path, **options)
        assert set(splits.user_ids) == {"u1", "u2", "u3"} and "item_id" not in splits.item_ids
        assert any("1 rows repeat the header line: left out" in note for note in splits.notes)


def test_blank_lines_are_left_out_and_counted(tmp_path):
    text = lines(header="user_id,item_id,rating,timestamp\n").replace("\n", "\n\n", 3) + "\n\n"
    splits = splits_of(write(tmp_path / "x.csv", text))
    assert histories(splits) == IN_ORDER
    assert any("5 rows are blank in every column that is read: left out" in n for n in splits.notes)
    broken = text + "u1,a,1,soon\n"
    with pytest.raises(UserError, match="row 15, column 'timestamp': 'soon'"):
        splits_of(write(tmp_path / "y.csv", broken))


def test_the_columns_of_an_inter_file_that_are_called_alike(tmp_path):
    text = "user_id:token\titem_id:token\tuser_id:float\ttimestamp:float\n1\t2\t3\t4\n"
    with pytest.raises(UserError, match="two columns are called 'user_id'"):
        splits_of(write(tmp_path / "x.inter", text))


def test_titles_with_the_line_breaks_of_other_alphabets(tmp_path):
    rows = [
        (f"{user}\x85".encode("latin-1"), item, rating, time) for user, item, rating, time in ROWS
    ]
    content = b"".join(b"%s::%s::%d::%d\n" % (u, i.encode(), r, t) for u, i, r, t in rows)
    (tmp_path / "x.dat").write_bytes(content)
    assert splits_of(tmp_path / "x.dat").histories.events.size == len(ROWS)


# Ids and times


@pytest.mark.parametrize("word", ["NA", "NULL", "None", "nan", "\\N"])
def test_a_text_for_a_missing_id_is_not_a_user(tmp_path, word):
    rows = [(word if row % 3 else "u1", f"i{row}", 1, row) for row in range(12)]
    path = write(tmp_path / "x.csv", lines(rows, header="user_id,item_id,rating,timestamp\n"))
    with pytest.raises(
        UserError, match=r"row 2, column 'user_id': .* a missing id \(8 rows\)"
    ) as caught:
        splits_of(path)
    assert "dataset.filter='user_id != \"" in str(caught.value)
    kept = splits_of(path, filter="user_id == 'u1'")
    assert kept.user_ids.to_list() == ["u1"]
    assert set(splits_of(path, missing=[]).user_ids) == {"u1", word}


def test_an_empty_id_comes_with_the_filter_that_leaves_it_out(tmp_path):
    text = lines(header="user_id,item_id,rating,timestamp\n") + ",a,1,1\n,b,1,2\n"
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(UserError, match=r"row 10, .* 2 rows are left out by dataset.filter="):
        splits_of(path)
    assert histories(splits_of(path, filter="user_id is not null")) == IN_ORDER


def test_ids_in_two_spellings_are_noted(tmp_path):
    rows = [("u", "12", 1, 1), ("u", "12.0", 1, 2), ("u", "3.0", 1, 3), ("u", "4", 1, 4)]
    notes = splits_of(frame(rows)).notes
    assert any("'item_id' has 1 ids in two spellings, as '12' and '12.0'" in note for note in notes)


@pytest.mark.parametrize(
    ("days", "times", "note"),
    [
        (
            ["2024-05-03", "2024-05-02", "2024-05-01", "2024-05-01"],
            ["1:00", "9:05", "23:59:59.5", "9:00:01"],
            False,
        ),
        (["2024-05-03", "2024-05-02", "2024-05-01", "2024-05-01"], ["5", "1", "300", "20"], True),
        (["3", "2", "1", "1"], ["5", "1", "300", "20"], True),
    ],
)
def test_a_date_and_a_time_in_two_columns(days, times, note):
    table = pl.DataFrame(
        {"user_id": ["u"] * 4, "item_id": list("dcba"), "day": days, "time": times}
    )
    splits = splits_of(table, timestamp=["day", "time"])
    assert histories(splits) == {"u": list("abcd")}
    assert any("ordered by day and then by time" in n for n in splits.notes) == note
    data = TableData(
        interactions=pl.concat([table.with_columns(user_id=pl.lit(f"u{i}")) for i in range(20)]),
        timestamp=["day", "time"],
    )
    assert any("the last by day, time" in n for n in data.splits.notes)


@pytest.mark.parametrize(
    "times",
    [
        ["2017-09-26 9:05:00", "2017-09-26 10:00:00", "2017-09-26 23:30:50", "2017-09-27 0:00"],
        [
            "2017-09-26T14:05:00+05:00",
            "2017-09-26T02:00:00-08:00",
            "2017-09-26T23:30:50+00:00",
            "2017-09-27T00:00Z",
        ],
    ],
)
def test_hours_without_a_zero_and_offsets_are_instants(times):
    table = pl.DataFrame({"user_id": ["u"] * 4, "item_id": list("abcd"), "timestamp": times})
    assert histories(splits_of(table[::-1])) == {"u": list("abcd")}
    assert not any("as text" in note for note in splits_of(table).notes)


def test_ids_that_are_durations_are_refused():
    table = frame().with_columns(user_id=pl.duration(seconds="timestamp"))
    with pytest.raises(UserError, match="column 'user_id' holds Duration"):
        splits_of(table)


# Options


def test_numbers_as_names_are_texts(tmp_path):
    path = write(tmp_path / "x.csv", lines())
    options = {"names": [0, 1, 2, 3], "user": 0, "item": 1, "timestamp": "3"}
    assert histories(splits_of(path, **options)) == IN_ORDER


def test_more_negatives_than_there_is_room_for():
    many = pl.concat([frame().with_columns(pl.col("user_id") + str(i)) for i in range(20)])
    with pytest.raises(UserError, match=r"dataset.negatives=1000000000: makes .* give at most 5"):
        _ = TableData(interactions=many, negatives=1e9).splits
    for wrong in (1.5, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"dataset.negatives={wrong}: give a whole number"):
            TableData(interactions=many, negatives=wrong)


def test_the_separator_of_the_items_has_its_own_option(tmp_path):
    frame().write_csv(tmp_path / "rows.csv")
    write(tmp_path / "items.csv", "item_id;kind\na;x\nb;y\nc;x\nd;y\ne;x\n")
    options = {"items": tmp_path / "items.csv", "item_categorical": ["kind"]}
    for kind in (splits_of, lambda path, **options: TableData(interactions=path, **options).splits):
        with pytest.raises(UserError, match=r"dataset.items_separator=\"';'\""):
            kind(tmp_path / "rows.csv", **options)
    splits = splits_of(tmp_path / "rows.csv", **options, items_separator=";")
    assert splits.items is not None and splits.items.n_rows == 5


def test_repeats_are_shared_out_in_a_note(tmp_path):
    rows = [(f"u{u}", "ab"[event % 2], 1, event) for u in range(10) for event in range(6)]
    notes = splits_of(frame(rows)).notes
    assert any(n.startswith("100.0% of the validation") and "recommended again" in n for n in notes)
    assert not any("of the validation targets" in n for n in splits_of(frame()).notes)


def test_a_small_number_of_mutated_files(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("fuzz_files", ROOT / "scripts" / "fuzz_files.py")
    assert spec is not None and spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    monkeypatch.setattr("sys.argv", ["fuzz_files.py", "--n", "120", "--seed", "7"])
    assert fuzz.main() == 0
    assert "120 files" in capsys.readouterr().out


# Ids and times that are not what they seem


@pytest.mark.parametrize(
    ("ids", "note"),
    [
        (["7", "07"], "1 ids in two spellings, as '07' and '7'"),
        (["a", "a "], "1 ids in two spellings, as 'a' and 'a '"),
        (["A", "a"], "1 ids in two spellings"),
        (["'a'", "a"], "1 ids in two spellings"),
        (["a\u200b", "a"], "1 ids in two spellings"),
        (["1.23E+12", "5"], "a spreadsheet may have shortened them"),
        (["a", "b"], None),
        (["10", "100"], None),
    ],
)
def test_ids_that_may_be_the_same_are_noted(ids, note) -> None:
    notes: list[str] = []
    table = pl.DataFrame({"u": ids})
    assert keys(table, "u", "x.csv", notes=notes).to_list() == ids  # nothing is changed
    assert [note in one for one in notes] == [True] if note else not notes


@pytest.mark.parametrize(
    ("kind", "least"), [(pl.Float64, 2**53 + 2), (pl.Float32, 2**24 + 2)], ids=str
)
def test_ids_too_large_for_a_float_are_refused(kind, least) -> None:
    """Neighbouring ids had become one: 40 users were read as 11."""
    with pytest.raises(UserError, match=r"row 2, column 'u': an id above .* store ids as integers"):
        keys(pl.DataFrame({"u": pl.Series([1.0, least], dtype=kind)}), "u", "x")
    exact = pl.DataFrame({"u": pl.Series([1.0, least - 2], dtype=kind)})
    assert keys(exact, "u", "x").to_list() == ["1", str(least - 2)]


def test_json_ids_beyond_64_bits_stay_apart(tmp_path) -> None:
    rows = [
        {"user_id": 2**64 + u, "item_id": i, "timestamp": i} for u in range(3) for i in range(4)
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    splits = Interactions(interactions=path).splits
    assert list(splits.user_ids) == [str(2**64 + u) for u in range(3)]


@pytest.mark.parametrize("unit", [10**3, 10**6])
def test_seconds_beside_milliseconds_are_refused(unit) -> None:
    """The rows in milliseconds were taken for the latest."""
    cells = [1_700_000_000, 1_700_000_001 * unit, 1_700_000_002]
    with pytest.raises(UserError, match=r"row 2, column 't': .* another unit than 1700000000 in"):
        times(pl.DataFrame({"t": cells}), "t", "x")
    for fine in (
        [1, 1_700_000_000],
        [5, 10**12],
        [c * unit for c in (1_700_000_000, 1_700_000_001)],
    ):
        assert times(pl.DataFrame({"t": fine}), "t", "x").values.tolist() == fine


def test_twelve_hour_times_and_a_named_zone_are_times() -> None:
    """They were compared as text: 9 in the evening before 10 in the morning."""
    cells = ["2023-01-09 10:00:00 AM", "2023-01-09 9:00:00 PM", "2023-01-10 1:30 AM"]
    read = times(pl.DataFrame({"t": cells}), "t", "x")
    assert read.unit == "us" and np.all(np.diff(read.values) > 0) and read.note is None
    zone = times(pl.DataFrame({"t": ["2023-01-09 10:00:00 UTC"]}), "t", "x")
    assert zone.values == times(pl.DataFrame({"t": ["2023-01-09 10:00:00Z"]}), "t", "x").values


# Files that are not what they seem


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04" + bytes(90), "is a spreadsheet"),
        (b"BZh91AY" + bytes(90), "compressed with bzip2"),
        (b"\xfd7zXZ\x00" + bytes(90), "compressed with xz"),
        (b"SQLite format 3\x00", "is an SQLite database; export the table"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("user_id,item_id\n1,2\n".encode("utf-16"), "is UTF-16 text; save it in UTF-8"),
        (b"user_id,item_id,timestamp\r1,2,3\r", "carriage returns alone"),
        (b"userId,item_id,timestamp\n1,2,3\n", "give the column's name: dataset.user=userId"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, content, what) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UserError) as caught:
        _ = Interactions(interactions=tmp_path / "x.csv").splits
    assert what in str(caught.value)


def test_parquet_is_known_by_its_content(tmp_path) -> None:
    table = pl.DataFrame({"user_id": ["a"], "item_id": ["b"]})
    table.write_parquet(tmp_path / "x.csv")
    assert read_table(tmp_path / "x.csv").equals(table)


def test_blanks_behind_separators_are_no_part_of_names_and_ids(tmp_path) -> None:
    rows = [f"u{u}, i{i}, {i}" for u in range(3) for i in range(4)]
    (tmp_path / "x.csv").write_text("\n".join(["user_id, item_id, timestamp", *rows]) + "\n")
    splits = Interactions(interactions=tmp_path / "x.csv").splits
    assert splits.item_ids == ["i0", "i1", "i2", "i3"]
    assert any("blanks around the names" in note for note in splits.notes)


def test_an_absent_column_names_its_option(tmp_path) -> None:
    """The message for the default column had no way on: "no column 'timestamp'"."""
    pl.DataFrame({"user_id": ["a"], "item_id": ["b"], "day": [1]}).write_csv(tmp_path / "x.csv")
    frame = pl.read_csv(tmp_path / "x.csv")
    for source, table, options, option in (
        (tmp_path / "x.csv", Interactions, {}, "timestamp"),
        (frame, Interactions, {}, "timestamp"),
        (frame, Interactions, {"timestamp": "day", "item": "sku"}, "item"),
        (frame, Interactions, {"timestamp": "day", "rating": "stars", "min_rating": 1}, "rating"),
        (tmp_path / "x.csv", TableData, {"user": "who"}, "user"),
        (frame, TableData, {"target": "stars"}, "target"),
    ):
        with pytest.raises(UserError) as caught:
            _ = table(interactions=source, **options).splits
        assert f"; give the column's name: dataset.{option}=…" in str(caught.value)
    columns = {"timestamp": "day", "items_id": "sku", "item_numeric": ["day"]}
    data = Interactions(interactions=frame, items=frame, **columns)
    with pytest.raises(UserError, match=r"items: no column 'sku'.*: dataset.items_id=…"):
        data.items.read()
