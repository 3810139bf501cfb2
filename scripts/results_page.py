"""Write the tables of docs/results.md and README.md from results/*.json; the words around them stay.

A generated part stands between `<!-- results: NAME -->` and `<!-- end of results: NAME -->`.

python scripts/results_page.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from recsys_ssm.reports import tables
from recsys_ssm.reports.archive import file_name, read_cells
from recsys_ssm.reports.collect import Cell, Collection
from recsys_ssm.reports.document import Table, markdown_table
from recsys_ssm.reports.statistics import estimate
from recsys_ssm.run.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/results.md", "README.md")
OPTIONS = tables.Options()


def parts(folder: Path) -> dict[str, str]:
    """Name -> Markdown of every generated part, from the cells in ``folder``."""
    cells = read_cells(folder)
    collection = Collection(cells, [])
    made: dict[str, str] = {}
    two_towers = [c.task for c in cells if not c.runs[0].is_next_item]
    for name, dataset in (("spotify", "spotify"), ("hm", "hm"), ("vaccine", "vaccine")):
        tasks = [task for task in dict.fromkeys(two_towers) if task.dataset == dataset]
        if tasks:
            wanted = tables.paper_tasks([dataset], tasks)
            made[name] = shown(tables.performance(collection, wanted, OPTIONS, "", name))
    compared = tables.comparisons(collection, OPTIONS)
    if compared:
        table = tables.paired(compared, OPTIONS)
        made["differences"] = f"{shown(table)}\n\n{table.caption}"
    for task in dict.fromkeys(cell.task for cell in cells if cell.runs[0].is_next_item):
        table = tables.next_item(collection, task, OPTIONS)
        made[f"next-item {task.dataset}"] = f"{shown(table)}\n\n{table.caption}"
    next_item = [text for name, text in made.items() if name.startswith("next-item ")]
    if next_item:
        made["next-item"] = "\n\n".join(next_item)
    if cells:
        cost = tables.cost(collection)
        made["cost"] = f"{shown(cost)}\n\n{cost.caption}"
        made["settings"] = shown(tables.settings_table(collection, OPTIONS))
        made["commands"] = commands(folder, cells)
        made["readme"] = readme(cells)
    figures = sorted((folder / "figures").glob("*.png"))
    if figures:
        made["figures"] = "\n\n".join(
            f"![{path.stem.replace('-', ' ')}](../{folder.name}/figures/{path.name})"
            for path in figures
        )
    return made


def shown(table: Table) -> str:
    return markdown_table(table)


def commands(folder: Path, cells: Sequence[Cell]) -> str:
    """Of each cell its file and the command that makes it."""
    lines = []
    for cell in cells:
        name = f"{file_name(cell)}.json"
        command = json.loads((folder / name).read_text())["command"] or "not recorded"
        lines.append(f"| [{name}](../{folder.name}/{name}) | {cell.n} | `{command}` |")
    return "\n".join(["| cell | seeds | command |", "|---|---:|---|", *lines])


def readme(cells: Sequence[Cell]) -> str:
    """A few figures of Spotify: here, the paper's, and the ceiling."""
    metrics = ("p@5", "p@10", "hr@1")
    rows = []
    spotify = [c for c in cells if c.task.dataset == "spotify" and not c.task.changed]
    shipped = [
        c for c in spotify if not c.setting.changed and c.backbone in ("mamba", "transformer")
    ]
    for cell in shipped:
        name, paper = tables.model_name(cell), tables.published_figures(cell.task, cell.backbone)
        ours = [estimate(list(cell.values(m).values())) for m in metrics]
        seeds = f"{cell.n} seed{'s' * (cell.n > 1)}"
        rows.append(
            [
                f"{name}, here ({seeds})",
                *(tables.show_estimate(e, 3, tables.Options(0)) for e in ours),
            ]
        )
        rows.append([f"{name}, paper", *(tables.show(paper[m]) for m in metrics)])
    if shipped:
        widest = max(shipped, key=lambda cell: cell.n)
        ceiling = [estimate(list(widest.baseline("oracle", m).values())) for m in metrics]
        rows.append(["oracle on the same users", *(tables.show(e.mean) for e in ceiling)])
    return markdown_table(Table("", ("", *metrics), rows))


def fill(page: str, made: dict[str, str]) -> str:
    """The page with its generated parts made anew; parts there is nothing for stay as they are."""

    def one(match: re.Match[str]) -> str:
        name = match["name"]
        text = made.get(name)
        return match[0] if text is None else f"{match['begin']}\n{text}\n{match['end']}"

    pattern = r"(?P<begin><!-- results: (?P<name>[^>]+?) -->)\n.*?(?P<end><!-- end of results: (?P=name) -->)"
    return re.sub(pattern, one, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if a page is out of date"
    )
    arguments = parser.parse_args()
    made = parts(ROOT / "results")
    stale = []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = fill(before, made)
        if before != after:
            stale.append(name)
            if not arguments.check:
                write_text(path, after)
                print(f"written: {name}")
    if arguments.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run `make results`")


if __name__ == "__main__":
    main()
