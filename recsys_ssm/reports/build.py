"""Put a report together: its blocks in order, and the files that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recsys_ssm.reports import figures, tables
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
from recsys_ssm.reports.names import styles
from recsys_ssm.reports.runs import Collection, Task
from recsys_ssm.reports.tables import Options
from recsys_ssm.run.files import write_bytes, write_text

_HOW = (
    "Figures of this project are in bold: the mean over seeds ± half of a {confidence:.0%} confidence interval "
    "(Student's t). A cell says so if it has fewer than {min_seeds} seeds or generated data. `published setting` is "
    "the recipe of a paper as shipped; `best` is the setting with the best mean on validation users, where another "
    "setting than the shipped one was tried. Users without a relevant item are left out of the averages; `all users` "
    "counts them as zeros. Baselines rank for the same users; the oracle is the best possible ranking."
)


def build(collection: Collection, title: str, options: Options) -> Document:
    """Build the whole report. Folders that are left out are listed at the end."""
    blocks: list[Block] = [Paragraph(_summary(collection))]
    next_item = [task for task in collection.tasks if task.kind == "next_item"]
    others = [task for task in collection.tasks if task not in next_item]
    if others:
        how = _HOW.format(confidence=options.confidence, min_seeds=options.min_seeds)
        blocks.append(Paragraph(how))
        for dataset in dict.fromkeys(task.dataset for task in others):
            blocks += _performance(collection, dataset, others, options)
    compared = tables.comparisons(collection, options)
    if compared:
        blocks += [Heading("Differences between backbones"), tables.paired(compared, options)]
    if drawn := _figures(collection, options):
        blocks += [Heading("Figures"), *drawn]
    if next_item:
        blocks += [Heading("Next item")]
        for task in next_item:
            blocks += [Heading(task.label, 3), tables.next_item(collection, task, options)]
    if collection.cells:
        blocks += [Heading("Training cost"), tables.cost(collection)]
        blocks += [Heading("Settings tried"), tables.settings_table(collection, options)]
    if collection.trials:
        blocks += [Heading("Runs without a test"), tables.trials(collection)]
    if collection.problems:
        blocks += [
            Heading("Folders left out"),
            Bullets([f"`{problem.folder}`: {problem.what}" for problem in collection.problems]),
        ]
    return Document(title, blocks)


def _summary(collection: Collection) -> str:
    runs = sum(cell.n for cell in collection.cells)
    if not runs and not collection.trials:
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
    parts = [
        f"Finished runs: {runs}; tasks: {len(collection.tasks)}; settings of backbones: {len(collection.cells)}."
    ]
    if collection.trials:
        parts.append(f"Runs without a test: {len(collection.trials)}.")
    if collection.problems:
        parts.append(f"Folders left out: {len(collection.problems)}, listed at the end.")
    if versions:
        parts.append(f"Versions: {'; '.join(versions)}.")
    if machines:
        parts.append(f"Machines: {'; '.join(machines)}.")
    return " ".join(parts)


def _performance(
    collection: Collection, dataset: str, found: Sequence[Task], options: Options
) -> list[Block]:
    """Make the section of one dataset: published and own figures of every task on it."""
    wanted = tables.with_published_tasks([dataset], found)
    name = next((task.name for task in wanted if task.name), dataset)
    label = f"results-{dataset}"
    return [
        Heading(name),
        tables.performance(collection, wanted, options, f"{name}.", label),
    ]


def _figures(collection: Collection, options: Options) -> list[Image]:
    found: list[Image | None] = []
    looks = styles(collection.cells)
    for task in collection.tasks:
        cells = figures.drawn_cells(collection, task)
        metrics = ("hr@1", "hr@5", "hr@10")
        if task.kind == "next_item":
            metrics = ("hr@10", "ndcg@10", "mrr@10")
        found.append(figures.through_training(task, cells, options, looks, metrics))
        found.append(figures.recommended_minus_liked(task, cells, options, looks))
    datasets = dict.fromkeys(task.dataset for task in collection.tasks)
    found += [figures.over_grid(collection, dataset, options, looks) for dataset in datasets]
    return [image for image in found if image is not None]


def write(document: Document, folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write the files asked for (``md``, ``tex``, ``html``), figures beside the first two; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    if {"md", "tex"} & set(formats):
        (folder / "figures").mkdir(exist_ok=True)
        for image in document.images:
            write_bytes(folder / "figures" / f"{image.name}.png", image.png)
    forms = {"md": to_markdown, "tex": to_latex, "html": to_html}
    return [write_text(folder / f"report.{name}", forms[name](document)) for name in formats]
