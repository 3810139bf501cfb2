"""Encode features of users and items: named columns as tensors, by a schema.

A :class:`FeatureSchema` has the columns, their scaling and their vocabularies. It is plain data, is saved in
checkpoints and encodes tables that were not there in training.

Shapes: B rows, Fn numeric features, Fc categorical features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_ssm.errors import UserError

N_BINS = 48
"""Bins of equal numbers of training rows that a numeric field knows the edges of."""

MISSING = 0
"""Code of a missing or unknown value of a categorical feature; known values have codes from 1."""


class Features(NamedTuple):
    """Encoded rows of users or of items."""

    numeric: Tensor
    """(B, Fn) float32, scaled; 0 (the mean) where a value is missing."""
    categorical: Tensor
    """(B, Fc) int64; :data:`MISSING`, or 1 + the index in the field's vocabulary."""

    @property
    def n_rows(self) -> int:
        return self.numeric.shape[0]

    def rows(self, index: Tensor | slice) -> Features:
        """Return the rows at ``index`` (1-D integers or a slice)."""
        return Features(self.numeric[index], self.categorical[index])

    def to(self, device: torch.device | str) -> Features:
        return Features(self.numeric.to(device), self.categorical.to(device))


@dataclass(frozen=True)
class NumericField:
    """A numeric column, encoded as ``(value - mean) / std``."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    quantiles: tuple[float, ...] = field(default=(), compare=False)
    """The :data:`N_BINS` + 1 edges of bins with equal numbers of training rows, as in the column; smallest and largest
    value included. Empty: unknown, as in checkpoints of older versions."""

    def edges(self, n_bins: int) -> np.ndarray:
        """Return the different edges of ``n_bins`` bins in the encoded unit, at least two; increasing float64.

        Args:
            n_bins: Bins of equal numbers of training rows, at most :data:`N_BINS`.

        Raises:
            UserError: The quantiles are unknown, or ``n_bins`` is out of its range.
        """
        if not 1 <= n_bins <= N_BINS:
            raise UserError(f"n_bins={n_bins}: give a number from 1 to {N_BINS}")
        if not self.quantiles:
            raise UserError(
                f"column {self.name!r}: its range and quantiles are unknown; make the schema with FeatureSchema.fit"
            )
        place = np.linspace(0, len(self.quantiles) - 1, n_bins + 1)
        raw = np.interp(place, np.arange(len(self.quantiles)), self.quantiles)
        # In the precision of the features, so that edges which differ stay different.
        edges = np.unique(((raw - self.mean) / self.std).astype(np.float32)).astype(np.float64)
        return edges if edges.size > 1 else np.array([edges[0], edges[0] + 1])


@dataclass(frozen=True)
class CategoricalField:
    """A categorical column; ``values[i]`` has code ``i + 1``, any other value is :data:`MISSING`."""

    name: str
    values: tuple[str, ...]

    @property
    def n_codes(self) -> int:
        """Number of codes: those of the known values, and :data:`MISSING`."""
        return len(self.values) + 1


@dataclass(frozen=True)
class FeatureSchema:
    """Columns of a table, and their encoding as :class:`Features`.

    Example:
        >>> import polars as pl
        >>> from recsys_ssm import FeatureSchema
        >>> songs = pl.DataFrame({"tempo": [90.0, 110.0, None], "genre": ["pop", "rock", "pop"]})
        >>> schema = FeatureSchema.fit(songs, numeric=["tempo"], categorical=["genre"])
        >>> encoded = schema.encode(songs)
        >>> encoded.numeric.flatten().tolist()
        [-1.0, 1.0, 0.0]
        >>> encoded.categorical.flatten().tolist()
        [1, 2, 1]
    """

    numeric: tuple[NumericField, ...] = ()
    categorical: tuple[CategoricalField, ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise UserError(f"column {twice[0]!r} is named twice among the features: name it once")

    @property
    def names(self) -> list[str]:
        return [f.name for f in self.numeric] + [f.name for f in self.categorical]

    @property
    def n_features(self) -> int:
        return len(self.numeric) + len(self.categorical)

    @classmethod
    def fit(
        cls,
        frame: pl.DataFrame,
        *,
        numeric: Sequence[str] = (),
        categorical: Sequence[str] = (),
        scale: bool = True,
        where: str = "the table",
    ) -> Self:
        """Learn scaling and vocabularies from ``frame``, the training rows.

        Args:
            frame: A row for each user or item.
            numeric: Columns to read as numbers.
            categorical: Columns to read as categories (their values as text, sorted).
            scale: Standardise numbers to mean 0 and deviation 1; False: keep them as they are.
            where: Name of the table in messages, for example its file.

        Raises:
            UserError: A column is absent, or a cell of a numeric column is not a finite number.
        """
        fields = []
        for name in numeric:
            values = numeric_column(frame, name, where)
            fields.append(_numeric_field(name, values, scale))
        vocabularies = []
        for name in categorical:
            known = text_column(frame, name, where).drop_nulls().unique().sort()
            vocabularies.append(CategoricalField(name, tuple(known)))
        return cls(tuple(fields), tuple(vocabularies))

    def encode(self, frame: pl.DataFrame, *, where: str = "the table") -> Features:
        """Encode the rows of ``frame``; an empty cell or an unknown category becomes :data:`MISSING`.

        Raises:
            UserError: A column is absent, or a cell of a numeric column is not a finite number.
        """
        numeric = np.zeros((frame.height, len(self.numeric)), dtype=np.float32)
        for j, number in enumerate(self.numeric):
            scaled = (numeric_column(frame, number.name, where) - number.mean) / number.std
            numeric[:, j] = np.where(np.isnan(scaled), 0.0, scaled)
        categorical = np.zeros((frame.height, len(self.categorical)), dtype=np.int64)
        for j, category in enumerate(self.categorical):
            codes = pl.DataFrame(
                {"value": category.values, "code": range(1, category.n_codes)},
                schema={"value": pl.String, "code": pl.Int64},
            )
            column = text_column(frame, category.name, where).alias("value").to_frame()
            joined = column.join(codes, on="value", how="left", maintain_order="left")
            categorical[:, j] = joined["code"].fill_null(MISSING).to_numpy()
        return Features(torch.from_numpy(numeric), torch.from_numpy(categorical))

    def to_dict(self, *, quantiles: bool = False) -> dict[str, Any]:
        """Return the schema as plain containers, for checkpoints and JSON.

        Args:
            quantiles: Include the quantiles of numeric columns, which some tokenizers need.
        """
        numeric = [asdict(field) for field in self.numeric]
        for each in numeric:
            known = each.pop("quantiles")
            if quantiles and known:
                each["quantiles"] = list(known)
        return {
            "numeric": numeric,
            "categorical": [
                {"name": field.name, "values": list(field.values)} for field in self.categorical
            ],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        return cls(
            tuple(
                NumericField(**{**field, "quantiles": tuple(field.get("quantiles", ()))})
                for field in plain["numeric"]
            ),
            tuple(
                CategoricalField(field["name"], tuple(field["values"]))
                for field in plain["categorical"]
            ),
        )


def numeric_column(frame: pl.DataFrame, name: str, where: str) -> np.ndarray:
    """Return column ``name`` as float64, NaN where a cell is empty.

    Raises:
        UserError: There is no such column, or a cell is text, NaN or infinite. The message names the file, the row and
            the column.
    """
    column = _column(frame, name, where)
    if column.dtype == pl.String:
        column = column.str.strip_chars().replace("", None)
    numbers = column.cast(pl.Float64, strict=False)
    wrong = (numbers.is_null() & column.is_not_null()) | ~numbers.is_finite().fill_null(value=True)
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise UserError(
            f"{where}, row {row + 1}, column {name!r:.60}: {column[row]!r:.60} is not a finite number; "
            "correct it, leave it empty if it is unknown, or list the column as categorical"
        )
    return numbers.fill_null(math.nan).to_numpy()


def text_column(frame: pl.DataFrame, name: str, where: str) -> pl.Series:
    """Return column ``name`` as text, null where a cell is empty.

    A whole number that is stored as a float (as pandas does if a cell is empty) reads like an integer: ``7.0`` is
    ``"7"``.

    Raises:
        UserError: There is no such column, or it has lists, structures or bytes.
    """
    column = _column(frame, name, where)
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        is_whole = (whole.cast(column.dtype) == column).fill_null(value=False)
        text = column.fill_nan(None).cast(pl.String)
        return whole.cast(pl.String).zip_with(is_whole, text).alias(name)
    return column.cast(pl.String).replace("", None)


def _column(frame: pl.DataFrame, name: str, where: str) -> pl.Series:
    if name not in frame.columns:
        raise UserError(
            f"{where}: no column {name!r:.60}; its columns are {', '.join(frame.columns):.150}"
        )
    column = frame[name]
    if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Object, pl.Duration):
        raise UserError(
            f"{where}: column {name!r:.60} holds {column.dtype}; give a number or a text in each cell"
        )
    return column


def _numeric_field(name: str, values: np.ndarray, scale: bool) -> NumericField:
    known = values[~np.isnan(values)]
    if known.size == 0:
        return NumericField(name, quantiles=(0.0,) * (N_BINS + 1))
    quantiles = tuple(np.quantile(known, np.linspace(0, 1, N_BINS + 1)).tolist())
    if not scale:
        return NumericField(name, quantiles=quantiles)
    # Not `std > 0`: by rounding, a constant column has a deviation of about 1e-17.
    std = float(known.std()) if known.min() < known.max() else 1.0
    return NumericField(name, float(known.mean()), std, quantiles)


def as_frame(table: Any, where: str) -> pl.DataFrame:
    """Return a Polars data frame of a Polars, pandas or Arrow table, or of a mapping of columns.

    Args:
        table: The table.
        where: Its name in messages.

    Raises:
        UserError: It is not a table.
    """
    if isinstance(table, pl.DataFrame):
        return table
    if isinstance(table, pl.LazyFrame):
        return table.collect()
    readable = isinstance(table, Mapping) or hasattr(table, "__arrow_c_stream__")
    try:
        if readable or type(table).__module__.partition(".")[0] == "pandas":
            return pl.DataFrame(dict(table) if isinstance(table, Mapping) else table)
    except ImportError:  # pandas without pyarrow, which polars needs to convert its columns
        plain = table.astype(object).where(table.notna(), None)
        cells = {str(name): plain[name].tolist() for name in plain.columns}
        return pl.DataFrame(cells, strict=False)
    except (TypeError, ValueError, AttributeError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{where}: not a readable table ({str(error).splitlines()[0]})") from error
    raise UserError(
        f"{where}: expected a Polars or pandas data frame, got {type(table).__name__}; make one of it"
    )
