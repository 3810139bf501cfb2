"""Read users' files, CSV, Parquet or JSON; messages name the file, the column and the row.

Rows are counted from 1 below the header line, in every kind of file. Names are never patterns: ``a[1].csv`` is a file
of that name. The rows of a text file are counted before it is read, and a reader that returns another number is an
error. Quotation marks that are not balanced never join rows: see :func:`_examine`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import re
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from recsys_ssm.errors import UserError

log = logging.getLogger(__name__)

_UNREADABLE = (pl.exceptions.PolarsError, OSError, EOFError, zlib.error, UnicodeDecodeError)
_NOT_UTF8 = "it is not UTF-8 text; save it as CSV in UTF-8"
_SEPARATORS = {",": "','", ";": "';'", "\t": "'\\t'", "|": "'|'"}
_BLOCK = 1 << 22
_BOM = b"\xef\xbb\xbf"


def scan_table(
    path: str | Path,
    *,
    columns: Sequence[str] = (),
    separator: str = ",",
    names: Sequence[str] | None = None,
    quote: bool = True,
    notes: list[str] | None = None,
    option: str = "dataset.separator",
) -> pl.LazyFrame:
    """Scan a CSV file (every cell as text, an empty one null) or a Parquet file.

    Args:
        path: ``*.parquet``, ``*.pq`` and a folder of such parts are read as Parquet, any other name as CSV.
        columns: Columns to read; empty: all.
        separator: Separator between the cells of a CSV, one character. A tab may be written as a backslash and a t,
            as single quotes leave it in YAML and in a shell.
        names: Names of the columns of a CSV without a header line; None: it has one.
        quote: Cells of a CSV may be within quotation marks.
        notes: List for remarks on how the file was read; None: they are logged.
        option: Option that sets the separator, for messages.

    Raises:
        UserError: The file is missing, unreadable, empty, not such a table, or lacks a column.
    """
    return _open(path, columns, separator, names, quote, notes, option)[0]


def read_table(
    path: str | Path,
    *,
    columns: Sequence[str] = (),
    separator: str = ",",
    names: Sequence[str] | None = None,
    quote: bool = True,
    notes: list[str] | None = None,
    option: str = "dataset.separator",
    encoding: str | None = None,
    compact: Compact | None = None,
) -> pl.DataFrame:
    """Read a file as :func:`scan_table` does, and check that every row was read.

    Args:
        path, columns, separator, names, quote, notes, option: See :func:`scan_table`.
        encoding: Encoding of a CSV that is not UTF-8; None: such a file is an error.
        compact: Columns to hold in little memory; None: cells are held as they are read.

    Raises:
        UserError: As :func:`scan_table`; or a line is broken, or there is no row.
    """
    frame, n_rows = _open(path, columns, separator, names, quote, notes, option, encoding)
    if compact is None:
        table = collect(frame, path, separator=separator)
    else:
        table = compact.collect(frame, path, separator=separator)
    check_rows(path, table.height, n_rows)
    return table


@dataclass(frozen=True)
class Compact:
    """Columns of text to hold in little memory: the file is read in pieces, and each different text is held once.

    Args:
        ids: Columns to read as categories.
        values: Columns to read as integers if every cell is one, or else as categories if texts repeat.
    """

    ids: Sequence[str] = ()
    values: Sequence[str] = ()

    def collect(
        self, frame: pl.LazyFrame, path: str | Path, *, separator: str = ","
    ) -> pl.DataFrame:
        """Collect a lazy frame as :func:`collect` does."""
        kinds = frame.collect_schema()
        head = collect(frame.head(_HEAD), path, separator=separator)
        texts = {name for name, kind in kinds.items() if kind == pl.String}
        coded = texts & set(self.ids)
        whole = set()
        for name in (texts - coded) & set(self.values):
            if head[name].str.contains(_WHOLE).all() and not re.fullmatch(_WHOLE, name):
                whole.add(name)
            elif head[name].n_unique() * _REPEATED < head.height:
                coded.add(name)
        whole_numbers = [
            pl.col(name).str.strip_chars().cast(pl.Int64, strict=False) for name in sorted(whole)
        ]
        # Categories of its own for each column: they go when the column goes.
        codes = [
            pl.col(name).cast(pl.Categorical(pl.Categories.random())) for name in sorted(coded)
        ]
        table = collect(
            frame.with_columns(*whole_numbers, *codes), path, separator=separator, streaming=True
        )
        if any(table[name].null_count() for name in whole):  # further down are other texts
            rest = [name for name in self.values if name not in whole]
            return Compact(self.ids, rest).collect(frame, path, separator=separator)
        return table


_HEAD = 10_000
"""Rows to choose the form of a column by."""

_REPEATED = 10
"""Rows for each different text from which a column is read as categories."""

_WHOLE = r"^-?\d{1,18}$"


def _open(
    path: str | Path,
    columns: Sequence[str],
    separator: str,
    names: Sequence[str] | None,
    quote: bool,
    notes: list[str] | None,
    option: str,
    encoding: str | None = None,
) -> tuple[pl.LazyFrame, int | None]:
    """Return a lazy frame and the number of its rows; None: the format itself is checked."""
    path = Path(path).expanduser()
    separator = one_character(separator, option)
    if path.is_dir() and parts_of(path):
        return _open_parquet(path, columns), None
    check_file(path, "a header line and rows below it" if names is None else "rows")
    if is_parquet(path):
        return _open_parquet(path, columns), None
    try:
        present = header_of(path, separator) if names is None else list(names)
        text = _examine(path, separator, len(present), header=names is None, quote=quote)
        if encoding is not None and not _is_utf8(path):
            content = b"".join(_blocks(path)) if text.rewritten is None else text.rewritten
            text.rewritten = content.decode(encoding).encode()
            text.notes.append(f"it is not UTF-8 text: read as {encoding}")
        # As text: ids keep their leading zeros, and a message can name the row of a wrong number.
        frame = pl.scan_csv(
            path if text.rewritten is None else io.BytesIO(text.rewritten),
            separator=separator,
            infer_schema=False,
            quote_char='"' if text.quoted else None,
            has_header=names is None,
            new_columns=None if names is None else list(names),
            glob=False,
        )
        read = frame.collect_schema().names()
    except _UNREADABLE as error:
        raise UserError(_unreadable(path, separator, error)) from error
    # Polars decodes a header leniently.
    if any("\N{REPLACEMENT CHARACTER}" in name or "\0" in name for name in read):
        raise UserError(f"{path}: not a readable CSV file ({_NOT_UTF8})")
    if not text.quoted:
        bare = [_unquote(name) for name in read]
        if bare != read and len(set(bare)) == len(bare):
            frame, read = frame.rename(dict(zip(read, bare, strict=True))), bare
    bare = [name.strip() for name in read]
    padded = bare != read and len(set(bare)) == len(bare) and not set(columns) <= set(read)
    if padded:  # "user_id, item_id": blanks behind each separator
        frame, read = frame.rename(dict(zip(read, bare, strict=True))), bare
        text.notes.append("blanks around the names and the cells are left out")
    require_columns(path, read, columns, separator, option)
    frame = frame.select(columns) if columns else frame
    if padded:
        stripped = pl.all().str.strip_chars()
        frame = frame.with_columns(pl.when(stripped != "").then(stripped).name.keep())
    if text.unquote:
        frame = frame.with_columns(_unquoted(pl.all()))
    for number, line in sorted(text.opened.items(), key=lambda pair: pair[1]):
        if number >= len(read) or not columns or read[number] in columns:
            raise UserError(f"{path}: not a readable CSV file ({_not_closed(line)})")
    remark(notes, [f"{path}: {note}" for note in text.notes])
    return frame, text.n_rows


def _open_parquet(path: Path, columns: Sequence[str]) -> pl.LazyFrame:
    source = parts_of(path) if path.is_dir() else path
    try:
        frame = pl.scan_parquet(source, glob=False)
        present = frame.collect_schema().names()
    except _UNREADABLE as error:
        raise UserError(_unreadable(path, ",", error)) from error
    require_columns(path, present, columns, ",")
    return frame.select(columns) if columns else frame


def parts_of(folder: Path) -> list[Path]:
    """Return the Parquet files in a folder, and in its subfolders ``name=value``, in the order of their names."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += parts_of(path) if "=" in path.name else []
        elif is_parquet(path) and path.name[0] not in "._":
            found.append(path)
    return found


