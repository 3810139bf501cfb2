"""Bring files from outside docs/ into the documentation site (hooks of mkdocs.yml).

Pages are read on a code host as well, so their links to the repository's files are relative paths. A file that a page
links to is copied into the site below ``repository/``; Markdown files become pages, whose links are treated alike. A
link to a folder without a README.md is shown as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "repository/"
IN_NAVIGATION = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/peers/README.md")
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<link>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page links to."""
    todo = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")]
    todo += IN_NAVIGATION
    done: set[str] = set()
    while todo:
        path = todo.pop()
        if path in done:
            continue
        done.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, PREFIX + path, abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            found = [destination(path, link) for link in links(ROOT / path)]
            todo += [each for each in found if each is not None and not each.startswith("docs/")]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside docs/ to their copies in the site."""
    uri = page.file.src_uri
    path = uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else f"docs/{uri}"

    def rewritten(match: re.Match[str]) -> str:
        found = destination(path, match["link"])
        if found is None:
            goes_to_folder = (ROOT / path).parent.joinpath(match["link"]).is_dir()
            return match["text"] if goes_to_folder else match[0]
        goal = found.removeprefix("docs/") if found.startswith("docs/") else PREFIX + found
        link = posixpath.relpath(goal, posixpath.dirname(uri) or ".")
        return f"[{match['text']}]({link}{match['anchor'] or ''})"

    parts, last = [], 0
    for block in CODE.finditer(markdown):
        parts += [LINK.sub(rewritten, markdown[last : block.start()]), block[0]]
        last = block.end()
    return "".join([*parts, LINK.sub(rewritten, markdown[last:])])


def links(path: Path) -> list[str]:
    """Return the links of a Markdown file, without those in code blocks."""
    return [match["link"] for match in LINK.finditer(CODE.sub("", path.read_text()))]


def destination(path: str, link: str) -> str | None:
    """Return the repository's file that a page's link leads to, a folder's README.md for the folder; None: no such."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if found.startswith(".."):
        return None
    if (ROOT / found).is_dir():
        found = f"{found}/README.md"
    return found if (ROOT / found).is_file() else None
