"""What a run was made of, as flat ``option -> value``, without what its figures do not depend on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recsys_ssm.errors import UserError

Settings = dict[str, Any]

_MOST_VALUES = 100_000

_INCIDENTAL = re.compile(
    r"(name|seed|sweep|tags|versions|published|published_by_cell|published_by_dataset|output_\w+|ckpt_path|test|debug"
    r"|logger|launcher|search|callbacks|metrics|dataset\.(seed|root|cache_dir|eval_batch_size)"
    r"|trainer\.(accelerator|devices|default_root_dir|enable_\w+|log_every_n_steps|profiler|num_nodes|deterministic))"
    r"(\..*)?"
)


def settings(config: Mapping[str, Any]) -> Settings:
    """A run's config, flattened to dotted options, without names, places, logging and the seed."""
    return {key: value for key, value in flatten(config) if not _INCIDENTAL.fullmatch(key)}


def read_settings(path: Path) -> Settings:
    """The settings in a run's ``config.yaml``.

    Raises:
        UserError: It is not there, or no YAML mapping.
    """
    return settings(read_config(path))


def read_config(path: Path) -> dict[str, Any]:
    """A run's ``config.yaml``.

    Raises:
        UserError: It is not there, or no YAML mapping.
    """
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the options of a run")
    if _size(config, _MOST_VALUES) > _MOST_VALUES:
        raise UserError(
            f"{path}: more than {_MOST_VALUES:,} options; it is not the config of a run"
        )
    return config


def _size(node: Any, limit: int) -> int:
    """Count the values of a config, up to just above ``limit``; a value that YAML aliases repeat counts each time."""
    pending, count = [node], 0
    while pending and count <= limit:
        each = pending.pop()
        count += 1
        if isinstance(each, Mapping):
            pending += each.values()
        elif isinstance(each, list):
            pending += each
    return count


def differences(first: Settings, second: Settings) -> dict[str, tuple[Any, Any]]:
    """Options that both have and that differ. What only one has came or went with a version of the code."""
    return {
        key: (first[key], second[key])
        for key in sorted(first.keys() & second.keys())
        if first[key] != second[key]
    }


def flatten(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the values of nested mappings with their dotted names."""
    if not isinstance(node, Mapping):
        return [(prefix, node)]
    return [
        pair
        for key, value in node.items()
        for pair in flatten(value, f"{prefix}.{key}" if prefix else str(key))
    ]


# The C loader is ten times as fast: reports read hundreds of these.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
