"""Write a report, as blocks, in three forms: Markdown, LaTeX, and one HTML page that needs no other file.

HTML and LaTeX are Jinja2 templates in ``templates/``. The page has no script and refers to nothing outside itself:
figures are inlined, and its style is in it.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import re
from collections.abc import Callable, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup


@dataclasses.dataclass(frozen=True)
class Heading:
    """Begin a section with its title."""

    text: str
    level: int = 2

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", plain_text(self.text).lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Hold text; `code` stands between backticks."""

    text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
    """List texts."""

    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Hold rows of cells under one row of heads.

    Attributes:
        caption: the contents of the table, and how to read them.
        head: a title for each column.
        rows: cells as text; `**bold**` as a whole cell marks this project's own figures.
        n_labels: number of columns, from the left, that name the row; the others are figures.
        label: a name to refer to the table by.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_labels: int = 1
    label: str = ""

    @property
    def plain_caption(self) -> str:
        return plain_text(self.caption)


@dataclasses.dataclass(frozen=True)
class Image:
    """Hold a PNG figure.

    Attributes:
        caption: the contents of the figure.
        alt: the same in words, for readers who cannot see it.
        name: the file's name, without a suffix.
        png: the file's content.
        width: the width to show it at, in CSS pixels.
    """

    caption: str
    alt: str
    name: str
    png: bytes
    width: int

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


Block = Heading | Paragraph | Bullets | Table | Image


@dataclasses.dataclass(frozen=True)
class Document:
    """Hold a title and blocks."""

    title: str
    blocks: Sequence[Block]

    @property
    def images(self) -> list[Image]:
        return [block for block in self.blocks if isinstance(block, Image)]


def plain_text(text: str) -> str:
    """Return a text without its marks for code and bold."""
    return text.replace("`", "").replace("**", "")


# ---------------------------------------------------------------------------------------- Markdown


def to_markdown(document: Document, figures: str = "figures") -> str:
    """Write GitHub's Markdown; images are in the folder ``figures`` beside the file."""
    parts = [f"# {document.title}"]
    parts += [_markdown(block, figures) for block in document.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Paragraph():
            return block.text
        case Bullets():
            return "\n".join(f"- {item}" for item in block.items)
        case Image():
            return f"![{block.alt}]({figures}/{block.name}.png)\n\n*{block.caption}*"
        case Table():
            return f"{markdown_table(block)}\n\n*{block.caption}*"


def markdown_table(table: Table) -> str:
    """Write the rows alone, without the caption."""
    rule = ["---"] * table.n_labels + ["---:"] * (len(table.head) - table.n_labels)
    rows = [table.head, rule, *table.rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    )


# --------------------------------------------------------------------------------- LaTeX and HTML


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("recsys_ssm.reports"),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"rich": html_text, "figure": _html_figure, "tex": tex}
    for kind in (Heading, Paragraph, Bullets, Table, Image):
        environment.tests[kind.__name__.lower()] = functools.partial(_is, kind)  # type: ignore[assignment]
    return environment


@functools.cache
def _latex_environment() -> Environment:
    """Return the environment with delimiters that mean nothing to LaTeX."""
    return _environment().overlay(
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
    )


def _is(kind: type, block: object) -> bool:
    return isinstance(block, kind)


def to_latex(document: Document, figures: str = "figures") -> str:
    """Write a whole LaTeX file; images are in the folder ``figures`` beside it."""
    return (
        _latex_environment().get_template("report.tex").render(document=document, figures=figures)
    )


def to_html(document: Document) -> str:
    """Write one page that needs no network, no other file and no script."""
    return _environment().get_template("report.html").render(document=document)


def html_text(text: str) -> Markup:
    """Return text for HTML: escaped, `code` and **bold** as such."""
    escaped = _spans(text, html.escape, code="<code>{}</code>", bold="<strong>{}</strong>")
    return Markup(escaped)  # noqa: S704


def _html_figure(cell: str) -> Markup:
    """Return a figure's cell with its remarks on lines of their own, so that wide tables stay narrow."""
    text = str(html_text(cell))
    return Markup(text.replace(" (", "<br>(").replace(", p ", ",<br>p "))  # noqa: S704


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "→": r"$\to$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "<": r"$<$",
    ">": r"$>$",
    "…": r"\ldots{}",
    "–": "--",
    "·": r"$\cdot$",
    "‑": "-",
    "[": "{[}",  # after a row's end or an \\item it would begin an option
    "]": "{]}",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def tex(text: str) -> str:
    """Return text for LaTeX: its special characters escaped, `code` and **bold** as such."""
    return _spans(
        text,
        lambda plain: "".join(map(_tex_character, plain)),
        code="\\texttt{{{}}}",
        bold="\\textbf{{{}}}",
    )


def _tex_character(character: str) -> str:
    if character in _TEX:
        return _TEX[character]
    # Letters beyond European ones end pdflatex with an error: a folder may have such a name.
    return (
        character if character.isprintable() and character < "\u0180" else f"U+{ord(character):04X}"
    )


def _spans(text: str, escape: Callable[[str], str], code: str, bold: str) -> str:
    parts = []
    for part in re.split(r"(`[^`]+`|\*\*[^*]+\*\*)", text):
        if part.startswith("`") and len(part) > 1:
            parts.append(code.format(escape(part[1:-1])))
        elif part.startswith("**") and len(part) > 4:
            parts.append(bold.format(escape(part[2:-2])))
        else:
            parts.append(escape(part))
    return "".join(parts)
