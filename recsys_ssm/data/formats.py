"""Read the files that interactions come in as one table: user, item and, where there are, rating and time.

=============  ==============================  =====================================================
format         file                            a line
=============  ==============================  =====================================================
``csv``        ``*.csv``, ``*.tsv``, …         cells, below a header line (or without: ``names``)
``parquet``    ``*.parquet``, ``*.pq``         (also a folder of such parts)
``json``       ``*.json``, ``*.jsonl``         a JSON object (or one list of objects in the file)
``recbole``    ``*.inter``, ``*.item``         cells between tabs, below a typed header: ``user_id:token``
``movielens``  ``*.dat``                       ``user::item::rating::timestamp``, no header, Latin-1
``sequences``  ``*.txt``                       ``user item item …`` in the order of time, no header
=============  ==============================  =====================================================

A ``*.dat`` without ``::`` and a ``*.txt`` whose columns are named are tables of cells between tabs, commas, semicolons,
bars or white space. A row is counted from 1 below the header line, or from the first line where there is none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from recsys_ssm.data.files import (
    Compact,
    check_file,
    collect,
    first_line,
    header_of,
    is_parquet,
    parts_of,
    read_json,
    read_lines,
    read_table,
    require_columns,
    scan_table,
    shown,
)
from recsys_ssm.errors import UserError

Format = Literal["csv", "parquet", "json", "recbole", "movielens", "sequences"]
FORMATS: tuple[str, ...] = get_args(Format)

_BY_SUFFIX: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".inter": "recbole",
    ".item": "recbole",
    ".dat": "movielens",
    ".txt": "sequences",
}
_COMPRESSED = {".gz", ".zst"}

MOVIELENS = ("user_id", "item_id", "rating", "timestamp")
"""Names of the columns of ``ratings.dat`` unless ``names`` gives others."""

SPACE = "white space"
"""Separator of a text whose cells stand between blanks, any number of them."""


def format_of(path: str | Path) -> Format:
    """Return the format of a file by its name; CSV for any other name."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    kind = _BY_SUFFIX.get(suffixes[-1], "csv") if suffixes else "csv"
    return "parquet" if kind == "csv" and Path(path).is_dir() else kind


