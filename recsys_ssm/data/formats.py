"""Read the files that interactions come in as one lazy table: user, item and, where there are, rating and time.

=============  ==========================  =====================================================
format         file                        a line
=============  ==========================  =====================================================
``csv``        ``*.csv``, ``*.tsv``, …     cells, below a header line (or without: ``names``)
``parquet``    ``*.parquet``, ``*.pq``
``recbole``    ``*.inter``, ``*.item``     cells between tabs, below a typed header: ``user_id:token``
``movielens``  ``*.dat``                   ``user::item::rating::timestamp``, no header, Latin-1
``sequences``  ``*.txt``                   ``user item item …`` in the order of time, no header
=============  ==========================  =====================================================

A row is counted from 1 below the header line, or from the first line where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from recsys_ssm.data.files import require_columns, scan_lines, scan_table
from recsys_ssm.errors import UserError

Format = Literal["csv", "parquet", "recbole", "movielens", "sequences"]
FORMATS: tuple[str, ...] = get_args(Format)

_BY_SUFFIX: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".inter": "recbole",
    ".item": "recbole",
    ".dat": "movielens",
    ".txt": "sequences",
}
_COMPRESSED = {".gz", ".zst"}

MOVIELENS = ("user_id", "item_id", "rating", "timestamp")
"""Names of the columns of ``ratings.dat`` unless ``names`` gives others."""


def format_of(path: str | Path) -> Format:
    """Return the format of a file by its name; CSV for any other name."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _BY_SUFFIX.get(suffixes[-1], "csv") if suffixes else "csv"


def separator_of(path: str | Path) -> str:
    """Return the separator that a CSV of this name usually has."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "\t" if {".tsv", ".data", ".inter", ".item"} & set(suffixes) else ","


def scan(
    path: str | Path,
    columns: Sequence[str],
    *,
    format: Format | None = None,  # noqa: A002 (the usual name)
    names: Sequence[str] = (),
    separator: str | None = None,
    names_option: str | None = "dataset.names",
) -> pl.LazyFrame:
    """Scan the named columns of a table; the cells of a text file are text.

    Args:
        path: The file.
        columns: Columns to read, in this order.
        format: One of :data:`FORMATS`; None: by the file's name.
        names: Names of the columns of a file without a header line. A first line that contains the first of
            ``columns`` is a header line nevertheless.
        separator: Separator between the cells of a line; None: the format's own, a comma in a CSV.
        names_option: Option that sets ``names``, for messages; None: there is none.

    Raises:
        UserError: The file is missing, empty or not of that format, or it lacks a column.
    """
    path = Path(path).expanduser()
    kind = format or format_of(path)
    if kind == "parquet":
        return scan_table(path, columns=columns)
    if kind == "movielens":
        return _split_lines(path, columns, names or MOVIELENS, separator or "::")
    if kind == "recbole":
        frame = scan_table(path, separator=separator or "\t", quote=None)
        present = frame.collect_schema().names()
        frame = frame.rename({name: name.partition(":")[0] for name in present})
        require_columns(path, frame.collect_schema().names(), columns, separator or "\t")
        return frame.select(columns)
    separator = separator or separator_of(path)
    first = scan_table(path, separator=separator).collect_schema().names()
    if not names or columns[0] in first:
        try:
            return scan_table(path, columns=columns, separator=separator)
        except UserError as error:
            if names or names_option is None or set(columns) & set(first):
                raise
            raise UserError(
                f"{error}; if the file has no header line, name its columns with {names_option}"
            ) from error
    if len(names) != len(first):
        raise UserError(
            f"{path}: {names_option} names {len(names)} columns, but the file has {len(first)}; name "
            "every column, in the order of the file"
        )
    require_columns(path, names, columns, separator)
    return scan_table(path, separator=separator, names=names).select(columns)


def scan_sequences(path: str | Path, *, separator: str | None = None) -> pl.LazyFrame:
    """Scan a sequence text, a row for each line: ``user`` (text) and ``items`` (list of text).

    Args:
        path: The file.
        separator: Separator between the ids of a line; None: white space of any length.
    """
    cells = pl.col("line")
    ids = cells.str.extract_all(r"\S+") if separator is None else cells.str.split(separator)
    return scan_lines(path).select(
        user=ids.list.first(), items=ids.list.slice(1), blank=cells.str.strip_chars() == ""
    )


def _split_lines(
    path: Path, columns: Sequence[str], names: Sequence[str], separator: str
) -> pl.LazyFrame:
    """Split lines at a separator of several characters, which CSV readers do not support."""
    require_columns(path, names, columns, separator)
    cells = pl.col("line").str.split(separator)
    return scan_lines(path, encoding="latin-1").select(
        cells.list.get(names.index(name), null_on_oob=True).alias(name) for name in columns
    )


def check_format(format: str | None) -> None:  # noqa: A002
    """Check that a format exists.

    Raises:
        UserError: It does not.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"dataset.format={format}: expected one of {', '.join(FORMATS)}")
