"""Write docs/options.md: every option of every group, from the configs and the classes they name.

A default and a type come from the signature of the class, a description from the ``Args`` of its docstring.

python scripts/options_page.py [--check]
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import recsys_ssm
from recsys_ssm.instantiate import _holds, _parameters, _type_name, import_target

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "options.md"

GROUPS = {
    "dataset": "The data. A dataset chooses the task.",
    "task": "The kind of model. A dataset sets it, so it is hardly ever given by hand.",
    "tokenizer": "Turns one side of a batch into tokens.",
    "backbone": "Mixes the tokens. Letters: D is `d_model`, the width of a token; N `d_state`, the size of a\n"
    "channel's state; W `d_conv`, the width of the convolution; E the inner channels, `expand` times D; P `headdim`,\n"
    "the width of a head; G `ngroups`, the groups of heads that share B and C.",
    "head": "Turns the backbone's outputs into embeddings.",
    "loss": "Compares scores with targets.",
    "optimizer": "Updates the weights.",
    "scheduler": "Changes the learning rate from step to step.",
    "text": "Where the language model of a recommender that reads titles comes from.",
    "trainer": "Lightning's trainer, in other settings than one process.",
    "callbacks": "Lightning callbacks, beside those that every run has.",
    "logger": "Where the metrics go while a run trains.",
    "launcher": "Where the jobs of a sweep run.",
    "experiment": "A row or a table of a paper, or a recipe of this project: one option for many.",
    "debug": "Small runs that look for a defect.",
}
"""Groups in the order of the page. Presets and recipes are chosen by the others."""

INTRODUCTION = """\
# Options

*This page is written by `python scripts/options_page.py`. Do not edit it.*

An option is given as `name=value`: `python -m recsys_ssm.train dataset=ml_100k backbone.d_model=32`. A group chooses
an object (`backbone=mamba`), and the options of the group are the arguments of its class (`backbone.d_state=32`).
Defaults stand in the signatures of the classes; a config file names only what deviates from them. Two flags show
where a value comes from, without running anything:

```bash
python -m recsys_ssm.train dataset=ml_100k backbone=mamba2 --cfg job         # the whole config, defaults included
python -m recsys_ssm.train dataset=ml_100k backbone=mamba2 --info defaults   # the files that it is made of
```

A file of the same layout in a folder of your own is a choice as well: `--config-dir my_conf backbone=my_backbone`
reads `my_conf/backbone/my_backbone.yaml` (see [A new backbone](tutorials/new_backbone.md)).
"""


class Option(NamedTuple):
    """An argument of a class, as a row of a table."""

    name: str
    default: Any
    type: str
    meaning: str


def page() -> str:
    """Return the text of docs/options.md."""
    parts = [INTRODUCTION, "## Options of a run", *run_options(CONF / "train.yaml")]
    for group, purpose in GROUPS.items():
        if (CONF / group).is_dir():
            parts += [f"## `{group}`", purpose, *group_section(group)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def run_options(path: Path) -> list[str]:
    """Return a table of the top-level values of a config, with the comments above them."""
    rows, comment = [], ""
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            comment = f"{comment} {line[2:]}".strip()
        elif match := re.match(r"(\w+): +([^#\n]+?)(?:\s+# (.*))?$", line):
            name, value, beside = match.groups()
            rows.append((f"`{name}`", f"`{value}`", plain(beside or comment)))
            comment = ""
        else:
            comment = ""
    return [table(("option", "default", "meaning"), rows)]


def group_section(group: str) -> list[str]:
    """Return a group's choices, and the options of each class that they name."""
    choices, classes = [], {}
    for path in sorted((CONF / group).rglob("*.yaml")):
        name = path.relative_to(CONF / group).with_suffix("").as_posix()
        values = yaml.safe_load(path.read_text()) or {}
        choices.append((f"`{group}={name}`", plain(first_comment(path))))
        for owner, spec in specs_of(group, values):
            classes.setdefault((owner, spec["_target_"]), []).append(name)
    parts = [table(("choice", "meaning"), choices)]
    for (owner, target), names in classes.items():
        parts += class_section(group, owner, target, names)
    return parts