def separator_of(path: str | Path) -> str:
    """Return the separator that a CSV of this name usually has."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "\t" if {".tsv", ".data", ".inter", ".item"} & set(suffixes) else ","


def is_folder_of_parts(path: Path) -> bool:
    """Return True for a folder that holds a table in Parquet parts."""
    return path.is_dir() and bool(parts_of(path))


def is_sequences(
    path: Path, columns: Sequence[str], names: Sequence[str], separator: str | None
) -> bool:
    """Return False for a ``*.txt`` that is a table: columns are named, and its lines or its header line have them.

    Args:
        path: The file.
        columns: Columns to read; the first two are the user and the item.
        names: Names of the columns of a file without a header line.
        separator: Separator between the cells of a line; None: any.

    Raises:
        UserError: Columns are named, and only some of the lines have that many cells.
    """
    head = first_line(path)
    if set(columns[:2]) <= set(_cells(head, separator or sniff(head))):
        return False
    if not names:
        return True
    lines = itertools.islice((line for line in read_lines(path) if line.strip()), 1000)
    separator = separator or sniff(head, len(names))
    fits = [len(_cells(line, separator)) == len(names) for line in lines]
    if all(fits):
        return False
    if sum(fits) > len(fits) / 2:
        raise UserError(
            f"{path}: dataset.names names {len(names)} columns, but not every line has as many cells; set "
            "dataset.format=csv and dataset.separator, or dataset.format=sequences for lines like: user item item …"
        )
    return True


def sniff(line: str, width: int = 0) -> str:
    """Return the separator that a line seems to have: ``::``, one character, or :data:`SPACE`.

    Args:
        line: A line of the file.
        width: Number of cells that it should have, if that is known.
    """
    known = ["::", "\t", ",", ";", "|"]
    for separator in known:
        if width and line.count(separator) == width - 1 and width > 1:
            return separator
    if width and len(line.split()) == width:
        return SPACE
    return next((separator for separator in known if separator in line), SPACE)


def _cells(line: str, separator: str) -> list[str]:
    cells = line.split() if separator == SPACE else line.split(separator)
    return [cell.strip().strip('"') for cell in cells]


def read(
    path: str | Path,
    columns: Sequence[str],
    *,
    format: Format | None = None,  # noqa: A002 (the usual name)
    names: Sequence[str] = (),
    separator: str | None = None,
    names_option: str | None = "dataset.names",
    separator_option: str = "dataset.separator",
    notes: list[str] | None = None,
    compact: Compact | None = None,
) -> pl.DataFrame:
    """Read the named columns of a table; the cells of a text file are text.

    Args:
        path: The file.
        columns: Columns to read, in this order.
        format: One of :data:`FORMATS`; None: by the file's name.
        names: Names of the columns of a file without a header line. A first line that contains the first of
            ``columns`` is a header line nevertheless.
        separator: Separator between the cells of a line; None: the format's own, a comma in a CSV.
        names_option: Option that sets ``names``, for messages; None: there is none.
        separator_option: Option that sets the separator, for messages.
        notes: List for remarks on how the file was read; None: they are logged.
        compact: Columns to hold in little memory, where the format's reader can; None: cells are held as they are.

    Raises:
        UserError: The file is missing, empty or not of that format, or it lacks a column.
    """
    path = Path(path).expanduser()
    kind = format or format_of(path)
    if kind == "parquet" or (path.is_file() and is_parquet(path)):
        return (collect if compact is None else compact.collect)(
            scan_table(path, columns=columns), path
        )
    if kind == "json":
        return read_json(path, columns)
    check_file(path, "rows")
    if kind in ("movielens", "sequences"):
        head = first_line(path)
        separator = separator or ("::" if "::" in head else sniff(head, len(names)))
        if separator in ("::", SPACE):
            return _split_lines(path, columns, names, separator, kind, names_option)
        if kind == "movielens" and not names and columns[0] not in _cells(head, separator):
            names = _movielens_names(path, columns, separator, head)
    typed = first_line(path).partition(separator or "\t")[0]
    if kind == "recbole" and not (names and not re.fullmatch(r"[^:|]+:\w+", typed)):
        return _recbole(path, columns, separator or "\t", notes, separator_option, compact)
    if kind == "recbole" and separator is None:  # GroupLens' u.item has bars
        found = sniff(first_line(path), len(names))
        separator = found if len(found) == 1 else None
    separator = separator or separator_of(path)
    encoding = "latin-1" if kind in ("recbole", "movielens") else None  # GroupLens' files
    first = header_of(path, _character(separator))
    if not names or columns[0] in first:
        try:
            return read_table(
                path,
                columns=columns,
                separator=separator,
                notes=notes,
                option=separator_option,
                encoding=encoding,
                compact=compact,
            )
        except UserError as error:
            if names or names_option is None or set(columns) & set(first):
                raise
            if "no column" not in str(error):
                raise
            raise UserError(
                f"{error}; if the file has no header line, name its columns with {names_option}"
            ) from error
    if len(names) != len(first):
        raise UserError(
            f"{path}: {names_option} names {len(names)} columns, but the file has {len(first)}; name "
            f"every column, in the order of the file, or set another separator with {separator_option}"
        )
    require_columns(path, names, columns, separator, separator_option)
    return read_table(
        path,
        columns=columns,
        separator=separator,
        names=names,
        notes=notes,
        option=separator_option,
        encoding=encoding,
        compact=compact,
    )


def _character(separator: str) -> str:
    """Return a separator, or a comma where it is not one character: that has its own message."""
    separator = "\t" if separator == "\\t" else separator
    return separator if len(separator.encode()) == 1 else ","


def _recbole(
    path: Path,
    columns: Sequence[str],
    separator: str,
    notes: list[str] | None,
    option: str,
    compact: Compact | None,
) -> pl.DataFrame:
    """Read a table whose header line has types: ``user_id:token``."""
    typed = header_of(path, _character(separator))
    bare = [name.partition(":")[0] for name in typed]
    require_columns(path, bare, columns, separator, option)
    written = {name: typed[bare.index(name)] for name in columns}
    if compact is not None:
        compact = Compact(
            [written[name] for name in compact.ids], [written[name] for name in compact.values]
        )
    table = read_table(
        path,
        columns=list(written.values()),
        separator=separator,
        quote=False,
        notes=notes,
        option=option,
        compact=compact,
    )
    return table.rename(dict(zip(table.columns, columns, strict=True)))


def _movielens_names(
    path: Path, columns: Sequence[str], separator: str, head: str
) -> Sequence[str]:
    """Return the columns of a ``*.dat`` with other separators and no header line.

    Raises:
        UserError: The line does not have them.
    """
    cells = _cells(head, separator)
    # A header line that lacks a column: the message for it names those it has.
    if len(cells) != len(MOVIELENS) or not cells[0].isdigit():
        return ()
    require_columns(path, MOVIELENS, columns, separator)
    return MOVIELENS


def scan_sequences(path: str | Path, *, separator: str | None = None) -> pl.DataFrame:
    """Read a sequence text, a row for each line: ``user`` (text) and ``items`` (list of text).

    Args:
        path: The file.
        separator: Separator between the ids of a line; None: white space of any length.
    """
    cells = pl.col("line")
    if separator is None:
        ids = cells.str.extract_all(r"\S+")
    else:
        ids = cells.str.split("\t" if separator == "\\t" else separator)
    return (
        read_lines(path)
        .to_frame()
        .select(user=ids.list.first(), items=ids.list.slice(1), blank=cells.str.strip_chars() == "")
    )


def _split_lines(
    path: Path,
    columns: Sequence[str],
    names: Sequence[str],
    separator: str,
    kind: Format,
    names_option: str | None,
) -> pl.DataFrame:
    """Split lines at a separator of several characters, which CSV readers do not support."""
    encoding = "latin-1" if kind == "movielens" else "utf-8"
    lines = read_lines(path, encoding=encoding)
    head = _cells(lines[0], separator)
    if columns[0] in head:  # a header line
        names, lines = head, lines.slice(1)
    elif not names:
        names = MOVIELENS
    if not lines.len():
        raise UserError(f"{path}: no row below the header line")
    require_columns(path, names, columns, separator)
    cells = lines.str.extract_all(r"\S+") if separator == SPACE else lines.str.split(separator)
    if (more := (cells.list.len() > len(names)).arg_true()).len():
        row = int(more[0])
        raise UserError(
            f"{path}, row {row + 1}: {cells[row].len()} cells, but the columns are {', '.join(names)[:100]}; "
            + (f"name every column with {names_option}" if names_option else "correct the line")
            + f" ({shown(lines[row])})"
        )
    return pl.DataFrame(
        [cells.list.get(names.index(name), null_on_oob=True).alias(name) for name in columns]
    )


def check_format(format: str | None) -> None:  # noqa: A002
    """Check that a format exists.

    Raises:
        UserError: It does not.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"dataset.format={format}: expected one of {', '.join(FORMATS)}")
