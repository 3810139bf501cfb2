"""Reading files: what comes back, and the one line for every mistake."""

import gzip
import os

import polars as pl
import pytest

from recsys_ssm.data.files import collect, read_table, scan_table
from recsys_ssm.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(content, name="a.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_csv_cells_are_text_and_empty_ones_null(write):
    table = read_table(write("\ufeffuser,item,x\r\n007,1,\r\n8,,2\r\n"))
    assert table.rows() == [("007", "1", None), ("8", None, "2")]


def test_only_the_named_columns_in_that_order(write):
    path = write("a,b,c\n1,2,3\n")
    assert read_table(path, columns=["c", "a"]).rows() == [("3", "1")]
    assert scan_table(path, columns=["b"]).collect_schema().names() == ["b"]


def test_other_separators_compression_and_parquet(write, tmp_path):
    assert read_table(write("a;b\n1;2\n"), separator=";").rows() == [("1", "2")]
    assert read_table(write(gzip.compress(b"a,b\n1,2\n"), "a.csv.gz")).rows() == [("1", "2")]
    frame = pl.DataFrame({"a": [1], "b": [2.5]})
    for name in ("a.parquet", "a.PQ"):
        frame.write_parquet(tmp_path / name)
        assert read_table(tmp_path / name, columns=["b"]).rows() == [(2.5,)]


def test_a_path_in_the_home_folder(write, tmp_path, monkeypatch):
    write("a\n1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_table("~/a.csv").rows() == [("1",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.csv: the file is empty"),
        ("user,item\n", "a.csv: no row below the header line"),
        ("\n\n", "a.csv: not a readable CSV file"),
        ("user,thing\n1,2\n", "a.csv: no column 'item'; its columns are user, thing$"),
        (
            "user;item\n1;2\n",
            "no column 'user'.*the separator seems to be ';', not ',': dataset.separator=\"';'\"",
        ),
        ("user\titem\n1\t2\n", r"the separator seems to be '\\t', not ','"),
        ("user,item\n1,2\n\n1,2,3\n", "line 4 has 3 cells, the header line 2"),
        ('user,item\n1,2\n3,"four\n5,6\n', 'quotation mark " opened in line 3 is not closed'),
        ("user,item\n1,é\n".encode("latin-1"), "a.csv: .*it is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe\xff", "a.csv: .*it is not UTF-8 text"),
        ("user,item,item\n1,2,3\n", "two columns are called 'item'"),
    ],
)
def test_a_file_that_is_no_such_table(write, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_table(write(content), columns=["user", "item"])
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"x/b.csv: no such file \(looked in {tmp_path}/x\)"):
        read_table("x/b.csv")
    with pytest.raises(UserError, match="is a folder"):
        read_table(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may read every file")
def test_a_file_one_may_not_read(write):
    path = write("a\n1\n")
    path.chmod(0)
    with pytest.raises(UserError, match="not a readable CSV file"):
        read_table(path)


def test_a_broken_parquet_file(write):
    with pytest.raises(UserError, match=r"a.parquet: not a readable Parquet file"):
        read_table(write("no parquet at all", "a.parquet"))


def test_a_tab_as_it_is_written(write):
    assert read_table(write("a\tb\n1\t2\n"), separator=r"\t")["b"].to_list() == ["2"]


@pytest.mark.parametrize("separator", ["", ";;", "é"])
def test_a_separator_is_one_character(write, separator):
    with pytest.raises(UserError, match="give one character"):
        read_table(write("a\n1\n"), separator=separator)


def test_a_lazy_frame_that_leaves_no_row_is_named_after_its_file(write):
    path = write("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"a.csv: no row"):
        collect(scan_table(path).filter(pl.col("a") == "9"), path)
