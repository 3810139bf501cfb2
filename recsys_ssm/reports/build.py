"""A report put together: what stands in it, in which order, and the files it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recsys_ssm.reports import figures, tables
from recsys_ssm.reports.collect import Collection, Task
from recsys_ssm.reports.document import (
    Block,
    Bullets,
    Document,
    Heading,
    Image,
    Paragraph,
    to_html,
    to_latex,
    to_markdown,
)
from recsys_ssm.reports.published import ERRATA
from recsys_ssm.reports.tables import Options
from recsys_ssm.run.files import write_bytes, write_text

_HOW = (
    "Figures of this project are in bold: the mean over seeds ± half of a {confidence:.0%} confidence interval "
    "(Student's t). A cell says so if it stands on fewer than {min_seeds} seeds or on generated data. `published "
    "setting` is the paper's recipe as shipped; `best` is the setting with the best mean on validation users, where "
    "another than the shipped one was tried. Users without a relevant item are left out of the averages; `all users` "
    "counts them as zeros. Baselines rank for the same users; the oracle is the best that any ranker can do."
)


def build(collection: Collection, title: str, options: Options) -> Document:
    """The whole report. What was not run is not there; folders that are left out are named at the end."""
    blocks: list[Block] = [Paragraph(_summary(collection))]
    two_towers = [t for t in collection.tasks if not collection.of(t)[0].runs[0].is_next_item]
    next_item = [t for t in collection.tasks if t not in two_towers]
    if two_towers:
        how = _HOW.format(confidence=options.confidence, min_seeds=options.min_seeds)
        blocks.append(Paragraph(how))
        blocks += _performance(collection, two_towers, options)
    compared = tables.comparisons(collection, options)
    if compared:
        blocks += [Heading("Differences between backbones"), tables.paired(compared, options)]
    if drawn := _figures(collection, options):
        blocks += [Heading("Figures"), *drawn]
    if next_item:
        blocks += [Heading("Next item"), Paragraph(ERRATA)]
        for task in next_item:
            blocks += [Heading(task.label, 3), tables.next_item(collection, task, options)]
    if collection.cells:
        blocks += [Heading("Training cost"), tables.cost(collection)]
        blocks += [Heading("Settings tried"), tables.settings_table(collection, options)]
    if collection.problems:
        blocks += [
            Heading("Folders left out"),
            Bullets([f"`{problem.folder}`: {problem.what}" for problem in collection.problems]),
        ]
    return Document(title, blocks)


def _summary(collection: Collection) -> str:
    runs = sum(cell.n for cell in collection.cells)
    if not runs:
        return "No finished run was found."
    machines = sorted(
        {
            f"{cost.get('machine')} ({cost.get('device')}, threads: {cost.get('threads')})"
            for cell in collection.cells
            for run in cell.runs
            if (cost := run.results.get("cost"))
        }
    )
    versions = sorted(
        {
            ", ".join(f"{name} {found[name]}" for name in ("recsys-ssm", "torch") if name in found)
            for cell in collection.cells
            for run in cell.runs
            if (found := run.results.get("versions"))
        }
    )
    n_out = len(collection.problems)
    left_out = f" Folders left out: {n_out}, named at the end." if n_out else ""
    where = f" Machines: {'; '.join(machines)}." if machines else ""
    return (
        f"Finished runs: {runs}; tasks: {len(collection.tasks)}; settings of backbones: {len(collection.cells)}."
        f"{left_out} Versions: {'; '.join(versions)}.{where}"
    )


def _performance(collection: Collection, tasks: Sequence[Task], options: Options) -> list[Block]:
    blocks: list[Block] = []
    names = {task.dataset for task in tasks}
    first = [name for name in ("spotify", "hm") if name in names]
    if first:
        named = " and ".join({"spotify": "Spotify", "hm": "H&M"}[name] for name in first)
        caption = f"{named}, two towers (the paper's Table I)."
        wanted = tables.paper_tasks(first, tasks)
        blocks.append(Heading(f"Table I: {named}"))
        blocks.append(tables.performance(collection, wanted, options, caption, "I"))
    if "vaccine" in names:
        caption = "Vaccine messages, clusters/messages, two towers (the paper's Table II)."
        wanted = tables.paper_tasks(["vaccine"], tasks)
        blocks.append(Heading("Table II: vaccine messages"))
        blocks.append(tables.performance(collection, wanted, options, caption, "II"))
    others = [task for task in tasks if task.dataset not in ("spotify", "hm", "vaccine")]
    if others:
        blocks.append(Heading("Other data"))
        caption = "Two towers on other data."
        blocks.append(tables.performance(collection, others, options, caption, "other"))
    return blocks


def _figures(collection: Collection, options: Options) -> list[Image]:
    found: list[Image | None] = []
    for task in collection.tasks:
        cells = [cell for cell in collection.of(task) if not cell.setting.changed]
        cells = cells or collection.of(task)[:1]
        metrics = ("hr@1", "hr@5", "hr@10")
        if cells[0].runs[0].is_next_item:
            metrics = ("hr@10", "ndcg@10", "mrr@10")
        found.append(figures.through_training(task, cells, options, metrics))
        found.append(figures.recommended_minus_liked(task, cells, options))
    found.append(figures.over_cells(collection, options))
    return [image for image in found if image is not None]


def write(document: Document, folder: Path, formats: Sequence[str]) -> list[Path]:
    """The files asked for (``md``, ``tex``, ``html``), figures beside the first two; returns what to open."""
    folder.mkdir(parents=True, exist_ok=True)
    if {"md", "tex"} & set(formats):
        (folder / "figures").mkdir(exist_ok=True)
        for image in document.images:
            write_bytes(folder / "figures" / f"{image.name}.png", image.png)
    forms = {"md": to_markdown, "tex": to_latex, "html": to_html}
    return [write_text(folder / f"report.{name}", forms[name](document)) for name in formats]
