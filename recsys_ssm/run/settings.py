"""List the options that a result does not depend on, and read a run's other options as flat ``option -> value``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from recsys_ssm.errors import UserError

Settings = dict[str, Any]

_MOST_VALUES = 100_000
_MOST_LEVELS = 50
_MOST_BYTES = 10_000_000

Use = Literal["job", "setting", "command"]
"""A purpose that options are left out for (:func:`is_incidental`):

- ``job``: two jobs of a sweep are the same job, which leaves the same files;
- ``setting``: two runs are seeds of one setting, whose figures belong in one mean;
- ``command``: a published command, which someone else runs elsewhere.
"""

_JOB: tuple[Use, ...] = ("job", "setting", "command")
_PUBLISHED: tuple[Use, ...] = ("setting", "command")
_SETTING: tuple[Use, ...] = ("setting",)

# An option, or a group of options, and the uses it is left out for.
_INCIDENTAL: dict[str, tuple[Use, ...]] = {
    # where a run is kept, what it is called, how it is started and logged
    "ckpt_path": _JOB,
    "hydra": _JOB,
    "import": _JOB,
    "launcher": _JOB,
    "logger": _JOB,
    "name": _JOB,
    "output_dir": _JOB,
    "output_root": _JOB,
    "search": _JOB,
    "sweep": _JOB,
    "tags": _JOB,
    "versions": _JOB,
    # figures that are only printed beside the run's
    "published": _JOB,
    "published_by_cell": _JOB,
    "published_by_dataset": _JOB,
    # what is shown and kept on the way
    "callbacks.checkpoint.dirpath": _JOB,
    "callbacks.checkpoint_last": _JOB,
    "callbacks.learning_rate_monitor": _JOB,
    "callbacks.progress": _JOB,
    "dataset.cache_dir": _JOB,
    "trainer.default_root_dir": _JOB,
    "trainer.enable_model_summary": _JOB,
    "trainer.enable_progress_bar": _JOB,
    # the machine: a sweep may compare two of them, so each is a job of its own
    "dataset.eval_batch_size": _PUBLISHED,
    "dataset.root": _PUBLISHED,
    "ops": _PUBLISHED,
    "trainer.accelerator": _PUBLISHED,
    "trainer.deterministic": _PUBLISHED,
    "trainer.log_every_n_steps": _PUBLISHED,
    "trainer.profiler": _PUBLISHED,
    # the seeds of a setting; a published command names them itself
    "seed": _PUBLISHED,
    "seeds": _PUBLISHED,
    "train.seeds": _PUBLISHED,
    # where the retriever's run is; retrieved_by has its options
    "retriever": _SETTING,
    # another seed of the data than the run's is part of the command
    "dataset.seed": _SETTING,
    # how the trained model is measured
    "metrics": _SETTING,
    "test": _SETTING,
}


def is_incidental(option: str, use: Use) -> bool:
    """Return True if a result does not depend on ``option``, for a use of it.

    Args:
        option: A dotted option, ``trainer.max_steps``, or the key of an override: ``+``, ``++`` or ``~`` before it
            and ``@package`` behind it do not matter.
        use: See :data:`Use`.
    """
    parts = re.split(r"[./]", option.lstrip("+~").partition("@")[0])
    heads = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return any(use in _INCIDENTAL.get(head, ()) for head in heads)


def settings(config: Mapping[str, Any]) -> Settings:
    """Return a run's config as dotted options, without those that its figures do not depend on."""
    return {key: value for key, value in flatten(config) if not is_incidental(key, "setting")}


def read_settings(path: Path) -> Settings:
    """Return the settings in a run's ``config.yaml``.

    Raises:
        UserError: The file is absent, or is not a YAML mapping.
    """
    return settings(read_config(path))


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's ``config.yaml``.

    Raises:
        UserError: The file is absent, or is not a YAML mapping.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path}: not the config.yaml of a run; give the folder of a run")
        text = path.read_text(encoding="utf-8")
        _check_depth(text)
        config = yaml.load(text, Loader=_LOADER)  # noqa: S506
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{path}: cannot be read ({reason}); give the folder of another run"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the options of a run; give the folder of a run")
    if _size(config, _MOST_VALUES) > _MOST_VALUES:
        raise UserError(
            f"{path}: more than {_MOST_VALUES:,} options, or nested too deeply; give the folder of a run"
        )
    return config


def _check_depth(text: str) -> None:
    """Check that YAML is not nested deeply: the C loader is recursive, and would end the process.

    Raises:
        RecursionError: It is.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):  # a loop, not a recursion
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise RecursionError(f"nested more than {_MOST_LEVELS} levels deep")


def _size(node: Any, limit: int) -> int:
    """Count the values of a config, up to just above ``limit``; a value that YAML aliases repeat counts each time."""
    pending, count = [(node, 0)], 0
    while pending and count <= limit:
        each, depth = pending.pop()
        count += 1
        if depth > _MOST_LEVELS:
            return limit + 1
        values = each.values() if isinstance(each, Mapping) else each
        if isinstance(each, Mapping | list):
            pending += [(value, depth + 1) for value in values]
    return count


def differences(first: Settings, second: Settings) -> dict[str, tuple[Any, Any]]:
    """Return the options that both have and that differ; an option of one alone belongs to another version."""
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


# The C loader is ten times as fast, and reports read hundreds of files.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
