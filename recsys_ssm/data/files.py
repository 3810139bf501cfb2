"""Reading users' tables: CSV or Parquet, every mistake named by file, column and row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from recsys_ssm.errors import UserError


def scan_table(path: str | Path, *, columns: Sequence[str] = (), separator: str = ",") -> pl.LazyFrame:
    """A lazy frame of a CSV (every cell as text, an empty one null) or Parquet file.

    Args:
        path: ``*.parquet`` / ``*.pq`` is Parquet, anything else CSV with a header line.
        columns: Columns that must be there; all others are left out when any is named.
        separator: Between the cells of a CSV.

    Raises:
        UserError: The file is missing, unreadable, empty, not such a table, or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (looked in {path.parent.resolve()})")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; a header line and at least one row are needed")
    try:
        if path.suffix in {".parquet", ".pq"}:
            frame = pl.scan_parquet(path)
        else:
            # Text first: ids keep their leading zeros, and what is not a number can be named with its row later.
            frame = pl.scan_csv(path, separator=separator, infer_schema=False, try_parse_dates=False)
        present = frame.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable {_kind(path)} file ({_first_line(error)})") from error
    if absent := [name for name in columns if name not in present]:
        raise UserError(
            f"{path}: no column {absent[0]!r}; its columns are {', '.join(present[:30])}"
            + (f" (is {separator!r} the separator?)" if len(present) == 1 else "")
        )
    return frame.select(columns) if columns else frame


def read_table(path: str | Path, *, columns: Sequence[str] = (), separator: str = ",") -> pl.DataFrame:
    """:func:`scan_table`, collected; at least one row.

    Raises:
        UserError: As :func:`scan_table`; or a line is broken; or there is no row.
    """
    return collect(scan_table(path, columns=columns, separator=separator), path)


def collect(frame: pl.LazyFrame, path: str | Path) -> pl.DataFrame:
    """Collect a lazy frame that reads ``path``, with its errors named after that file."""
    try:
        table = frame.collect()
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable {_kind(Path(path))} file ({_first_line(error)})") from error
    if table.height == 0:
        raise UserError(f"{path}: no row below the header line")
    return table


def _kind(path: Path) -> str:
    return "Parquet" if path.suffix in {".parquet", ".pq"} else "CSV"


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
