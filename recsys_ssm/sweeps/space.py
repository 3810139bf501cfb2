"""Read the options of a search: ranges and choices from a config, values as overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import suggest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_KEYS = ("choices", "high", "log", "low", "step")
_EXAMPLES = "{low: 1e-5, high: 1e-3, log: true} or {choices: [16, 32]}"


def flatten_space(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested mapping as dotted options; an option that is null is left out.

    Raises:
        UserError: ``space`` is not a mapping.
    """
    if not isinstance(space, Mapping):
        raise UserError(
            f"search.space={space}: not options with their ranges; give search.space.<option>={_EXAMPLES}"
        )
    found: dict[str, Any] = {}
    for key, node in space.items():
        if isinstance(node, Mapping) and not _is_dimension(node):
            inner = flatten_space(node)
            found |= {f"{key}.{option}": value for option, value in inner.items()}
        elif node is not None:
            found[str(key)] = node
    return found


def _is_dimension(node: Mapping[str, Any]) -> bool:
    return any(key in _KEYS and not isinstance(value, Mapping) for key, value in node.items())


def distribution(option: str, node: Any) -> BaseDistribution:
    """Return the Optuna distribution that ``node`` describes.

    Choices are kept as they are spelled in an override, so that each may be any value of a config.

    Raises:
        UserError: ``node`` is not a range or a list of choices.
    """
    from optuna import distributions

    where = f"search.space.{option}"
    if isinstance(node, list):
        node = {"choices": node}
    if not isinstance(node, Mapping):
        raise UserError(f"{where}={node}: neither a range nor choices; give {_EXAMPLES}")
    for key in node:
        if key not in _KEYS:
            raise UserError(f"{where}.{key}: unknown; {suggest(str(key), _KEYS)}")
    if "choices" in node:
        choices = node["choices"]
        if len(node) > 1 or not isinstance(choices, list) or not choices:
            raise UserError(f"{where}: expected only a list of choices; give {{choices: [16, 32]}}")
        return distributions.CategoricalDistribution(list(dict.fromkeys(map(spell, choices))))
    low, high = (_number(f"{where}.{key}", node.get(key)) for key in ("low", "high"))
    step = None if node.get("step") is None else _number(f"{where}.step", node["step"])
    log = node.get("log") or False
    if not isinstance(log, bool):
        raise UserError(f"{where}.log={spell(log)}: expected true or false")
    try:
        if isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
            return distributions.IntDistribution(low, high, log=log, step=step or 1)
        return distributions.FloatDistribution(low, high, log=log, step=step)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _number(where: str, value: Any) -> int | float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{where}={spell(value)}: expected a number; give {_EXAMPLES}")
    return value


def spell(value: Any) -> str:
    """Return a value as an override spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        is_plain = re.fullmatch(r"[A-Za-z_][\w./-]*", value) and value.lower() not in _WORDS
        return value if is_plain else "'{}'".format(value.replace("\\", "\\\\").replace("'", "\\'"))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{spell(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(spell, value)) + "]"
    return repr(value)


_WORDS = ("null", "true", "false", "nan", "inf")
