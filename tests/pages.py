"""Read the pages of the documentation: code blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A code block of a page."""

    language: str
    text: str
    not_run: str | None
    """Reason that the page gives for not running the block."""


def name(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page in order."""
    found = BLOCK.finditer(page.read_text())
    return [Block(each["language"], each["text"], each["reason"]) for each in found]


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return BLOCK.sub("", page.read_text())


def commands(page: Path) -> list[list[str]]:
    """Return the words of every line of the page's bash blocks that is a command, without comments."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "bash":
            text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block.text, flags=re.DOTALL | re.MULTILINE)
            text = re.sub(r"\$\(.*?\)", "<…>", text).replace("\\\n", " ")
            lines += text.splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def links(page: Path) -> list[Path]:
    """Return the files and folders that a page's relative links lead to."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", prose(page))
    return [page.parent / link for link in found if "://" not in link]
