"""Reading users' tables: CSV or Parquet, every mistake named by file, column and row.

A row is counted from 1 below the header line, in both kinds of file.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from recsys_ssm.errors import UserError

_UNREADABLE = (pl.exceptions.PolarsError, OSError, UnicodeDecodeError)
_NOT_UTF8 = "it is not UTF-8 text; save it as CSV in UTF-8"
_SEPARATORS = {",": "','", ";": "';'", "\t": "'\\t'", "|": "'|'"}


def scan_table(
    path: str | Path,
    *,
    columns: Sequence[str] = (),
    separator: str = ",",
    names: Sequence[str] | None = None,
    quote: str | None = '"',
) -> pl.LazyFrame:
    """A lazy frame of a CSV (every cell as text, an empty one null) or Parquet file.

    Args:
        path: ``*.parquet`` / ``*.pq`` is Parquet, anything else CSV.
        columns: Columns that must be there; all others are left out when any is named.
        separator: Between the cells of a CSV, one character; a tab also as a backslash and a t, which is what
            single quotes make of it in YAML and in a shell.
        names: What the columns of a CSV without a header line are called; None: it has one.
        quote: Around a cell of a CSV that holds a separator; None: nothing is.

    Raises:
        UserError: The file is missing, unreadable, empty, not such a table, or lacks a column.
    """
    path = Path(path).expanduser()
    separator = "\t" if separator == "\\t" else separator
    if len(separator.encode()) != 1:
        raise UserError(f"separator={separator!r}: give one character, for example {_hint()}")
    _check_file(path, "a header line and rows below it" if names is None else "rows")
    try:
        if _is_parquet(path):
            frame = pl.scan_parquet(path)
        else:
            # Text first: ids keep their leading zeros, and what is no number is named with its row.
            frame = pl.scan_csv(
                path,
                separator=separator,
                infer_schema=False,
                quote_char=quote,
                has_header=names is None,
                new_columns=names,
            )
        present = frame.collect_schema().names()
    except _UNREADABLE as error:
        raise UserError(_unreadable(path, separator, error)) from error
    # Polars decodes a header leniently.
    if any("\N{REPLACEMENT CHARACTER}" in name or "\0" in name for name in present):
        raise UserError(f"{path}: not a readable CSV file ({_NOT_UTF8})")
    require_columns(path, present, columns, separator)
    return frame.select(columns) if columns else frame


def scan_lines(path: str | Path, *, encoding: str = "utf-8") -> pl.LazyFrame:
    """A lazy frame of a text file's lines, one column ``line``.

    Args:
        path: The file.
        encoding: Of a file that is not UTF-8 (most are all the same, and then it does not matter).

    Raises:
        UserError: The file is missing or empty.
    """
    path = Path(path).expanduser()
    _check_file(path, "lines")
    if encoding != "utf-8" and not _is_utf8(path):
        return pl.LazyFrame({"line": path.read_text(encoding).splitlines()})
    # What a CSV reader does with the mark some programs put before UTF-8 text.
    return pl.scan_lines(path, name="line").with_columns(pl.col("line").str.strip_prefix("\ufeff"))


def _is_utf8(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            while file.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return False
    return True


def require_columns(
    path: Path, present: Sequence[str], columns: Sequence[str], separator: str
) -> None:
    """Raises:
    UserError: One of ``columns`` is not among those ``present``, or is there twice.
    """
    if absent := [name for name in columns if name not in present]:
        shown = ", ".join(present[:30]) + (", …" if len(present) > 30 else "")
        raise UserError(
            f"{path}: no column {absent[0]!r}; its columns are {shown}{_other(present, separator)}"
        )
    if twice := [name for name in columns if f"{name}_duplicated_0" in present]:
        raise UserError(f"{path}: two columns are called {twice[0]!r}; rename or remove one")


def _check_file(path: Path, needs: str) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file (looked in {path.parent.resolve()})")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; it needs {needs}")
    except OSError as error:
        raise UserError(f"{path}: not readable ({_first_line(error)})") from error


def read_table(
    path: str | Path, *, columns: Sequence[str] = (), separator: str = ","
) -> pl.DataFrame:
    """:func:`scan_table`, collected; at least one row.

    Raises:
        UserError: As :func:`scan_table`; or a line is broken; or there is no row.
    """
    frame = scan_table(path, columns=columns, separator=separator)
    return collect(frame, path, separator=separator)


def collect(
    frame: pl.LazyFrame, path: str | Path, *, separator: str = ",", streaming: bool = False
) -> pl.DataFrame:
    """Collect a lazy frame that reads ``path``, with its errors named after that file.

    Args:
        frame: Of :func:`scan_table`, and what was done to it.
        path: What messages name.
        separator: As given to :func:`scan_table`.
        streaming: In pieces, the file never in memory as a whole.

    Raises:
        UserError: A line is broken, or no row is left.
    """
    path = Path(path).expanduser()
    try:
        table = frame.collect(engine="streaming" if streaming else "auto")
    except _UNREADABLE as error:
        raise UserError(_unreadable(path, separator, error)) from error
    if table.height == 0:
        raise UserError(f"{path}: no row below the header line")
    return table


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in {".parquet", ".pq"}


def _hint(of: str | None = None) -> str:
    """A separator as one writes it in a config."""
    return _SEPARATORS.get(of, repr(of)) if of else " ".join(_SEPARATORS.values())


def _other(present: Sequence[str], separator: str) -> str:
    """A hint if the header, read as one cell, holds another separator."""
    if len(present) != 1:
        return ""
    likely = max(_SEPARATORS, key=present[0].count)
    if likely == separator or likely not in present[0]:
        return ""
    return (
        f"; the separator seems to be {_hint(likely)}, not {_hint(separator)}: "
        f'dataset.separator="{_hint(likely)}" on the command line'
    )


def _unreadable(path: Path, separator: str, error: BaseException) -> str:
    if _is_parquet(path):
        return f"{path}: not a readable Parquet file ({_first_line(error)})"
    reason = _first_line(error)
    if "utf-8" in reason.lower() or "utf8" in reason.lower():
        reason = _NOT_UTF8
    elif isinstance(error, pl.exceptions.ComputeError):
        reason = _broken_line(path, separator) or reason
    return f"{path}: not a readable CSV file ({reason})"


def _broken_line(path: Path, separator: str) -> str | None:
    """Where a CSV breaks; polars does not say. The file is read once more, line by line."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        start = 0
        try:
            width = len(next(rows, []))
            start = rows.line_num
            for row in rows:
                if len(row) > width:
                    return f"line {start + 1} has {len(row)} cells, the header line {width}"
                start = rows.line_num
        except csv.Error:
            return f'a quotation mark " opened in line {start + 1} is not closed as it should be'
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
