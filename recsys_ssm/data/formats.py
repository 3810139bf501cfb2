"""The files interactions come in, read lazily as one table: user, item and, where there are, rating and time.

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
"""What the columns of ``ratings.dat`` are called here unless ``names`` says otherwise."""


def format_of(path: str | Path) -> Format:
    """What a file's name says it is; CSV where that is nothing special."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _BY_SUFFIX.get(suffixes[-1], "csv") if suffixes else "csv"


def scan(
    path: str | Path,
    columns: Sequence[str],
    *,
    format: Format | None = None,  # noqa: A002 (what everyone calls it)
    names: Sequence[str] = (),
    separator: str | None = None,
) -> pl.LazyFrame:
    """The named columns of a table, lazily; text as it stands there.

    Args:
        path: The file.
        columns: Which columns, in this order.
        format: One of :data:`FORMATS`; None: as the file's name says.
        names: What the columns of a file without a header line are called. A first line that holds
            the first of ``columns`` is a header all the same.
        separator: Between the cells of a line; None: the format's own, a comma in a CSV.

    Raises:
        UserError: The file is missing, empty or not of that format, or a column is not there.
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
    separator = separator or ("\t" if path.suffix.lower() in {".tsv", ".data"} else ",")
    first = scan_table(path, separator=separator).collect_schema().names()
    if not names or columns[0] in first:
        try:
            return scan_table(path, columns=columns, separator=separator)
        except UserError as error:
            if names or set(columns) & set(first):
                raise
            raise UserError(
                f"{error}; if the file has no header line, name its columns with dataset.names"
            ) from error
    if len(names) != len(first):
        raise UserError(
            f"{path}: dataset.names names {len(names)} columns, but the file has {len(first)}"
        )
    require_columns(path, names, columns, separator)
    return scan_table(path, separator=separator, names=names).select(columns)


def scan_sequences(path: str | Path, *, separator: str | None = None) -> pl.LazyFrame:
    """A sequence text as one row a line: ``user`` (text) and ``items`` (list of text).

    Args:
        path: The file.
        separator: Between the ids of a line; None: white space, however much.
    """
    cells = pl.col("line")
    ids = cells.str.extract_all(r"\S+") if separator is None else cells.str.split(separator)
    return scan_lines(path).select(
        user=ids.list.first(), items=ids.list.slice(1), blank=cells.str.strip_chars() == ""
    )


def _split_lines(
    path: Path, columns: Sequence[str], names: Sequence[str], separator: str
) -> pl.LazyFrame:
    """Lines cut at a separator of several characters, which no CSV reader knows."""
    require_columns(path, names, columns, separator)
    cells = pl.col("line").str.split(separator)
    return scan_lines(path, encoding="latin-1").select(
        cells.list.get(names.index(name), null_on_oob=True).alias(name) for name in columns
    )


def check_format(format: str | None) -> None:  # noqa: A002
    """Raises:
    UserError: No such format.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"dataset.format={format}: expected one of {', '.join(FORMATS)}")
