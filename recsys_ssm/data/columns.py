"""Read the columns of users' tables: ids, times, numbers, and features of users and items.

Both kinds of tables of one's own (:mod:`recsys_ssm.data.table` and :mod:`recsys_ssm.data.interactions`) read through
this module, so that they accept the same cells and refuse a cell with the same message. A table is a file or a data
frame; messages name the file, or the argument in which the data frame was passed.

Legend: R rows of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from recsys_ssm.data.files import AbsentColumnError, Compact, remark, shown
from recsys_ssm.data.formats import Format, read
from recsys_ssm.errors import UserError
from recsys_ssm.features import as_frame, numeric_column, text_column

Table = str | Path | pl.DataFrame | Any
"""A CSV or Parquet file, or a data frame: polars, pandas, or anything else that polars can convert."""

MISSING_IDS = ("NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "\\N", "<NA>")
"""Texts that usually stand for a missing id."""

ROW = "\0row"
"""Hidden column of the numbers (from 1) of a table's rows, where some were left out."""

TimeUnit = Literal["number", "ms", "us", "ns", "text"]
_PER_SECOND = {"ms": 10**3, "us": 10**6, "ns": 10**9}


class Times(NamedTuple):
    """Times of rows as numbers that are in their order."""

    values: np.ndarray
    """(R,) int64 where the times are whole numbers or dates (float64 has only 53 bits), else float64."""
    unit: TimeUnit
    """``number``: as written; ``ms``, ``us``, ``ns``: since 1970; ``text``: ranks of texts that begin with a date."""
    note: str | None = None
    """Remark on how the column was read, for the dataset's notes."""


