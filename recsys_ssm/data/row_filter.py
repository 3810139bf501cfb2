"""Filter the rows of a table by a short expression: ``event_type == "purchase" and price > 3``.

The expression is parsed as Python's grammar has it, and only comparisons of a column with values, ``and``, ``or`` and
``not`` are accepted: nothing is evaluated as code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import polars as pl

from recsys_ssm.data.columns import parse_dates
from recsys_ssm.data.files import shown
from recsys_ssm.errors import UserError

_ORDER: dict[type[ast.cmpop], Callable[[pl.Expr, Any], pl.Expr]] = {
    ast.Lt: lambda column, value: column < value,
    ast.LtE: lambda column, value: column <= value,
    ast.Gt: lambda column, value: column > value,
    ast.GtE: lambda column, value: column >= value,
}
_WORDS = {"null": None, "none": None, "true": True, "false": False}
_MOST = 2000
_FORM = (
    'write like event_type == "purchase" and price > 3; == != < <= > >= in, and, or, not are known'
)


@dataclass(frozen=True)
class RowFilter:
    """A parsed filter.

    Args:
        text: The expression. A column whose name is not a word is written between backticks.

    Raises:
        UserError: It is not such an expression.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise self._wrong("not a text")
        _ = self.columns

    @property
    def columns(self) -> list[str]:
        """The columns that are compared, each once."""
        found: dict[str, None] = {}
        tree, names = self._parse()
        try:
            self._walk(tree, names, found, None, "")
        except RecursionError as error:
            raise self._wrong("too deep") from error
        return list(found)

    def mask(self, frame: pl.DataFrame, where: str) -> pl.Series:
        """Return which rows of a table fulfil the expression; a missing cell fulfils ``!=`` alone.

        Raises:
            UserError: A column is compared with values of another kind.
        """
        tree, names = self._parse()
        wanted = self._walk(tree, names, {}, frame, where)
        try:
            return frame.select(mask=wanted)["mask"]
        except pl.exceptions.PolarsError as error:
            raise self._wrong(
                f"does not fit the columns ({str(error).splitlines()[0]:.100})"
            ) from error

    def _wrong(self, what: str) -> UserError:
        return UserError(f"dataset.filter={shown(self.text, 80)}: {what}; {_FORM}")

    def _parse(self) -> tuple[ast.expr, dict[str, str]]:
        """Return the tree, and the names of columns by their placeholders."""
        if len(self.text) > _MOST:
            raise self._wrong(f"longer than {_MOST} characters")
        names: dict[str, str] = {}

        def placeholder(match: re.Match[str]) -> str:
            if match[1] is None:  # a text
                return match[0]
            name = f"_column_{len(names)}_"
            names[name] = match[1]
            return name

        text = re.sub(r"""'[^']*'|"[^"]*"|`([^`]+)`""", placeholder, self.text)
        try:
            return ast.parse(text.strip(), mode="eval").body, names
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._wrong("cannot be read") from error

    def _walk(
        self,
        node: ast.expr,
        names: dict[str, str],
        found: dict[str, None],
        frame: pl.DataFrame | None,
        where: str,
    ) -> pl.Expr:
        """Return a node as a polars expression that is never null; columns are added to ``found``."""

        def walk(inner: ast.expr) -> pl.Expr:
            return self._walk(inner, names, found, frame, where)

        match node:
            case ast.BoolOp(op=ast.And()):
                return pl.all_horizontal([walk(value) for value in node.values])
            case ast.BoolOp(op=ast.Or()):
                return pl.any_horizontal([walk(value) for value in node.values])
            case ast.UnaryOp(op=ast.Not()):
                return ~walk(node.operand)
            case ast.Compare(left=ast.Name(), ops=[operator], comparators=[right]):
                assert isinstance(node.left, ast.Name)
                column = names.get(node.left.id, node.left.id)
                found[column] = None
                value = self._value(right)
                if frame is None:
                    return pl.lit(value=True)
                return self._compare(column, operator, value, frame, where)
        raise self._wrong("only comparisons of a column with values are possible")

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str() | int() | float() | None):
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.Name() if node.id.lower() in _WORDS:
                return _WORDS[node.id.lower()]
            case ast.List() | ast.Tuple():
                return [self._value(one) for one in node.elts]
        raise self._wrong("a column is compared with something else than a text or a number")

    def _compare(
        self, column: str, operator: ast.cmpop, value: Any, frame: pl.DataFrame, where: str
    ) -> pl.Expr:
        many = isinstance(operator, ast.In | ast.NotIn)
        if many != isinstance(value, list) or (value is None and type(operator) in _ORDER):
            raise self._wrong(f"{column} is compared with {shown(value)}")
        values = value if many else [value]
        cells, values = self._alike(frame[column], values, where)
        expression = pl.lit(cells)
        if type(operator) in _ORDER:
            return _ORDER[type(operator)](expression, values[0]).fill_null(value=False)
        equal = pl.any_horizontal(
            [expression.is_null() if one is None else expression.eq_missing(one) for one in values]
            or [pl.lit(pl.repeat(False, frame.height, eager=True))]
        )
        return ~equal if isinstance(operator, ast.NotEq | ast.NotIn | ast.IsNot) else equal

    def _alike(
        self, cells: pl.Series, values: list[Any], where: str
    ) -> tuple[pl.Series, list[Any]]:
        """Return a column and the values that it is compared with as one kind."""
        known = [one for one in values if one is not None]
        column = cells.name
        if cells.dtype.is_nested() or cells.dtype in (pl.Binary, pl.Object):
            raise self._wrong(f"column {shown(column)} holds {cells.dtype}")
        if all(isinstance(one, bool) for one in known) and cells.dtype == pl.Boolean:
            return cells, values
        if (
            known
            and all(isinstance(one, int | float) for one in known)
            and not (cells.dtype.is_temporal() or cells.dtype == pl.Boolean)
        ):
            if cells.dtype.is_numeric():
                return cells, values
            text = cells.cast(pl.String).str.strip_chars().replace("", None)
            numbers = text.cast(pl.Float64, strict=False)
            wrong = (numbers.is_null() & text.is_not_null()).arg_true()
            if wrong.len():
                raise UserError(
                    f"{where}, row {wrong[0] + 1}, column {shown(column)}: {shown(text[int(wrong[0])])} is not a "
                    "number; compare with a text in dataset.filter, or correct the cell"
                )
            return numbers, values
        if all(isinstance(one, str) for one in known):
            if isinstance(cells.dtype, pl.Date | pl.Datetime):
                dates = parse_dates(pl.Series([str(one) for one in known], dtype=pl.String))
                if dates.null_count():
                    raise self._wrong(f"{column} has dates: compare with YYYY-MM-DD hh:mm:ss")
                found = dict(zip(known, dates.to_list(), strict=True))
                return (
                    cells.cast(pl.Datetime("us")).to_physical(),
                    [None if one is None else found[one] for one in values],
                )
            if isinstance(cells.dtype, pl.String | pl.Categorical | pl.Enum):
                return cells.cast(pl.String).replace("", None), values
            if cells.dtype.is_numeric() and known:
                raise self._wrong(f"column {shown(column)} has numbers: compare with numbers")
            if not known:
                return cells, values
        raise self._wrong(f"column {shown(column)} holds {cells.dtype}, not such values")
