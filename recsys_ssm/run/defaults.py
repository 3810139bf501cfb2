"""Read the options of a run's config, defaults included, without running any of its code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from recsys_ssm import instantiate

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
    """Return a run's config with the defaults of the classes that may be looked into (:func:`known_class`)."""
    try:
        filled: dict[str, Any] = instantiate.with_defaults(config, trusted=False)
    except (TypeError, ValueError):  # a path that names something without a signature
        return dict(config)
    return filled


def option(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """Return the value at a dotted path of a config; ``default`` where there is none."""
    node: Any = config
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node