def read_json(path: str | Path, columns: Sequence[str]) -> pl.DataFrame:
    """Read the named members of JSON objects, a line each or in one list; a member that is absent is null.

    Raises:
        UserError: The file is missing or empty, a line is not an object, or no object has one of the columns.
    """
    path = Path(path).expanduser()
    check_file(path, "lines with a JSON object each")
    cells: dict[str, list[Any]] = {name: [] for name in columns}
    present: dict[str, None] = {}
    try:
        for number, one in _objects(path):
            if not isinstance(one, dict):
                raise UserError(
                    f"{path}, {number}: not a JSON object; write lines like "
                    '{"user_id": "u1", "item_id": "i1"}'
                )
            if len(present) < 1000:
                present.update(dict.fromkeys(one))
            for name, column in cells.items():
                column.append(one.get(name))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not a readable JSON file (it is not UTF-8 text; save it in UTF-8)"
        ) from error
    except (json.JSONDecodeError, RecursionError, *_UNREADABLE) as error:
        raise UserError(f"{path}: not a readable JSON file ({_first_line(error)})") from error
    if not present:
        raise UserError(f"{path}: no object with members; write a JSON object in each line")
    require_columns(path, list(present), columns, "")
    return pl.DataFrame([_series(name, values) for name, values in cells.items()])


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Return the objects of a JSON file with their places in it."""
    lines = _lines(path)
    first = next((line for line in lines if line.strip(b" \t\r\n" + _BOM)), b"")
    if first.removeprefix(_BOM).lstrip().startswith(b"["):
        whole = b"".join(_lines(path)).removeprefix(_BOM)
        for number, one in enumerate(json.loads(whole.decode()), 1):
            yield f"object {number}", one
        return
    for number, line in enumerate(_lines(path), 1):
        line = line.removeprefix(_BOM) if number == 1 else line
        if not line.strip():
            continue
        try:
            one = json.loads(line.decode())
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg}); write a JSON object in each line"
            ) from error
        yield f"line {number}", one


def _series(name: str, values: list[Any]) -> pl.Series:
    """Return a column of JSON values: numbers if all are, lists if all are, else text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int}:
        if all(value is None or abs(value) < 2**63 for value in values):
            return pl.Series(name, values, pl.Int64)
        return pl.Series(name, [_text(value) for value in values], pl.String)
    if kinds <= {int, float}:
        return pl.Series(name, [None if v is None else float(v) for v in values], pl.Float64)
    if kinds <= {list}:
        lists = [None if v is None else [_text(one) for one in v] for v in values]
        return pl.Series(name, lists, pl.List(pl.String))
    return pl.Series(name, [_text(value) for value in values], pl.String)


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def read_lines(path: str | Path, *, encoding: str = "utf-8") -> pl.Series:
    """Read the lines of a text file.

    Args:
        path: The file.
        encoding: Encoding to use for a file that is not valid UTF-8.

    Raises:
        UserError: The file is missing or empty, or is not valid text.
    """
    path = Path(path).expanduser()
    check_file(path, "lines")
    try:
        n_lines, last = 0, b"\n"
        for block in _blocks(path):
            n_lines, last = n_lines + block.count(b"\n"), block[-1:]
        try:
            lines = pl.scan_lines(path, name="line", glob=False).collect()["line"]
        except pl.exceptions.PolarsError:
            if encoding == "utf-8":
                raise
            # str.splitlines() would also split at characters that may be within a title.
            texts = b"".join(_blocks(path)).decode(encoding).split("\n")
            lines = pl.Series("line", texts if texts[-1] else texts[:-1], pl.String)
    except _UNREADABLE as error:
        reason = _first_line(error)
        if "utf-8" in reason.lower() or "utf8" in reason.lower():
            reason = "it is not UTF-8 text; save it in UTF-8"
        raise UserError(f"{path}: not a readable text file ({reason})") from error
    check_rows(path, lines.len(), n_lines + (last != b"\n"))
    # Remove the byte order mark, as a CSV reader does.
    return lines.str.strip_prefix("\ufeff").str.strip_suffix("\r")


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in _blocks(path):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def one_character(separator: str, option: str = "separator") -> str:
    """Return a separator, which must be one character; a backslash and a t are a tab.

    Raises:
        UserError: It is longer.
    """
    separator = "\t" if separator == "\\t" else separator
    if len(separator.encode()) != 1 or separator in '"\n\r':
        name = option.rpartition(".")[2]
        raise UserError(f"{name}={shown(separator)}: give one character, for example {_hint()}")
    return separator


