"""Write the help of a command: its options with one line each, read from its config."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from recsys_ssm.paths import CONF_DIR

GROUPS = {
    "dataset": "data to train on; it chooses the task",
    "task": "task of the model, usually chosen by the dataset",
    "backbone": "sequence model",
    "tokenizer": "embedding of users and items",
    "head": "output of the backbone",
    "loss": "training loss",
    "optimizer": "optimizer",
    "scheduler": "schedule of the learning rate",
    "text": "language model of a recommender that reads titles",
    "trainer": "processes of the training",
    "callbacks": "Lightning callbacks to add",
    "logger": "place to log to",
    "launcher": "way to run the jobs of a sweep",
    "experiment": "published experiment, with all its options",
    "debug": "short run to look for a fault",
}
"""Groups of options that a user chooses from, in the order of the help."""

_WIDTH = 100


class _Option(NamedTuple):
    name: str
    default: str
    about: str


def help_text(config_name: str) -> str:
    """Return the help of a command.

    Args:
        config_name: Name of the command, which is also that of its config.
    """
    usage = f"python -m recsys_ssm.{config_name} option=value …"
    bases = _bases(config_name)
    parts = [usage]
    seen: set[str] = set()
    for name in (config_name, *bases):
        options = [
            option for option in _options(CONF_DIR / f"{name}.yaml") if option.name not in seen
        ]
        seen |= {option.name for option in options}
        heading = "Options:" if name == config_name else f"Options of recsys_ssm.{name}:"
        if name == "train":
            parts.append("\n".join(["Choices:", *_groups()]))
        if options:
            parts.append(
                "\n".join([heading, *(line for each in options for line in _lines(*each))])
            )
    flags = [
        "--cfg job  print the whole config, defaults included, and exit",
        "--help     print this",
    ]
    if "train" in (config_name, *bases):
        flags.insert(
            0,
            "--multirun run every combination of comma-separated values: seed=0,1 backbone=mamba,hydra",
        )
    parts.append("\n".join(["Flags:", *(f"  {flag}" for flag in flags)]))
    return "\n\n".join(parts)


def _bases(config_name: str) -> list[str]:
    """Return the configs of other commands that a command's config includes."""
    defaults = yaml.safe_load((CONF_DIR / f"{config_name}.yaml").read_text()).get("defaults", [])
    return [each for each in defaults if isinstance(each, str) and each != "_self_"]


def _options(path: Path) -> Iterator[_Option]:
    """Yield the options of a config, with the comment above each."""
    comment: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            comment.append(line[2:].strip())
            continue
        found = re.match(r"(\w+):\s*(.*)", line)
        if found and found[1] not in ("defaults", "hydra"):
            default = found[2].partition("  #")[0].strip()
            about = re.split(r"(?<=[.:])\s", " ".join(comment), maxsplit=1)[0] if comment else ""
            about = " ".join(comment) if len(" ".join(comment)) < 3 * _WIDTH else about
            is_group = not default and found[1] != "dataset"
            yield _Option(found[1] + (".…" if is_group else ""), default, about)
        comment = []


def _groups() -> Iterator[str]:
    for name, about in GROUPS.items():
        folder = CONF_DIR / name
        names = sorted(
            str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")
        )
        shown = names if len(names) < 14 else [*names[:6], "…"]
        yield from _lines(name, "", f"{about}: {', '.join(shown)}")


def _lines(name: str, default: str, about: str) -> list[str]:
    """Return an option and its explanation, indented and wrapped."""
    head = f"  {name}={default}" if default and len(default) < 30 else f"  {name}"
    width = 30
    if not about:
        return [head]
    wrapped = textwrap.wrap(about, _WIDTH - width, break_on_hyphens=False, break_long_words=False)
    first = (
        f"{head:<{width}}{wrapped[0]}"
        if len(head) < width
        else f"{head}\n{' ' * width}{wrapped[0]}"
    )
    return [first, *(" " * width + line for line in wrapped[1:])]
