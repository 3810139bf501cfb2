"""Read users' files, CSV or Parquet; messages name the file, the column and the row.

Rows are counted from 1 below the header line, in both kinds of file.
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
    """Scan a CSV file (every cell as text, an empty one null) or a Parquet file.

    Args:
        path: ``*.parquet`` and ``*.pq`` are read as Parquet, any other name as CSV.
        columns: Columns to read; empty: all.
        separator: Separator between the cells of a CSV, one character. A tab may be written as a backslash and a t,
            as single quotes leave it in YAML and in a shell.
        names: Names of the columns of a CSV without a header line; None: it has one.
        quote: Quotation mark of a CSV; None: cells are not quoted.

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
            # As text: ids keep their leading zeros, and a message can name the row of a wrong number.
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
    """Scan the lines of a text file as one column ``line``.

    Args:
        path: The file.
        encoding: Encoding to use for a file that is not valid UTF-8.

    Raises:
        UserError: The file is missing or empty.
    """
    path = Path(path).expanduser()
    _check_file(path, "lines")
    if encoding != "utf-8" and not _is_utf8(path):
        return pl.LazyFrame({"line": path.read_text(encoding).splitlines()})
    # Remove the byte order mark, as a CSV reader does.
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
    """Check that each of ``columns`` is present once.

    Raises:
        UserError: One is absent, or is there twice.
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
    """Read a file with :func:`scan_table`.

    Raises:
        UserError: As :func:`scan_table`; or a line is broken, or there is no row.
    """
    frame = scan_table(path, columns=columns, separator=separator)
    return collect(frame, path, separator=separator)


def collect(
    frame: pl.LazyFrame, path: str | Path, *, separator: str = ",", streaming: bool = False
) -> pl.DataFrame:
    """Collect a lazy frame that reads ``path``; messages name that file.

    Args:
        frame: Result of :func:`scan_table` or of operations on it.
        path: The file, for messages.
        separator: Separator that was passed to :func:`scan_table`.
        streaming: Read the file in pieces, so that it is never in memory as a whole.

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


def _hint(separator: str | None = None) -> str:
    """Return a separator as it is written in a config; None: all usual ones."""
    if separator is None:
        return " ".join(_SEPARATORS.values())
    return _SEPARATORS.get(separator, repr(separator))


def _other(present: Sequence[str], separator: str) -> str:
    """Return a hint if the header line, read as one cell, contains another separator."""
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
    """Find the line at which a CSV is broken, by reading it again; polars does not report it."""
    separator = "\t" if separator == "\\t" else separator
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