class AbsentColumnError(UserError):
    """Say that a table lacks a column.

    Args:
        where: Name of the table.
        column: The column.
        present: The columns that the table has.
        hint: Further advice.
    """

    def __init__(self, where: str, column: str, present: Sequence[str], hint: str = "") -> None:
        self.column, self.hint = column, hint
        self.similar = _similar(column, present)
        self.what = f"{where}: no column {shown(column)}; its columns are {listed(present)}{hint}"
        advice = f"; give {shown(self.similar)} as the column's name" if self.similar else ""
        super().__init__(self.what + advice)

    def with_option(self, option: str | None) -> UserError:
        """Return the error with the option that names the column, if there is one and no other advice."""
        if option is None or (self.hint and not self.similar):
            return self
        name = (
            self.similar if self.similar.isidentifier() or not self.similar else shown(self.similar)
        )
        return UserError(f"{self.what}; give the column's name: {option}={name or '…'}")


def require_columns(
    path: Path,
    present: Sequence[str],
    columns: Sequence[str],
    separator: str,
    option: str = "dataset.separator",
) -> None:
    """Check that each of ``columns`` is present once.

    Raises:
        UserError: One is absent, or is there twice.
    """
    if absent := [name for name in columns if name not in present]:
        other = _other(present, separator, option)
        raise AbsentColumnError(str(path), absent[0], present, other)
    twice = [name for name in columns if f"{name}_duplicated_0" in present]
    if twice := twice or [name for name in columns if list(present).count(name) > 1]:
        raise UserError(f"{path}: two columns are called {shown(twice[0])}; rename or remove one")