def one_or_more(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return column names as a tuple of texts; one name without the brackets of a list is one column."""
    return (names,) if isinstance(names, str) else tuple(str(name) for name in names or ())


def is_frame(source: object) -> bool:
    """Return True for a data frame, False for a path or a list of paths."""
    if isinstance(source, str | Path) or source is None:
        return False
    return not (isinstance(source, Sequence) and all(isinstance(one, str | Path) for one in source))


def open_table(
    source: Table,
    argument: str,
    columns: Sequence[str],
    *,
    format: Format | None = None,  # noqa: A002 (the usual name)
    names: Sequence[str] = (),
    separator: str | None = None,
    names_option: str | None = None,
    separator_option: str = "dataset.separator",
    options: Mapping[str, str] | None = None,
    notes: list[str] | None = None,
    compact: Compact | None = None,
) -> tuple[pl.DataFrame, str]:
    """Read the named columns of a file or a data frame.

    Blank rows of a text file are left out, and a header line that is repeated among the rows.

    Args:
        source: The file or the data frame.
        argument: Name of the argument, for messages about a data frame.
        columns: Columns to read, in this order.
        format, names, separator, names_option, separator_option: See :func:`recsys_ssm.data.formats.read`; for files
            only.
        options: The option that names a column, by column, for the message that it is absent.
        notes: List for remarks on what was left out; None: they are logged.
        compact: Columns of a file to hold in little memory; None: cells are held as they are.

    Returns:
        The columns (and :data:`ROW` where rows were left out), and the name of the table in messages: the path or
        ``argument``.

    Raises:
        UserError: The source cannot be read, has no row, or lacks a column.
    """
    columns = list(dict.fromkeys(columns))
    if isinstance(source, str | Path):
        try:
            frame = read(
                source,
                columns,
                format=format,
                names=names,
                separator=separator,
                names_option=names_option,
                separator_option=separator_option,
                notes=notes,
                compact=compact,
            )
        except AbsentColumnError as error:
            raise error.with_option((options or {}).get(error.column)) from error
        return _without_idle(frame, str(source), notes), str(source)
    frame = as_frame(source, argument)
    if absent := [name for name in columns if name not in frame.columns]:
        lacks = AbsentColumnError(argument, absent[0], frame.columns)
        raise lacks.with_option((options or {}).get(absent[0]))
    if frame.height == 0:
        raise UserError(f"{argument}: the data frame has no row")
    return frame.select(columns), argument


def _without_idle(frame: pl.DataFrame, where: str, notes: list[str] | None) -> pl.DataFrame:
    """Leave out rows of a text table that are blank or have the names of their columns as cells.

    Raises:
        UserError: No row is left.
    """
    if not all(kind == pl.String or isinstance(kind, pl.Categorical) for kind in frame.dtypes):
        return frame
    cells = [pl.col(name) for name in frame.columns]
    idle = frame.select(
        header=pl.all_horizontal(
            cell.eq_missing(pl.lit(cell.meta.output_name())) for cell in cells
        ),
        blank=pl.all_horizontal(cell.is_null() for cell in cells),
    )
    remarks = []
    if n_again := int(idle["header"].sum()):
        remarks.append(f"{where}: {n_again:,} rows repeat the header line: left out")
    if n_blank := int(idle["blank"].sum()):
        remarks.append(
            f"{where}: {n_blank:,} rows are blank in every column that is read: left out"
        )
    remark(notes, remarks)
    if n_again + n_blank == frame.height:
        raise UserError(f"{where}: no row below the header line")
    return at_rows(frame, ~(idle["header"] | idle["blank"])) if remarks else frame


def at_rows(frame: pl.DataFrame, kept: pl.Series) -> pl.DataFrame:
    """Return the rows of a mask (R,), with their numbers in the table as :data:`ROW`."""
    if ROW not in frame.columns:
        frame = frame.with_columns(pl.int_range(1, pl.len() + 1).alias(ROW))
    return frame.filter(kept)


def exploded(
    frame: pl.DataFrame, columns: Sequence[str], where: str, notes: list[str]
) -> pl.DataFrame:
    """Return a row for each element of list columns, which have as many elements each in a row.

    Args:
        frame: The table.
        columns: Columns that may have lists.
        where: Name of the table in messages.
        notes: Notes to add to.

    Raises:
        UserError: Two lists of a row differ in length.
    """
    lists = [name for name in columns if isinstance(frame[name].dtype, pl.List | pl.Array)]
    if not lists:
        return frame
    frame = frame.with_columns(
        pl.col(name).arr.to_list() for name in lists if isinstance(frame[name].dtype, pl.Array)
    )
    lengths = frame.select(pl.col(name).list.len().fill_null(0) for name in lists)
    for name in lists[1:]:
        refuse(
            (lengths[name] != lengths[lists[0]]).to_numpy(),
            where,
            name,
            f"its list has another length than that of column {shown(lists[0])}; give lists of one length",
            frame,
        )
    empty = lengths[lists[0]] == 0
    n_rows, n_empty = frame.height, int(empty.sum())
    if n_empty == n_rows:
        raise UserError(f"{where}: every list of column {shown(lists[0])} is empty")
    frame = at_rows(frame, ~empty)
    frame = frame.explode(lists)
    notes.append(
        f"{where}: {n_rows:,} rows have lists of {frame.height:,} elements"
        + (f"; {n_empty:,} rows with an empty list are left out" if n_empty else "")
    )
    return frame


def refuse(
    wrong: np.ndarray, where: str, column: str, what: str, frame: pl.DataFrame | None = None
) -> None:
    """Raise an error that names the first row of a mask (R,), if there is one.

    Args:
        wrong: The mask.
        where: Name of the table.
        column: Name of the column.
        what: What is wrong, and what to do.
        frame: The table, for the numbers of rows where some were left out.

    Raises:
        UserError: A row is marked.
    """
    if wrong.any():
        row = int(wrong.argmax())
        number = frame[ROW][row] if frame is not None and ROW in frame.columns else row + 1
        raise UserError(f"{where}, row {number}, column {shown(column)}: {what}")


def keys(
    frame: pl.DataFrame,
    column: str,
    where: str,
    *,
    missing: Sequence[str] = (),
    notes: list[str] | None = None,
) -> pl.Series:
    """Return an id column as text.

    Args:
        frame: The table.
        column: Name of the column.
        where: Name of the table in messages.
        missing: Texts that stand for a missing id.
        notes: Notes to add to, on ids that may be meant to be the same.

    Raises:
        UserError: A cell is empty, or has one of the texts for a missing id.
    """
    try:
        ids = text_column(frame, column, where)
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"{where}: column {shown(column)} holds {frame[column].dtype}, not ids; give texts or numbers"
        ) from error
    _check_exact(frame, column, where)
    _check_ids(ids, None, frame, column, where, missing)
    if notes is not None:
        notes += _spellings(ids, None, column, where)
    return ids


def coded_keys(
    frame: pl.DataFrame,
    column: str,
    where: str,
    *,
    missing: Sequence[str] = (),
    notes: list[str] | None = None,
) -> tuple[np.ndarray, pl.Series]:
    """Return an id column as codes (R,), int32, and the different ids as text, sorted, that they are positions in.

    A column of categories or of integers is checked by its different values alone.

    Args:
        frame, column, where, missing, notes: See :func:`keys`.

    Raises:
        UserError: As :func:`keys`.
    """
    values, place = _different(frame[column])
    if place is None:
        ids = keys(frame, column, where, missing=missing, notes=notes)
        different = ids.unique().sort()
        return positions(ids, different, np.int32), different
    ids = text_column(pl.DataFrame({column: values}), column, where)
    _check_ids(ids, place, frame, column, where, missing)
    if notes is not None:
        notes += _spellings(ids, place, column, where)
    order = ids.arg_sort().to_numpy()
    rank = np.empty(order.size, dtype=np.int32)
    rank[order] = np.arange(order.size, dtype=np.int32)
    return rank[place], ids.gather(order)


def _different(cells: pl.Series) -> tuple[pl.Series, np.ndarray | None]:
    """Return the different values of a column, and each row's place (R,) among them.

    Other columns than those of categories, and of integers of a small range, are returned as they are, with None.
    """
    if isinstance(cells.dtype, pl.Categorical | pl.Enum):
        values, codes = cells.unique().drop_nulls(), cells.to_physical().cast(pl.Int64)
        numbers = values.to_physical().to_numpy()
    elif cells.dtype.is_integer() and cells.len() > cells.null_count():
        least, most = int(cells.min()), int(cells.max())  # type: ignore[arg-type]
        if most - least > 2 * cells.len() or max(abs(least), abs(most)) >= 2**62:
            return cells, None
        values, codes = cells.unique().drop_nulls(), cells.cast(pl.Int64) - least
        numbers = values.cast(pl.Int64).to_numpy() - least
    else:
        return cells, None
    if not values.len():
        return cells, None
    place = np.zeros(int(numbers.max()) + 2, dtype=np.int32)
    place[numbers] = np.arange(values.len())
    if codes.null_count():
        place[-1] = values.len()
        codes = codes.fill_null(place.size - 1)
        values = pl.concat([values, pl.Series(values.name, [None], values.dtype)])
    return values, place[codes.to_numpy()]


def _different_texts(cells: pl.Series) -> tuple[pl.Series, np.ndarray | None]:
    """Return the different texts of a column of categories as :func:`_different` does; other columns as they are."""
    if not isinstance(cells.dtype, pl.Categorical | pl.Enum):
        return cells, None
    values, place = _different(cells)
    return values.cast(pl.String), place


def _at_rows(values: np.ndarray, place: np.ndarray | None) -> np.ndarray:
    """Return the value of each row (R,) from those of the different cells; no place: they are those of the rows."""
    return values if place is None else values[place]


def _check_ids(
    ids: pl.Series,
    place: np.ndarray | None,
    frame: pl.DataFrame,
    column: str,
    where: str,
    missing: Sequence[str],
) -> None:
    """Check that no id is empty, or is a text for a missing one.

    Args:
        ids: Ids of the rows, or the different ones.
        place: Each row's place among the different ones; None: ``ids`` are those of the rows.
        frame, column, where, missing: See :func:`keys`.

    Raises:
        UserError: One is.
    """
    if ids.null_count():
        empty = _at_rows(ids.is_null().to_numpy(), place)
        n_rows = f"{int(empty.sum()):,} rows are" if empty.sum() > 1 else "the row is"
        left_out = f'; {n_rows} left out by dataset.filter="{_name(column)} is not null"'
        refuse(
            empty,
            where,
            column,
            f"empty (or a blank line); every row needs its id{left_out if missing else ''}",
            frame,
        )
    absent = ids.is_in(list(missing)) if missing else None
    if absent is not None and absent.any():
        rows = _at_rows(absent.to_numpy(), place)
        first = ids[int(rows.argmax() if place is None else place[rows.argmax()])]
        refuse(
            rows,
            where,
            column,
            f"{first!r} stands for a missing id ({int(rows.sum()):,} rows); leave these rows out with "
            f"dataset.filter='{_name(column)} != \"{first}\"', or set dataset.missing=[] to take it as an id",
            frame,
        )


def _check_exact(frame: pl.DataFrame, column: str, where: str) -> None:
    """Check that ids stored as floats are small enough to be exact.

    Raises:
        UserError: One is not: several ids may have become the same number.
    """
    cells = frame[column]
    if cells.dtype in (pl.Float32, pl.Float64):
        limit = 2**53 if cells.dtype == pl.Float64 else 2**24
        refuse(
            (cells.abs() > limit).fill_null(value=False).to_numpy(),
            where,
            column,
            f"an id above {limit:,} stored as {cells.dtype}, where several ids become one; store ids as integers or "
            "text",
            frame,
        )


def _name(column: str) -> str:
    """Return a column's name as a filter has it."""
    return column if column.isidentifier() else f"`{column}`"


_SHORTENED = r"^\d(\.\d+)?[eE]\+\d+$"
_AROUND = r"^[\s'\"\x{200b}\x{feff}]+|[\s'\"\x{200b}\x{feff}]+$"


def _spellings(ids: pl.Series, place: np.ndarray | None, column: str, where: str) -> list[str]:
    """Return notes on ids that may be the same, and on ids that may have been different.

    The first are written both as ``12`` and as ``12.0``, or differ in leading zeros, capitals, or blanks and quotation
    marks around them. The second are numbers that a spreadsheet has shortened: ``1.23E+12``.
    """
    different, notes = ids.unique().sort(), []
    plain = (
        different.str.normalize("NFKC")
        .str.replace_all(_AROUND, "")
        .str.replace(r"^(-?\d+)\.0+$", "${1}")
        .str.replace(r"^(-?)0+(\d)", "${1}${2}")
        .str.to_lowercase()
    )
    if plain.n_unique() < different.len():
        alike = pl.DataFrame({"id": different, "plain": plain})
        found = alike.group_by("plain", maintain_order=True).agg("id")
        found = found.filter(pl.col("id").list.len() > 1)
        one, other = found["id"][0].to_list()[:2]
        notes.append(
            f"{where}: column {shown(column)} has {found.height:,} ids in two spellings, as {shown(one)} and "
            f"{shown(other)}: counted as different ids; write them alike if they are the same"
        )
    shortened = different.filter(different.str.contains(_SHORTENED))
    if shortened.len():
        n_rows = int(_at_rows(ids.is_in(shortened.implode()).to_numpy(), place).sum())
        notes.append(
            f"{where}: column {shown(column)} has {n_rows:,} ids like {shown(shortened[0])}: a spreadsheet may have "
            "shortened them, so that different ids are one; export the column again as text"
        )
    return notes


def positions(
    ids: pl.Series, catalogue: pl.Series, dtype: type[np.integer] = np.int64
) -> np.ndarray:
    """Return the position of each id (R,) in ``catalogue``, whose ids are unique."""
    return ids.cast(pl.Enum(catalogue)).to_physical().to_numpy().astype(dtype)


def numbers(frame: pl.DataFrame, column: str, where: str, option: str) -> np.ndarray:
    """Return a column of finite numbers, none missing, as float64.

    Args:
        frame: The table.
        column: Name of the column.
        where: Name of the table in messages.
        option: Option that needs the numbers, for messages.

    Raises:
        UserError: A cell is empty or is not a finite number.
    """
    cells, place = _different_texts(frame[column])
    text = cells.str.strip_chars() if cells.dtype == pl.String else cells
    if text.dtype.is_nested() or text.dtype in (pl.Binary, pl.Object) or text.dtype.is_temporal():
        raise UserError(
            f"{where}: column {shown(column)} holds {text.dtype}, not numbers; {option} needs numbers"
        )
    values = text.cast(pl.Float64, strict=False)
    wrong = ~values.is_finite().fill_null(value=False).to_numpy()
    if wrong.any():
        wrong = _at_rows(wrong, place)
        cell = frame[column][int(wrong.argmax())]
        what = "empty" if cell is None else f"{shown(cell)} is not a finite number"
        refuse(wrong, where, column, f"{what}; every row needs a number ({option})", frame)
    return _at_rows(values.to_numpy(), place)


def times(frame: pl.DataFrame, column: str | Sequence[str], where: str) -> Times:
    """Read a column of times: numbers, dates, or dates with a time of day, with or without a zone.

    A date is midnight, a time without a zone is UTC. A text that only begins with a date (``2024-05-31, evening``) is
    compared as text, and so is its whole column. Of several columns, a date and a time of day are joined; others are
    compared one after another.

    Raises:
        UserError: A cell is empty, or is neither a number nor a date.
    """
    if not isinstance(column, str):
        if len(column) > 1:
            return _joined_times(frame, column, where)
        (column,) = column
    cells, place = _different_texts(frame[column])
    unit: TimeUnit = "number"
    values = cells
    if cells.dtype == pl.String:
        text = cells.str.strip_chars()
        values = _numbers(text)
        if values.null_count():
            fine = bool(text.str.contains(r"\.\d{7}").any())
            date_unit: Literal["us", "ns"] = "ns" if fine else "us"
            dates = parse_dates(text, date_unit)
            begins_with_date = text.str.contains(r"^\d{4}-\d\d-\d\d").fill_null(value=False).all()
            failed, not_numbers = (
                _at_rows(parsed.is_null().to_numpy(), place) for parsed in (dates, values)
            )
            if failed.any() and begins_with_date:
                odd = str(frame[column][int(failed.argmax())]).strip()
                note = f"{where}: column {shown(column)} is compared as text: {shown(odd)} only begins with a date"
                ranks = text.rank("dense").cast(pl.Int64).to_numpy()
                return Times(_at_rows(ranks, place), "text", note)
            if failed.sum() < not_numbers.sum():
                values, unit = dates, date_unit
    elif cells.dtype.is_temporal():
        if cells.dtype == pl.Date:
            values, unit = cells.cast(pl.Datetime("us")), "us"
        elif isinstance(cells.dtype, pl.Datetime):
            unit = cells.dtype.time_unit
        values = values.to_physical()
    elif cells.dtype.is_decimal():
        values = cells.cast(pl.Float64)
    elif not cells.dtype.is_numeric():
        raise UserError(
            f"{where}: column {shown(column)} holds {cells.dtype}, not times; give numbers or dates"
        )
    if values.dtype.is_float():
        values = values.fill_nan(None)
    wrong = values.is_null().to_numpy()
    if wrong.any():
        wrong = _at_rows(wrong, place)
        cell = frame[column][int(wrong.argmax())]
        refuse(
            wrong,
            where,
            column,
            ("empty" if cell is None else f"{shown(cell)} is not a time")
            + "; give numbers, or dates as YYYY-MM-DD hh:mm:ss, in every row",
            frame,
        )
    instants = _at_rows(values.to_numpy(), place)
    if unit == "number":
        _check_one_unit(instants, frame, column, where)
    return Times(instants, unit)


def _check_one_unit(values: np.ndarray, frame: pl.DataFrame, column: str, where: str) -> None:
    """Check that times since 1970 are not seconds in some rows and milliseconds or microseconds in others.

    Raises:
        UserError: Every time is from 1980 to 2280 in one of these units, and they are not all in the same.
    """
    # 1980 to 2280 in seconds
    units = [(values >= 3.2e8 * unit) & (values < 9.8e9 * unit) for unit in (1, 10**3, 10**6)]
    counts = [int(each.sum()) for each in units]
    if sum(counts) < values.size or max(counts) == values.size:
        return
    ranked = sorted((n, at) for at, n in enumerate(counts) if n)
    fewest, usual = units[ranked[0][1]], units[ranked[-1][1]]
    odd, other = (values[int(each.argmax())] for each in (fewest, usual))
    refuse(
        fewest,
        where,
        column,
        f"{odd} is in another unit than {other} in other rows (seconds, milliseconds); give every time in one unit",
        frame,
    )


def _joined_times(frame: pl.DataFrame, columns: Sequence[str], where: str) -> Times:
    """Read a date and a time of day as one time; rank the rows of other columns, one column after another."""
    first = times(frame, columns[0], where)
    if len(columns) == 2 and first.unit in _PER_SECOND:
        of_day = _times_of_day(frame[columns[1]])
        if not of_day.null_count():
            per_us = _PER_SECOND[first.unit] / 10**6
            return first._replace(
                values=first.values + (of_day.to_numpy() * per_us).astype(np.int64)
            )
    parts = [first, *(times(frame, column, where) for column in columns[1:])]
    made = pl.DataFrame({str(number): part.values for number, part in enumerate(parts)})
    ranks = made.select(pl.struct(pl.all()).rank("dense").cast(pl.Int64)).to_series()
    notes = [part.note for part in parts if part.note]
    note = f"{where}: rows are ordered by {' and then by '.join(columns)}"
    return Times(ranks.to_numpy(), "text", "; ".join([*notes, note]))


def _times_of_day(cells: pl.Series) -> pl.Series:
    """Return times of day as microseconds since midnight; null where a cell is another text."""
    if cells.dtype == pl.Time:
        return cells.to_physical() // 1000
    parts = cells.cast(pl.String).str.strip_chars().str.extract_groups(_OF_DAY).struct
    hours, minutes, seconds = (parts.field(str(n)).cast(pl.Float64) for n in (1, 2, 3))
    return ((hours * 60 + minutes) * 60 + seconds.fill_null(0)) * 10**6


def _numbers(text: pl.Series) -> pl.Series:
    """Return text as integers if all are, else as floats; null where a text is not a number."""
    whole = text.cast(pl.Int64, strict=False)
    return text.cast(pl.Float64, strict=False) if whole.null_count() else whole


_OF_DAY = r"^(\d{1,2}):(\d{2})(?::(\d{2}(?:\.\d+)?))?$"
_DAY_FIRST = r"^(\d{4}-\d{1,2}-\d{1,2})"
_ZONE = r"(:\d\d(?:\.\d+)?) ?([+-])(\d\d):?(\d\d)?$"


def parse_dates(text: pl.Series, unit: Literal["us", "ns"] = "us") -> pl.Series:
    """Parse ISO dates, with or without a time of day and a zone, as ``unit`` since 1970; null where it fails."""
    text = text.str.replace(_DAY_FIRST + "T", "${1} ").str.replace(r"(Z| UTC| GMT)$", "")
    local = text.str.replace(_ZONE, "${1}")
    forms = (
        "%Y-%m-%d %H:%M:%S%.f",
        "%Y-%m-%d %H:%M",
        "%Y-%m-%d %I:%M:%S %p",
        "%Y-%m-%d %I:%M %p",
    )
    parsed = local.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime(unit))
    for form in forms:
        if not parsed.null_count():
            break
        stamps = local.str.to_datetime(form, strict=False, time_unit=unit)
        parsed = parsed.zip_with(parsed.is_not_null(), stamps)
    zone = pl.DataFrame({"text": text}).select(
        sign=pl.col("text").str.extract(_ZONE, 2),
        hours=pl.col("text").str.extract(_ZONE, 3).cast(pl.Int64),
        minutes=pl.col("text").str.extract(_ZONE, 4).cast(pl.Int64).fill_null(0),
    )
    offset = (zone["hours"] * 60 + zone["minutes"]).fill_null(0) * 60 * _PER_SECOND[unit]
    sign = (zone["sign"] == "-").fill_null(value=False).cast(pl.Int64) * 2 - 1
    return parsed.to_physical() + offset * sign


