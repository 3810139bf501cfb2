"""Every page's links lead somewhere, its lines can be reviewed, and its commands compose."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from pages import PAGES, ROOT, blocks, commands, links, name, prose

import recsys_ssm

COMMAND_PAGES = [page for page in PAGES if name(page) != "docs/results.md"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    broken = [str(link) for link in links(page) if not link.exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_line_is_over_120_characters(page: Path) -> None:
    long = [
        f"{number}: {len(line)}"
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > 120 and not line.startswith("|")
    ]
    assert not long


def one_job(arguments: list[str]) -> list[str]:
    """Return the arguments of the first job of a sweep."""
    found = []
    for argument in arguments:
        if argument in ("--multirun", "-m"):
            continue
        if "=" in argument and not argument.startswith("-"):
            override = OverridesParser.create().parse_overrides([argument])[0]
            if override.is_sweep_override():
                key = argument.partition("=")[0]
                argument = f"{key}={next(iter(override.sweep_string_iterator()))}"
        found.append(argument)
    return found


def of_package() -> list[tuple[str, str, list[str]]]:
    """Return page, command and arguments of everything that the pages run with ``python -m recsys_ssm.…``."""
    found = []
    for page in COMMAND_PAGES:
        for words in commands(page):
            words = words[: words.index("|")] if "|" in words else words
            if words[:2] == ["python", "-m"] and words[2].startswith("recsys_ssm."):
                found.append((name(page), words[2].removeprefix("recsys_ssm."), words[3:]))
    return found


COMMANDS = of_package()


def test_commands_are_found() -> None:
    assert len({page for page, _, _ in COMMANDS}) > 5
    assert {command for _, command, _ in COMMANDS} >= {"train", "evaluate", "recommend", "report"}


@pytest.mark.parametrize(
    ("page", "command", "arguments"),
    COMMANDS,
    ids=[f"{page}: {command} {shlex.join(rest)}" for page, command, rest in COMMANDS],
)
def test_a_command_composes(
    page: str, command: str, arguments: list[str], cli: Callable[..., object], tmp_path: Path
) -> None:
    if "--config-dir" in arguments:
        pytest.skip("the page makes that folder, and its own test runs the command")
    if {"--info", "--cfg"} & set(arguments):
        arguments = arguments[
            : min(arguments.index(f) for f in ("--info", "--cfg") if f in arguments)
        ]
    # "<time>" and "<…>" stand for the folder of a run.
    arguments = [re.sub(r"^run=.*", "run=runs/some-run", each) for each in arguments]
    flag = (
        ["--cfg=job"] if command == "report" else ["--cfg", "job"]
    )  # report takes bare words as folders
    outcome = cli(command, *one_job(arguments), *flag)
    assert outcome.code == 0, outcome.text
    assert "_target_" in outcome.out or command in ("evaluate", "export", "recommend", "report")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = {
        target
        for page in PAGES
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
    }
    assert {"train", "test", "docs"} <= named
    assert named <= targets


def test_the_layers_of_the_architecture_page_are_those_that_hold() -> None:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "tests" / "test_architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    section = (
        (ROOT / "docs" / "architecture.md")
        .read_text()
        .partition("## Layers")[2]
        .partition("## ")[0]
    )
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    shown = [set(re.findall(r"`(\w+)(?:\.py|/)`", cell)) for cell in cells]
    assert shown == [set(layer) - {"__main__"} for layer in module.LAYERS]


def test_every_public_name_has_a_place_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: recsys_ssm\.(\w+)$", text, flags=re.MULTILINE))
    assert shown == set(recsys_ssm.__all__) - {"__version__"}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


def test_blocks_that_are_not_run_say_why() -> None:
    reasons = [
        block.not_run for page in PAGES for block in blocks(page) if block.not_run is not None
    ]
    assert all(len(reason.split()) > 2 for reason in reasons)
    # Each stands right above its block; the page for contributors explains them.
    pages = [page for page in PAGES if name(page) != "CONTRIBUTING.md"]
    assert "<!-- not run" not in "".join(map(prose, pages))