def check_file(path: Path, needs: str) -> None:
    """Check that a file exists and is not empty.

    Raises:
        UserError: It does not exist, is a folder, an archive or empty.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file (looked in {path.parent.resolve()})")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; it needs {needs}")
        if path.suffix.lower() == ".zip" and zipfile.is_zipfile(path):
            raise UserError(f"{path}: is an archive; unpack it and name a file of it")
        with path.open("rb") as file:
            head = file.read(64)
        for start, what in _FOREIGN.items():
            if head.lstrip().lower().startswith(start):
                raise UserError(f"{path}: {what}")
    except OSError as error:
        raise UserError(f"{path}: not readable ({_first_line(error)})") from error


_FOREIGN = {
    b"pk\x03\x04": "is a spreadsheet (.xlsx) or a zip archive; save it as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet (.xls); save it as CSV",
    b"bzh": "is compressed with bzip2; decompress it, or compress it with gzip or zstd",
    b"\xfd7zxz\x00": "is compressed with xz; decompress it, or compress it with gzip or zstd",
    b"7z\xbc\xaf\x27\x1c": "is an archive (7z); unpack it and name a file of it",
    b"sqlite format 3": "is an SQLite database; export the table as CSV",
    b"<!doctype": "is a web page, not a table; download the file itself",
    b"<html": "is a web page, not a table; download the file itself",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file; fetch the file with: git lfs pull",
    b"\xff\xfe": "is UTF-16 text; save it in UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it in UTF-8",
}
"""First bytes of files that are not tables, in lower case: what such a file is, and what to do with it."""


def check_rows(path: str | Path, n_read: int, n_rows: int | None) -> None:
    """Check that as many rows were read as the file has.

    Raises:
        UserError: There are more or fewer.
    """
    if n_rows is not None and n_read != n_rows:
        raise UserError(
            f"{path}: {n_rows:,} rows are in the file, but {n_read:,} were read; look for stray quotation marks "
            "or control characters, or save the file as Parquet"
        )


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


def is_parquet(path: Path) -> bool:
    """Return True for a file called ``*.parquet`` or ``*.pq``, or one that begins as such a file does."""
    if path.suffix.lower() in {".parquet", ".pq"}:
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def shown(value: object, limit: int = 60) -> str:
    """Return a value as it is written in a message, shortened."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def listed(names: Sequence[str], limit: int = 150) -> str:
    """Return names for a message: as many as there is room for."""
    text = ""
    for number, name in enumerate(names):
        part = (", " if number else "") + (name if len(name) <= 60 else f"{name[:59]}…")
        if number == 30 or len(text) + len(part) > limit:
            return f"{text}, …"
        text += part
    return " ".join(text.split())