def instant(value: float | str, option: str, unit: TimeUnit) -> float:
    """Convert an option's instant to the unit of a column of times.

    Raises:
        UserError: The instant is of another kind than the times.
    """
    if unit == "text":
        raise UserError(
            f"dataset.{option}={value}: the times are texts; give them as YYYY-MM-DD hh:mm:ss, or "
            "leave out val_from and test_from"
        )
    if unit == "number":
        try:
            return float(value)
        except ValueError:
            raise UserError(
                f"dataset.{option}={value}: the times are numbers; give a number"
            ) from None
    date = parse_dates(pl.Series([str(value).strip()]))[0]
    if date is None:
        raise UserError(
            f"dataset.{option}={value}: the times are dates; give it as YYYY-MM-DD hh:mm:ss"
        )
    return int(date) * _PER_SECOND[unit] // 10**6


@dataclass(frozen=True)
class FeatureTable:
    """The file or data frame with a row for each user or for each item, and its feature columns.

    Args:
        kind: ``user`` or ``item``.
        source: The file or the data frame; None: there is none.
        key: Name of the id column.
        numeric, categorical: Feature columns, read as numbers or as categories.
        names: Names of the columns of a file without a header line.
        separator: Separator between the cells of a file; None: the format's own.
        names_option, separator_option: Options that set ``names`` and ``separator``, for messages.
        instead: Advice for those who name the id column as a feature.
        key_option: Option that sets ``key``, for messages; None: ``dataset.user`` or ``dataset.item``.

    Raises:
        UserError: The columns cannot be these.
    """

    kind: Literal["user", "item"]
    source: Table
    key: str
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    separator: str | None = None
    names_option: str | None = None
    separator_option: str = "dataset.separator"
    instead: str = ""
    key_option: str | None = None

    def __post_init__(self) -> None:
        kind, features = self.kind, self.features
        if twice := [name for name in features if features.count(name) > 1]:
            raise UserError(
                f"dataset.{kind}_numeric and dataset.{kind}_categorical: column {twice[0]!r} is named "
                "twice; a column is read either as numbers or as categories"
            )
        if self.key in features:
            raise UserError(
                f"dataset.{kind}_numeric, dataset.{kind}_categorical: {self.key!r} is the id column; "
                f"leave it out{self.instead}"
            )
        if features and self.source is None:
            raise UserError(
                f"dataset.{kind}s: not set, but {kind}_numeric and {kind}_categorical name columns "
                f"({', '.join(features)}); give the file that has them"
            )

    @property
    def features(self) -> list[str]:
        return [*self.numeric, *self.categorical]

    def read(self, notes: list[str] | None = None) -> tuple[pl.DataFrame, str]:
        """Read the ids and features, every cell checked; return them and the table's name in messages.

        Args:
            notes: List for remarks on how the file was read; None: they are logged.

        Raises:
            UserError: The table cannot be read, a cell is wrong, or two rows have the same id.
        """
        frame, where = open_table(
            self.source,
            f"{self.kind}s",
            [self.key, *self.features],
            names=self.names,
            separator=self.separator,
            names_option=self.names_option,
            separator_option=self.separator_option,
            options={self.key: self.key_option or f"dataset.{self.kind}"},
            notes=notes,
        )
        ids = keys(frame, self.key, where)
        again = ~ids.is_first_distinct().to_numpy()
        if again.any():
            row = int(again.argmax())
            first = int((ids == ids[row]).to_numpy().argmax()) + 1
            raise UserError(
                f"{where}, row {row + 1}, column {shown(self.key)}: {shown(ids[row])} is the id of row {first} "
                f"already; each {self.kind} needs one row"
            )
        # Cells are checked before rows are joined, so that messages can name the file's row.
        columns = {
            self.key: ids,
            **{name: numeric_column(frame, name, where) for name in self.numeric},
            **{name: text_column(frame, name, where) for name in self.categorical},
        }
        return pl.DataFrame(columns).with_columns(pl.col(self.numeric).fill_nan(None)), where

    def unknown(self, frame: pl.DataFrame, ids: pl.Series, where: str) -> pl.Series:
        """Return those of ``ids`` (unique) that have no row in ``frame``, sorted.

        Raises:
            UserError: None of them has a row.
        """
        unknown = ids.filter(~ids.is_in(frame[self.key].implode())).sort()
        if unknown.len() == ids.len():
            raise UserError(
                f"{where}: none of the {ids.len():,} {self.kind}s of the interactions is in it, for "
                f"example {shown(unknown[0])}; its first is {shown(frame[self.key][0])}: check that ids are "
                "written alike in both"
            )
        return unknown

    def describe(
        self,
        frame: pl.DataFrame,
        ids: pl.Series,
        unknown: pl.Series,
        where: str,
        *,
        idle: str,
        n_rows: int | None = None,
    ) -> list[str]:
        """Return notes on ids without a row and on rows without an interaction.

        Args:
            frame, ids, unknown, where: See :meth:`unknown`.
            idle: What becomes of rows without an interaction.
            n_rows: Interactions of the unknown ids, if they were counted.
        """
        kind, notes = self.kind, []
        if unknown.len():
            rows = "" if n_rows is None else f" ({n_rows:,} rows)"
            notes.append(
                f"{where}: {unknown.len():,} {kind}s of the interactions{rows} are not in it, for "
                f"example {shown(unknown[0])}: kept, their features missing"
            )
        if n_idle := frame.height - (ids.len() - unknown.len()):
            notes.append(f"{where}: {n_idle:,} {kind}s without an interaction: {idle}")
        return notes

    def join(self, ids: pl.Series, frame: pl.DataFrame) -> pl.DataFrame:
        """Return a row for each of ``ids``, in their order; features are null where an id has no row."""
        return pl.DataFrame({self.key: ids}).join(
            frame, on=self.key, how="left", maintain_order="left"
        )
