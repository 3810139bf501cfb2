"""Read the columns of users' tables: ids, times, numbers, and features of users and items.

Both kinds of tables of one's own (:mod:`recsys_ssm.data.table` and :mod:`recsys_ssm.data.interactions`) read through
this module, so that they accept the same cells and refuse a cell with the same message. A table is a file or a data
frame; messages name the file, or the argument in which the data frame was passed.

Legend: R rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl

from recsys_ssm.data.files import collect
from recsys_ssm.data.formats import Format, scan, separator_of
from recsys_ssm.errors import UserError
from recsys_ssm.features import as_frame, numeric_column, text_column

Table = str | Path | pl.DataFrame | Any
"""A CSV or Parquet file, or a data frame: polars, pandas, or anything else that polars can convert."""

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
    """Return column names as a tuple; one name without the brackets of a list is one column."""
    return (names,) if isinstance(names, str) else tuple(names or ())


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
) -> tuple[pl.DataFrame, str]:
    """Read the named columns of a file or a data frame.

    Args:
        source: The file or the data frame.
        argument: Name of the argument, for messages about a data frame.
        columns: Columns to read, in this order.
        format, names, separator, names_option: See :func:`recsys_ssm.data.formats.scan`; for files only.

    Returns:
        The columns, and the name of the table in messages: the path or ``argument``.

    Raises:
        UserError: The source cannot be read, has no row, or lacks a column.
    """
    columns = list(dict.fromkeys(columns))
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        lazy = scan(
            path,
            columns,
            format=format,
            names=names,
            separator=separator,
            names_option=names_option,
        )
        return collect(lazy, path, separator=separator or separator_of(path)), str(source)
    frame = as_frame(source, argument)
    if absent := [name for name in columns if name not in frame.columns]:
        raise UserError(
            f"{argument}: no column {absent[0]!r}; its columns are {', '.join(frame.columns[:30])}"
        )
    if frame.height == 0:
        raise UserError(f"{argument}: the data frame has no row")
    return frame.select(columns), argument


def refuse(wrong: np.ndarray, where: str, column: str, what: str) -> None:
    """Raise an error that names the first row of a mask (R,), if there is one.

    Raises:
        UserError: A row is marked.
    """
    if wrong.any():
        raise UserError(f"{where}, row {int(wrong.argmax()) + 1}, column {column!r}: {what}")


def keys(frame: pl.DataFrame, column: str, where: str) -> pl.Series:
    """Return an id column as text.

    Raises:
        UserError: A cell is empty.
    """
    ids = text_column(frame, column, where)
    refuse(
        ids.is_null().to_numpy(), where, column, "empty (or a blank line); every row needs its id"
    )
    return ids


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
    cells = frame[column]
    text = cells.str.strip_chars() if cells.dtype == pl.String else cells
    if text.dtype.is_nested() or text.dtype in (pl.Binary, pl.Object) or text.dtype.is_temporal():
        raise UserError(
            f"{where}: column {column!r} holds {text.dtype}, not numbers; {option} needs numbers"
        )
    values = text.cast(pl.Float64, strict=False)
    wrong = ~values.is_finite().fill_null(value=False).to_numpy()
    if wrong.any():
        cell = cells[int(wrong.argmax())]
        what = "empty" if cell is None else f"{cell!r} is not a finite number"
        refuse(wrong, where, column, f"{what}; every row needs a number ({option})")
    return values.to_numpy()


def times(frame: pl.DataFrame, column: str, where: str) -> Times:
    """Read a column of times: numbers, dates, or dates with a time of day, with or without a zone.

    A date is midnight, a time without a zone is UTC. A text that only begins with a date (``2024-05-31, evening``) is
    compared as text, and so is its whole column.

    Raises:
        UserError: A cell is empty, or is neither a number nor a date.
    """
    cells = frame[column]
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
            if dates.null_count() and begins_with_date:
                odd = text.filter(dates.is_null())[0]
                note = f"{where}: column {column!r} is compared as text: {odd!r} only begins with a date"
                return Times(text.rank("dense").cast(pl.Int64).to_numpy(), "text", note)
            if dates.null_count() < values.null_count():
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
            f"{where}: column {column!r} holds {cells.dtype}, not times; give numbers or dates"
        )
    if values.dtype.is_float():
        values = values.fill_nan(None)
    wrong = values.is_null().to_numpy()
    if wrong.any():
        cell = cells[int(wrong.argmax())]
        refuse(
            wrong,
            where,
            column,
            f"{cell!r} is not a time; give numbers, or dates as YYYY-MM-DD hh:mm:ss, in every row",
        )
    return Times(values.to_numpy(), unit)


def _numbers(text: pl.Series) -> pl.Series:
    """Return text as integers if all are, else as floats; null where a text is not a number."""
    whole = text.cast(pl.Int64, strict=False)
    return text.cast(pl.Float64, strict=False) if whole.null_count() else whole


_DAY_FIRST = r"^(\d{4}-\d{1,2}-\d{1,2})"
_ZONE = r"(:\d\d(?:\.\d+)?) ?([+-])(\d\d):?(\d\d)?$"


def parse_dates(text: pl.Series, unit: Literal["us", "ns"] = "us") -> pl.Series:
    """Parse ISO dates, with or without a time of day and a zone, as ``unit`` since 1970; null where it fails."""
    text = text.str.replace(_DAY_FIRST + "T", "${1} ").str.strip_suffix("Z")
    local = text.str.replace(_ZONE, "${1}")
    forms = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")
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
        names_option: Option that sets ``names``, for messages.
        instead: Advice for those who name the id column as a feature.

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
    instead: str = ""

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

    def read(self) -> tuple[pl.DataFrame, str]:
        """Read the ids and features, every cell checked; return them and the table's name in messages.

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
        )
        ids = keys(frame, self.key, where)
        again = ~ids.is_first_distinct().to_numpy()
        if again.any():
            row = int(again.argmax())
            first = int((ids == ids[row]).to_numpy().argmax()) + 1
            raise UserError(
                f"{where}, row {row + 1}, column {self.key!r}: {ids[row]!r} is the id of row {first} "
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
                f"example {unknown[0]!r}; its first is {frame[self.key][0]!r}: check that ids are "
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
                f"example {unknown[0]!r}: kept, their features missing"
            )
        if n_idle := frame.height - (ids.len() - unknown.len()):
            notes.append(f"{where}: {n_idle:,} {kind}s without an interaction: {idle}")
        return notes

    def join(self, ids: pl.Series, frame: pl.DataFrame) -> pl.DataFrame:
        """Return a row for each of ``ids``, in their order; features are null where an id has no row."""
        return pl.DataFrame({self.key: ids}).join(
            frame, on=self.key, how="left", maintain_order="left"
        )