def header_of(path: Path, separator: str) -> list[str]:
    """Return the cells of a text file's first line, as polars names columns.

    Raises:
        UserError: The line is blank or unreadable.
    """
    try:
        first = next(iter(_lines(path, start=True)), b"").rstrip(b"\r\n")
        if not first:
            raise UserError(f"{path}: not a readable CSV file (it has no header line)")
        if b"\r" in first and b"\n" not in first and b'"' not in first:
            raise UserError(
                f"{path}: its lines end in carriage returns alone; save it with line feeds (\\n)"
            )
        quote = '"' if _record(separator).fullmatch(first) else None
        frame = pl.read_csv(
            first + b"\n", separator=separator, infer_schema=False, quote_char=quote
        )
    except _UNREADABLE as error:
        raise UserError(f"{path}: not a readable CSV file ({_first_line(error)})") from error
    return [name.strip() for name in frame.columns]


def first_line(path: Path) -> str:
    """Return the first line of a text file that is not blank, at most 10,000 characters."""
    try:
        line = next(iter(_lines(path, start=True)), b"")
    except _UNREADABLE:
        return ""
    return line[:10_000].decode("utf-8", "replace").rstrip("\r\n")


@dataclass
class _Text:
    """Form of a text table, found before it is read."""

    n_rows: int
    quoted: bool = False
    """Cells may be within quotation marks; False: a quotation mark is a character like others."""
    unquote: bool = False
    """Remove the quotation marks around a cell after reading."""
    rewritten: bytes | None = None
    """The table with every quotation mark written as a reader expects it; None: as in the file."""
    opened: dict[int, int] = field(default_factory=dict)
    """Columns (by number) where a quotation mark opens and does not close, and the first line of each."""
    notes: list[str] = field(default_factory=list)


def _examine(path: Path, separator: str, width: int, *, header: bool, quote: bool) -> _Text:
    """Count the rows of a text table, and find out how its quotation marks are meant.

    A CSV reader that meets a stray quotation mark takes all up to the next one as one cell, and the rows between
    vanish. So each line is matched first:

    1. All lines are well-formed by themselves: the file is read with quotation.
    2. Otherwise, if all lines have the same number of cells without regard to quotation marks, no cell spans lines or
       contains a separator: the file is read without quotation, and the marks around cells are removed afterwards.
    3. Otherwise the quotation marks are needed. A cell that spans lines is accepted, unless those lines look like
       rows themselves; then the message names the lines. Marks within an unquoted cell are characters.

    Raises:
        UserError: A quotation mark opens and does not close, or its cell spans what look like rows.
    """
    n_lines = n_quotes = 0
    last = b"\n"
    start = True
    for block in _blocks(path):
        if start:  # blank lines above the header line are skipped by the reader
            block = block.removeprefix(_BOM).lstrip(b"\r\n") if header else block
            start = not block
            if start:
                continue
        n_lines += block.count(b"\n")
        n_quotes += block.count(b'"')
        last = block[-1:]
    n_lines += last != b"\n"
    n_rows = n_lines - header
    if not n_quotes or not quote:
        return _Text(n_rows)
    if _well_formed(path, separator, width):
        return _Text(n_rows, quoted=True)
    record, mark = _record(separator), separator.encode()
    quoted_cell = re.compile(rb'"[^"]*+"')
    odd: list[tuple[int, bytes]] = []
    n_odd, even = 0, width > 1
    for number, line in enumerate(_lines(path), 1):
        bare = line.rstrip(b"\r\n")
        if b'"' in bare and (
            not record.fullmatch(bare) or _swallows(bare, quoted_cell, mark, width)
        ):
            n_odd += 1
            if len(odd) < 100_000:
                odd.append((number, bare))
        even = even and (not bare or bare.count(mark) == width - 1)
    if not n_odd:
        return _Text(n_rows, quoted=True)
    if even:
        text = _Text(n_rows, unquote=True)
        for number, bare in odd:
            for place, cell in enumerate(bare.split(mark)):
                if cell.startswith(b'"') and not (cell.endswith(b'"') and len(cell) > 1):
                    text.opened.setdefault(place, number)
        text.notes.append(_stray(odd[0][0], n_odd))
        return text
    return _parse(path, separator, width, header)


