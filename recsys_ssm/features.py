"""Features of users and items: from named, typed columns to tensors, and the schema that says how.

A :class:`FeatureSchema` is the whole recipe (columns, scaling, vocabularies); it is plain data, travels inside a
checkpoint and encodes tables the training never saw.

Shapes: B rows, Fn numeric features, Fc categorical features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import polars as pl
import torch
from torch import Tensor

from recsys_ssm.errors import UserError

MISSING = 0
"""Code of a missing (or never seen) value of a categorical feature; the known values start at 1."""


class Features(NamedTuple):
    """Encoded rows of one side (users or items)."""

    numeric: Tensor
    """(B, Fn) float32, scaled; 0, the mean, where the value is missing."""
    categorical: Tensor
    """(B, Fc) int64; :data:`MISSING` or 1 + the position in the field's vocabulary."""

    @property
    def n_rows(self) -> int:
        return self.numeric.shape[0]

    def rows(self, index: Tensor | slice) -> Features:
        """The rows at ``index`` (1-D integers or a slice)."""
        return Features(self.numeric[index], self.categorical[index])

    def to(self, device: torch.device | str) -> Features:
        return Features(self.numeric.to(device), self.categorical.to(device))


@dataclass(frozen=True)
class NumericField:
    """A numeric column; encoded as ``(value - mean) / std``."""

    name: str
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class CategoricalField:
    """A categorical column; ``values[i]`` has code ``i + 1``, everything else is :data:`MISSING`."""

    name: str
    values: tuple[str, ...]

    @property
    def n_codes(self) -> int:
        """Rows an embedding table needs: the known values and the missing one."""
        return len(self.values) + 1


@dataclass(frozen=True)
class FeatureSchema:
    """How the columns of a table become :class:`Features`."""

    numeric: tuple[NumericField, ...] = ()
    categorical: tuple[CategoricalField, ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise UserError(f"column {twice[0]!r} is named twice among the features: name it once")

    @property
    def names(self) -> list[str]:
        return [field.name for field in (*self.numeric, *self.categorical)]

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
        """Learn scaling and vocabularies from ``frame`` (the rows training may look at).

        Args:
            frame: One row a user or item.
            numeric: Columns read as numbers; with ``scale`` they are standardised to mean 0, deviation 1.
            categorical: Columns read as categories (their values as text, sorted).
            where: What to call the table in messages, a file name at best.

        Raises:
            UserError: A column is absent or holds something that is no finite number.
        """
        fields = []
        for name in numeric:
            values = numeric_column(frame, name, where)
            known = values[~np.isnan(values)]
            std = float(known.std()) if known.size else 1.0
            fields.append(
                NumericField(name, float(known.mean()) if known.size else 0.0, std if std > 0 else 1.0)
                if scale
                else NumericField(name)
            )
        vocabularies = [
            CategoricalField(name, tuple(text_column(frame, name, where).drop_nulls().unique().sort()))
            for name in categorical
        ]
        return cls(tuple(fields), tuple(vocabularies))

    def encode(self, frame: pl.DataFrame, *, where: str = "the table") -> Features:
        """``frame``'s rows as tensors; a null, or a category the schema does not know, becomes *missing*.

        Raises:
            UserError: A column is absent or holds something that is no finite number.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, for checkpoints and JSON."""
        return {
            "numeric": [asdict(field) for field in self.numeric],
            "categorical": [
                {"name": field.name, "values": list(field.values)} for field in self.categorical
            ],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        return cls(
            tuple(NumericField(**field) for field in plain["numeric"]),
            tuple(
                CategoricalField(field["name"], tuple(field["values"])) for field in plain["categorical"]
            ),
        )


def numeric_column(frame: pl.DataFrame, name: str, where: str) -> np.ndarray:
    """Column ``name`` as float64, NaN where the cell is empty.

    Raises:
        UserError: No such column, or a cell that is text, NaN or infinite; the message names file, row and column.
    """
    column = _column(frame, name, where)
    numbers = column.cast(pl.Float64, strict=False)
    wrong = (numbers.is_null() & column.is_not_null()) | ~numbers.is_finite().fill_null(True)
    if (row := wrong.arg_max()) is not None and wrong[row]:
        raise UserError(
            f"{where}, row {row + 1}, column {name!r}: {column[row]!r} is not a finite number; "
            "correct it, leave it empty if it is unknown, or list the column as categorical"
        )
    return numbers.fill_null(math.nan).to_numpy()


def text_column(frame: pl.DataFrame, name: str, where: str) -> pl.Series:
    """Column ``name`` as text, null where the cell is empty."""
    return _column(frame, name, where).cast(pl.String)


def _column(frame: pl.DataFrame, name: str, where: str) -> pl.Series:
    if name not in frame.columns:
        raise UserError(f"{where}: no column {name!r}; its columns are {', '.join(frame.columns)}")
    return frame[name]
