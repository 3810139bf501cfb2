"""Write the tables of docs/results.md and README.md from results/*.json; the words around them stay.

A generated part stands between `<!-- results: NAME -->` and `<!-- end of results: NAME -->`.

python scripts/results_page.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from recsys_ssm.reports import tables
from recsys_ssm.reports.archive import file_name, read_cells
from recsys_ssm.reports.document import Table, markdown_table
from recsys_ssm.reports.names import model_name
from recsys_ssm.reports.runs import Cell, Collection, Task
from recsys_ssm.reports.statistics import estimate
from recsys_ssm.run.files import write_text
from recsys_ssm.run.published import best_of

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "conf" / "experiment"
SYSTEMS = {
    "SASRec": "backbone=transformer",
    "BERT4Rec": "backbone=transformer preset=next_item_bert4rec",
    "Mamba4Rec": "backbone=mamba",
    "2Mamba4Rec": "backbone=mamba2",
    "Hydra4Rec": "backbone=hydra",
    "MaTrRec": "backbone=matrrec",
    "SIGMA": "backbone=sigma",
    "MamRec": "experiment=text/mamrec",
    "GPT4Rec": "experiment=text/gpt4rec",
    "LlamaRec": "experiment=text/llamarec retriever={dataset}-mamba-seed0",
}
"""The papers' next-item systems, and the options of each."""
OF_THE_PAPERS = ("ml_100k", "ml_1m", "amazon_beauty_2014")
"""Datasets whose tables are to have a row of every system."""
WITHOUT_TITLES = ("amazon_beauty_2014",)
"""Datasets whose files hold ids alone, which a language model cannot read."""
PAGES = ("docs/results.md", "README.md")
OPTIONS = tables.Options()
WIDTH = 120