def _parse(path: Path, separator: str, width: int, header: bool) -> _Text:
    """Read the records of a table where cells span lines, or stray quotation marks are beside needed ones."""
    record, mark = _record(separator), separator.encode()
    lines = list(_lines(path, start=header))
    skipped = sum(1 for _ in _lines(path)) - len(lines)
    made = io.StringIO()
    writer = csv.writer(made, delimiter=separator, lineterminator="\n")
    n_records = start = n_long = n_stray = first_long = first_stray = 0
    with _any_cell_size():
        texts = (line.decode("utf-8", "surrogateescape") for line in lines)
        rows = csv.reader(texts, delimiter=separator, strict=True)
        try:
            for row in rows:
                stop, number = rows.line_num, start + 1 + skipped
                n_records += 1
                span = lines[start:stop]
                if stop - start > 1:
                    like_rows = sum(line.count(mark) == width - 1 for line in span)
                    if width > 1 and like_rows >= 0.8 * len(span):
                        raise UserError(
                            f'{path}: a quotation mark " opened in line {number} closes in line {stop + skipped}, and '
                            "the lines between look like rows; remove the stray one, or write two in its place"
                        )
                    n_long += 1
                    first_long = first_long or number
                elif b'"' in span[0] and not record.fullmatch(span[0].rstrip(b"\r\n")):
                    n_stray += 1
                    first_stray = first_stray or number
                if len(row) < width and stop - start == 1 and span[0].count(mark) == width - 1:
                    raise UserError(f"{path}: not a readable CSV file ({_not_closed(number)})")
                if len(row) > width:
                    raise UserError(
                        f"{path}: not a readable CSV file (line {number} has {len(row)} cells, the header line {width})"
                    )
                writer.writerow(row)
                start = stop
        except csv.Error as error:
            raise UserError(
                f"{path}: not a readable CSV file ({_not_closed(start + 1 + skipped)})"
            ) from error
    text = _Text(n_records - header, quoted=True)
    if n_long:
        text.notes.append(
            f"{n_long:,} rows have a cell of several lines within quotation marks, the first in line {first_long}"
        )
    if n_stray:
        text.rewritten = made.getvalue().encode("utf-8", "surrogateescape")
        text.notes.append(_stray(first_stray, n_stray))
    return text


def _well_formed(path: Path, separator: str, width: int) -> bool:
    """Return True if every line is well-formed by itself, as :func:`_examine` has it; fast, for UTF-8 alone."""
    mark = re.escape(separator)
    cell = rf'(?:"[^"]*(?:""[^"]*)*"|[^"{mark}]*)'
    line = pl.col("line")
    odd = ~line.str.contains(rf"^\x{{feff}}?{cell}(?:{mark}{cell})*$")
    even = line.str.count_matches(separator, literal=True) == width - 1
    outside = line.str.replace_all(r'"[^"]*"', "").str.count_matches(separator, literal=True)
    try:
        found = (
            pl.scan_lines(path, name="line", glob=False)
            .filter(line.str.contains('"', literal=True))
            .select(odd=(odd | (even & (outside != width - 1))).any())
            .collect(engine="streaming")
        )
    except pl.exceptions.PolarsError:
        return False
    return not found["odd"][0]


def _swallows(line: bytes, quoted_cell: re.Pattern[bytes], mark: bytes, width: int) -> bool:
    """Return True for a line that has the right number of cells only without regard to quotation marks."""
    if line.count(mark) != width - 1:
        return False
    return quoted_cell.sub(b"", line).count(mark) != width - 1


def _stray(line: int, n_lines: int) -> str:
    return (
        f"stray quotation marks in {n_lines:,} lines, the first in line {line}: read as characters of their cells, "
        "no row is joined or dropped"
    )


def _not_closed(line: int) -> str:
    return (
        f'a quotation mark " opened in line {line} is not closed as it should be; remove it, or put the cell in '
        "quotation marks and write two in its place"
    )


