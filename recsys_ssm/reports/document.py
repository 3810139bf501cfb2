"""A report as blocks, and its three forms: Markdown, LaTeX, and one HTML page that needs nothing else.

The page has no script and refers to nothing outside itself: figures are inlined, styles are in it.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Text; `code` between backticks."""

    text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
    """A list of texts."""

    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under one row of heads.

    Attributes:
        caption: what it shows, and what one has to know to read it.
        head: a title for each column.
        rows: cells as text; `**bold**` as a whole cell marks this project's own figures.
        n_labels: so many columns, from the left, name the row; the others are figures.
        label: a name to refer to it by.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_labels: int = 1
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Image:
    """A PNG figure.

    Attributes:
        caption: what it shows.
        alt: what it says, for those who cannot see it.
        name: its file's name, without a suffix.
        png: the file.
        width: CSS pixels it is meant for.
    """

    caption: str
    alt: str
    name: str
    png: bytes
    width: int


Block = Heading | Paragraph | Bullets | Table | Image


@dataclasses.dataclass(frozen=True)
class Document:
    """A title and blocks."""

    title: str
    blocks: Sequence[Block]

    @property
    def images(self) -> list[Image]:
        return [block for block in self.blocks if isinstance(block, Image)]


# ---------------------------------------------------------------------------------------- Markdown


def to_markdown(document: Document, figures: str = "figures") -> str:
    """GitHub's Markdown; images are looked for in the folder ``figures`` beside it."""
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
    """The rows alone, without the caption."""
    rule = ["---"] * table.n_labels + ["---:"] * (len(table.head) - table.n_labels)
    rows = [table.head, rule, *table.rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    )


# ------------------------------------------------------------------------------------------- LaTeX

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
    "[": "{[}",  # after the end of a row, or an \\item, it would begin an option
    "]": "{]}",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def to_latex(document: Document, figures: str = "figures") -> str:
    """A whole LaTeX file; images are looked for in the folder ``figures`` beside it."""
    parts = [
        r"\documentclass{article}",
        r"\usepackage[T1]{fontenc}",
        r"\usepackage[utf8]{inputenc}",
        r"\usepackage[margin=2cm]{geometry}",
        r"\usepackage{booktabs,graphicx}",
        rf"\title{{{tex(document.title)}}}",
        r"\date{}",
        r"\begin{document}",
        r"\maketitle",
    ]
    parts += [_latex(block, figures) for block in document.blocks]
    return "\n\n".join([*parts, r"\end{document}"]) + "\n"


def _latex(block: Block, figures: str) -> str:
    match block:
        case Heading():
            return f"\\{'sub' * (block.level - 2)}section*{{{tex(block.text)}}}"
        case Paragraph():
            return tex(block.text)
        case Bullets():
            items = "\n".join(f"\\item {tex(item)}" for item in block.items)
            return f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}"
        case Image():
            return (
                "\\begin{figure}[htbp]\\centering\n"
                f"\\includegraphics[width=\\textwidth]{{{figures}/{block.name}.png}}\n"
                f"\\caption{{{tex(block.caption)}}}\n\\end{{figure}}"
            )
        case Table():
            columns = "l" * block.n_labels + "r" * (len(block.head) - block.n_labels)
            lines = [" & ".join(map(tex, row)) + r" \\" for row in (block.head, *block.rows)]
            body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
            label = f"\\label{{tab:{block.label}}}" if block.label else ""
            return (
                f"\\begin{{table}}[htbp]\\centering\n\\caption{{{tex(block.caption)}}}{label}\n"
                f"\\resizebox{{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}}{{!}}{{%\n"
                f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}}}\n\\end{{table}}"
            )


def tex(text: str) -> str:
    """Text for LaTeX: its special characters escaped, `code` and **bold** as such."""
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


def _spans(text: str, escape: object, code: str, bold: str) -> str:
    assert callable(escape)
    parts = []
    for part in re.split(r"(`[^`]+`|\*\*[^*]+\*\*)", text):
        if part.startswith("`") and len(part) > 1:
            parts.append(code.format(escape(part[1:-1])))
        elif part.startswith("**") and len(part) > 4:
            parts.append(bold.format(escape(part[2:-2])))
        else:
            parts.append(escape(part))
    return "".join(parts)


# -------------------------------------------------------------------------------------------- HTML

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 82rem; padding: 1.5rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
p, ul { max-width: 60rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.1rem; }
a { color: #0b3c5d; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.scroll:focus-visible { outline: 2px solid #0b3c5d; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; color: #333; font-size: .9rem; max-width: 60rem; }
th, td { padding: .25rem .5rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid #d9d9d9; }
th { font-weight: 600; } thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
th.label, td.label, tbody th { text-align: left; }
td.label { white-space: normal; }
tbody th { font-weight: 400; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #333; font-size: .9rem; max-width: 60rem; }
code { font-family: ui-monospace, "Liberation Mono", monospace; font-size: .9em; background: #f2f2f2; padding: 0 .2em;
  overflow-wrap: anywhere; }
@page { size: A4 landscape; margin: 1cm; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; }
  table { font-size: 7pt; } th, td { padding: .1rem .25rem; } table, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
"""


def to_html(document: Document) -> str:
    """One page that needs no network, no other file and no script."""
    title = html.escape(document.title)
    contents = "".join(
        f'<li><a href="#{_anchor(block.text)}">{html_text(block.text)}</a></li>'
        for block in document.blocks
        if isinstance(block, Heading) and block.level == 2
    )
    body = "\n".join(_html(block) for block in document.blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An empty icon: browsers ask the server for one otherwise.
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f'<body>\n<header><h1>{title}</h1>\n<nav aria-label="Contents"><ul>{contents}</ul></nav></header>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f'<h{block.level} id="{_anchor(block.text)}">{html_text(block.text)}</h{block.level}>'
        case Paragraph():
            return f"<p>{html_text(block.text)}</p>"
        case Bullets():
            items = "".join(f"<li>{html_text(item)}</li>" for item in block.items)
            return f"<ul>{items}</ul>"
        case Image():
            data = base64.b64encode(block.png).decode()
            return (
                f'<figure><img src="data:image/png;base64,{data}" width="{block.width}" '
                f'alt="{html.escape(block.alt)}"><figcaption>{html_text(block.caption)}</figcaption></figure>'
            )
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{" class=label" if i < table.n_labels else ""}>{html_text(cell)}</th>'
        for i, cell in enumerate(table.head)
    )
    rows = []
    for row in table.rows:
        cells = [f'<th scope="row">{html_text(row[0])}</th>']
        cells += [
            f"<td{' class=label' if i < table.n_labels else ''}>{_broken(cell, i >= table.n_labels)}</td>"
            for i, cell in enumerate(row[1:], start=1)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    # Wide tables scroll by themselves; the keyboard reaches them.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(_plain(table.caption)[:80])}">'
        f"<table><caption>{html_text(table.caption)}</caption><thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{chr(10).join(rows)}\n</tbody></table></div>"
    )


def _broken(cell: str, is_figure: bool) -> str:
    """A figure's remarks go below it: wide tables stay narrow."""
    text = html_text(cell)
    return text.replace(" (", "<br>(").replace(", p ", ",<br>p ") if is_figure else text


def html_text(text: str) -> str:
    """Text for HTML: escaped, `code` and **bold** as such."""
    return _spans(text, html.escape, code="<code>{}</code>", bold="<strong>{}</strong>")


def _plain(text: str) -> str:
    return text.replace("`", "").replace("**", "")


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", _plain(text).lower()).strip("-")
