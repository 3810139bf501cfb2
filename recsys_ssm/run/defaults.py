"""Fill in the defaults of a run's options from the signatures of its classes, without running any of its code."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from recsys_ssm.instantiate import _parameters

_OURS = "recsys_ssm."


def known_class(target: object) -> type | None:
    """Return the class at a dotted path; None if its module is neither ours nor imported already.

    A path in a run's folder is a stranger's text: it never makes this process import a module of theirs.
    """
    module_name, _, name = str(target).rpartition(".")
    if module_name.startswith(_OURS):
        try:
            importlib.import_module(module_name)
        except ImportError:
            return None
    found = vars(sys.modules[module_name]).get(name) if module_name in sys.modules else None
    return found if isinstance(found, type) else None


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the default of every argument that a known class has and the config leaves out."""
    filled = {
        key: with_defaults(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    target = known_class(config["_target_"]) if "_target_" in config else None
    if target is not None:
        filled = dict(_defaults(target)) | filled
    return filled


@functools.cache
def _defaults(target: type) -> dict[str, Any]:
    parameters = _parameters(target)[0].items()
    return {name: each.default for name, each in parameters if _is_plain(each.default)}


def option(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """Return the value at a dotted path of a config; ``default`` where there is none."""
    node: Any = config
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    is_scalar = value is None or isinstance(value, bool | int | float | str)
    return is_scalar and value is not inspect.Parameter.empty