def _record(separator: str) -> re.Pattern[bytes]:
    """Return the pattern of a line whose quotation marks are as RFC 4180 has them."""
    mark = re.escape(separator.encode())
    cell = rb'(?:"[^"]*+(?:""[^"]*+)*+"|[^"' + mark + rb"]*+)"
    return re.compile(rb"(?:\xef\xbb\xbf)?" + cell + rb"(?:" + mark + cell + rb")*+")


def _unquote(cell: str) -> str:
    if len(cell) > 1 and cell.startswith('"') and cell.endswith('"'):
        return cell[1:-1].replace('""', '"')
    return cell


def _unquoted(cells: pl.Expr) -> pl.Expr:
    """Return cells without the quotation marks around them; null where nothing is left."""
    around = cells.str.contains(r'(?s)^".*"$') & (cells.str.len_bytes() > 1)
    bare = cells.str.head(-1).str.tail(-1).str.replace_all('""', '"', literal=True)
    return pl.when(around).then(pl.when(bare != "").then(bare)).otherwise(cells)


@contextmanager
def _any_cell_size() -> Iterator[None]:
    """Lift the csv module's limit on the size of a cell."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _blocks(path: Path) -> Iterator[bytes]:
    """Return the content of a file, decompressed, in blocks."""
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(file) as inner:
                while block := inner.read(_BLOCK):
                    yield block
        elif head == b"\x28\xb5\x2f\xfd":  # zstd, which polars decompresses
            lines = pl.scan_lines(path, name="line", glob=False).collect()["line"]
            for part in lines.to_frame().iter_slices(1 << 16):
                yield ("\n".join(part["line"].to_list()) + "\n").encode()
        else:
            while block := file.read(_BLOCK):
                yield block


def _lines(path: Path, *, start: bool = False) -> Iterator[bytes]:
    """Return the lines of a file with their ends.

    Args:
        path: The file.
        start: Leave out blank lines at the beginning, and a byte order mark.
    """
    rest: list[bytes] = []
    for block in _blocks(path):
        pieces = block.split(b"\n")
        for piece in pieces[:-1]:
            line = b"".join([*rest, piece, b"\n"]) if rest else piece + b"\n"
            rest = []
            if start:
                line = line.removeprefix(_BOM)
                if not line.strip(b"\r\n"):
                    continue
                start = False
            yield line
        if pieces[-1]:
            rest.append(pieces[-1])
    if rest:
        line = b"".join(rest)
        yield line.removeprefix(_BOM) if start else line


def remark(notes: list[str] | None, remarks: Iterable[str]) -> None:
    """Add remarks to a dataset's notes; log them where there are none."""
    for one in remarks:
        if notes is None:
            log.warning("%s", one)
        else:
            notes.append(one)


def _hint(separator: str | None = None) -> str:
    """Return a separator as it is written in a config; None: all usual ones."""
    if separator is None:
        return " ".join(_SEPARATORS.values())
    return _SEPARATORS.get(separator, repr(separator))


def _other(present: Sequence[str], separator: str, option: str) -> str:
    """Return a hint if the header line, read as one cell, contains another separator."""
    if len(present) != 1 or not separator:
        return ""
    likely = max(_SEPARATORS, key=present[0].count)
    if likely == separator or likely not in present[0]:
        return ""
    return (
        f"; the separator seems to be {_hint(likely)}, not {_hint(separator)}: "
        f'{option}="{_hint(likely)}" on the command line'
    )


def _similar(name: str, present: Sequence[str]) -> str:
    """Return the column that differs from ``name`` in capitals and punctuation alone; empty if there is none."""
    plain = {re.sub(r"\W|_", "", each).lower(): each for each in present}
    return plain.get(re.sub(r"\W|_", "", name).lower(), "")


def _unreadable(path: Path, separator: str, error: BaseException) -> str:
    if is_parquet(path):
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
    texts = (line.decode("utf-8", "replace") for line in _lines(path))
    with _any_cell_size():
        rows = csv.reader(texts, delimiter=separator, strict=True)
        start = 0
        try:
            width = len(next(rows, []))
            start = rows.line_num
            for row in rows:
                if len(row) > width:
                    return f"line {start + 1} has {len(row)} cells, the header line {width}"
                start = rows.line_num
        except csv.Error:
            return _not_closed(start + 1)
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 150 else f"{line[:149]}…"