def specs_of(group: str, values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the specs whose options a group's page describes, each with the option it belongs to."""
    if group == "task":
        yield "model", values["model"]
    elif group in ("trainer", "launcher", "experiment", "debug"):
        return
    elif "_target_" in values:
        if values["_target_"] is not None:
            yield group, values
    else:
        for name, node in values.items():
            if isinstance(node, dict) and node.get("_target_"):
                yield f"{group}.{name}", node


def class_section(group: str, owner: str, target: str, names: list[str]) -> list[str]:
    """Return the heading and the table of one class's options."""
    chosen = ", ".join(f"`{group}={name}`" for name in names)
    heading = f"### {target.rpartition('.')[2]}: {chosen}"
    given = f"Options are given as `{owner}.<option>=<value>`."
    if not target.startswith("recsys_ssm."):
        return [heading, f"{given}\nEvery argument of `{target}` is one."]
    found = import_target(target, "options")
    options = options_of(found)
    if not options:
        return [heading, "It has no options."]
    rows = [(f"`{o.name}`", f"`{spell(o.default)}`", o.type, o.meaning) for o in options]
    return [heading, given, table(("option", "default", "type", "meaning"), rows)]


def options_of(target: Callable[..., Any]) -> list[Option]:
    """Return the arguments of a class or function that a config can hold."""
    parameters, hints = _parameters(target)
    meanings = argument_texts(target)
    return [
        Option(
            name,
            parameter.default,
            _type_name(hints[name]).replace("|", "or"),
            meanings.get(name, "D." if name == "d_model" else ""),
        )
        for name, parameter in parameters.items()
        if name != "**"
        and parameter.default is not inspect.Parameter.empty
        and _holds(hints.get(name, Any))
    ]


def argument_texts(
    target: Callable[..., Any], seen: frozenset[Any] = frozenset()
) -> dict[str, str]:
    """Return the first sentence on each argument from the docstrings of a class and of its bases.

    Where a docstring only refers to another class (``As :class:`Stack`.``), that class's sentence is returned.
    """
    found: dict[str, str] = {}
    for each in getattr(target, "__mro__", (target,)):
        for name, text in docstring_entries(each).items():
            if refers := re.match(r"(?:As|See)(?: in)? :class:`~?(?:[\w.]*\.)?(\w+)`", text):
                other = getattr(sys.modules[each.__module__], refers[1], None)
                other = other or getattr(recsys_ssm, refers[1], None)
                around = seen | {target}  # classes that refer to each other
                known = other is None or other in around
                text = "" if known else argument_texts(other, around).get(name, "")
            if text and name not in found:
                found[name] = plain(first_sentence(text))
    return found


def docstring_entries(target: Any) -> dict[str, str]:
    """Return the text on each argument from one docstring."""
    section = re.search(
        r"^Args:\n((?: {4}.*\n?|\n)*)", inspect.cleandoc(target.__doc__ or ""), re.MULTILINE
    )
    found = {}
    for entry in re.findall(
        r"^ {4}(\S.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE
    ):
        names, _, text = entry.partition(":")
        found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(text.split()))
    return found


def first_sentence(text: str) -> str:
    """Return a text up to the end of its first sentence."""
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", text)[0]


def first_comment(path: Path) -> str:
    """Return the comment that a config begins with."""
    lines = []
    for line in path.read_text().splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def plain(text: str) -> str:
    """Return a docstring's or a comment's text as Markdown that can stand in a table."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?([\w]+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|").strip()


def spell(value: Any) -> str:
    """Return a default as it is given on the command line."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(spell, value))}]"
    return (
        {None: "null", True: "true", False: "false"}[value]
        if isinstance(value, bool | None)
        else str(value)
    )


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return rows as a table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the page is out of date"
    )
    text = page()
    if parser.parse_args().check:
        if not PAGE.is_file() or PAGE.read_text() != text:
            sys.exit("docs/options.md is out of date; run python scripts/options_page.py")
        return
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