def parts(folder: Path) -> dict[str, str]:
    """Return the Markdown of every generated part by name, from the cells in ``folder``."""
    cells = read_cells(folder)
    collection = Collection(cells, [])
    made: dict[str, str] = {}
    two_towers = [task for task in collection.tasks if task.kind != "next_item"]
    for dataset in dict.fromkeys(task.dataset for task in two_towers):
        wanted = tables.with_published_tasks([dataset], two_towers)
        made[dataset] = shown(tables.performance(collection, wanted, OPTIONS, "", dataset))
    compared = tables.comparisons(collection, OPTIONS)
    if compared:
        made["differences"] = shown(tables.paired(compared, OPTIONS))
    next_item = [task for task in collection.tasks if task.kind == "next_item"]
    for task in next_item:
        text = shown(tables.next_item(collection, task, OPTIONS))
        if task.dataset in OF_THE_PAPERS:
            text += "\n\n" + missing(collection, task)
        made[f"next-item {task.dataset}"] = f"### {task.label}\n\n{text}"
    if next_item:
        made["next-item"] = "\n\n".join(made[f"next-item {task.dataset}"] for task in next_item)
        made["readme next-item"] = readme_next_item(collection)
    if cells:
        made["cost"] = shown(tables.cost(collection))
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
    """Return a table's rows in Markdown, with its caption below in lines of ``WIDTH`` characters."""
    caption = textwrap.fill(table.caption, WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"{markdown_table(table)}\n\n{caption}"


def missing(collection: Collection, task: Task) -> str:
    """Return which of the papers' systems have no row of our own in a table, with the command that adds each."""
    found = {system_of(cell) for cell in collection.of(task)}
    absent = [name for name in SYSTEMS if name not in found]
    cannot = [n for n in absent if task.dataset in WITHOUT_TITLES and "=text/" in SYSTEMS[n]]
    absent = [name for name in absent if name not in cannot]
    reason = f"No row of {', '.join(cannot)}: the data have no titles." if cannot else ""
    if not absent:
        return reason or "Every system of the papers has a row of our own here."
    commands = "\n".join(
        f"python -m recsys_ssm.train {options(name, task.dataset)}" for name in absent
    )
    rest = f"Not run here yet: {', '.join(absent)}. A command makes each row, `make results RUNS=<folder>` adds it:"
    text = f"{reason} {rest}"
    block = f"<!-- not run: hours of training on one core -->\n```bash\n{commands}\n```"
    return f"{textwrap.fill(text.strip(), WIDTH)}\n\n{block}"


def system_of(cell: Cell) -> str:
    """Return the name of a cell's system in the papers."""
    dataset = cell.runs[0].config.get("dataset") or {}
    if cell.backbone == "transformer" and dataset.get("objective") == "masked":
        return "BERT4Rec"
    return model_name(cell)


def options(name: str, dataset: str) -> str:
    """Return the options that train a system on a dataset: its experiment, or its backbone."""
    if (EXPERIMENTS / dataset / f"{name.lower()}.yaml").is_file():
        return f"experiment={dataset}/{name.lower()}"
    return f"dataset={dataset} {SYSTEMS[name].format(dataset=dataset)}"


def commands(folder: Path, cells: Sequence[Cell]) -> str:
    """Return a table of the cells' files with the command that makes each."""
    lines = []
    for cell in cells:
        name = f"{file_name(cell)}.json"
        command = json.loads((folder / name).read_text())["command"] or "not recorded"
        lines.append(f"| [{name}](../{folder.name}/{name}) | {cell.n} | `{command}` |")
    return "\n".join(["| cell | seeds | command |", "|---|---:|---|", *lines])


def readme(cells: Sequence[Cell]) -> str:
    """Return a few figures of Spotify: here, the paper's, and the oracle's."""
    metrics = ("p@5", "p@10", "hr@1")
    rows = []
    spotify = [c for c in cells if c.task.dataset == "spotify" and not c.task.changed]
    shipped = [c for c in spotify if c.setting.is_shipped]
    for cell in shipped:
        ours = [estimate(list(cell.values(m).values())) for m in metrics]
        seeds = f"{cell.n} seed{'s' * (cell.n > 1)}"
        rows.append(
            [
                f"{model_name(cell)}, here ({seeds})",
                *(tables.show_estimate(e, 3, tables.Options(0)) for e in ours),
            ]
        )
        for row in tables.published_rows(cell.task):
            if row.backbone == cell.backbone:
                figures = [tables.show(row.metrics[m]) for m in metrics]
                rows.append([f"{row.model}, {row.source_label}", *figures])
    if shipped:
        widest = max(shipped, key=lambda cell: cell.n)
        ceiling = [estimate(list(widest.baseline("oracle", m).values())) for m in metrics]
        rows.append(["oracle on the same users", *(tables.show(e.mean) for e in ceiling)])
    return markdown_table(Table("", ("", *metrics), rows))


def readme_next_item(collection: Collection) -> str:
    """Return the best setting of each next-item task beside the best published row on the same file.

    Models that see the time of the query are left out.
    """
    metrics = ("hr@10", "ndcg@10")
    rows = []
    for task in collection.tasks:
        cells = [cell for cell in collection.of(task) if not cell.sees_query_time]
        best = tables.best_setting(cells) if task.kind == "next_item" else None
        if best is None or not tables.published_rows(task):
            continue
        ours = [estimate(list(best.values(m).values())) for m in metrics]
        figures = [tables.show_estimate(e, 4, tables.Options(0)) for e in ours]
        seeds = f"{best.n} seed{'s' * (best.n > 1)}"
        label = best.setting.label.replace("default setting", model_name(best))
        rows.append([f"{task.label}, `{label}`, {seeds}", *figures])
        published = tables.published_rows(task)
        row = best_of(
            row for row in published if row.seen_items == "left out" and not row.sees_query_time
        )
        if row is not None:
            figures = [tables.show(row.metrics[m], 4) for m in metrics]
            rows.append([f"{task.label}, best published: {row.model}", *figures])
    return markdown_table(Table("", ("", *metrics), rows))


def fill(page: str, made: dict[str, str]) -> str:
    """Return a page with its generated parts made anew; parts without results stay as they are."""

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
