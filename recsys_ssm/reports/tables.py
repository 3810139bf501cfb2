"""The papers' tables, each cell with what it takes to believe it: interval, few seeds, generated data."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from recsys_ssm.reports.collect import (
    Cell,
    Collection,
    Task,
    compose_shipped,
    number,
    numbers,
)
from recsys_ssm.reports.document import Table
from recsys_ssm.reports.published import NEXT_ITEM
from recsys_ssm.reports.statistics import Difference, Estimate, estimate, holm, paired_difference

METRICS = ("p@5", "p@10", "r@5", "r@10", "mrr@5", "mrr@10", "hr@1", "hr@5", "hr@10")
"""The columns of the first paper's tables."""

VACCINE_CELLS = ((25, 25), (25, 50), (25, 100), (50, 50), (50, 100), (100, 100))
_BASELINES = ("oracle", "age_band", "popularity", "random")
_PAPER_SEEDS = 100


class Options(NamedTuple):
    """How tables are made: fewer than ``min_seeds`` seeds are said in the cell."""

    min_seeds: int = 10
    confidence: float = 0.95


def model_name(cell: Cell) -> str:
    """A model's name as the papers have it."""
    return _name(cell.backbone, cell.runs[0].is_next_item)


def _name(backbone: str, is_next_item: bool) -> str:
    if is_next_item:
        known = {
            "mamba": "Mamba4Rec",
            "mamba2": "2Mamba4Rec",
            "hydra": "Hydra4Rec",
            "transformer": "SASRec",
        }
        return known.get(backbone, backbone)
    return f"FT-{backbone.capitalize()}"


# -------------------------------------------------------------------------------------------- cells


def show(value: float, digits: int = 3) -> str:
    """A figure below one without its leading zero, as the papers print it: ``.952``."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def show_exact(value: float) -> str:
    """A published figure with the digits it was published with."""
    return f"{value:g}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:g}"


def show_estimate(
    value: Estimate, digits: int, options: Options, *, generated: bool = False, n_max: int = 0
) -> str:
    """``.963 ± .029``; few seeds, fewer than the row's, and generated data are said in the cell."""
    if value.n == 0:
        return "–"
    text = show(value.mean, digits)
    if math.isfinite(value.half_width):
        text += f" ± {show(value.half_width, digits)}"
    remarks = [f"n = {value.n}"] * (value.n < options.min_seeds or value.n < n_max)
    remarks += ["generated"] * generated
    return f"{text} ({', '.join(remarks)})" if remarks else text


# ---------------------------------------------------------------------------- the first paper's tables


def best_setting(cells: Sequence[Cell]) -> Cell | None:
    """Of one backbone's settings the one that is best on validation, on the seeds they share; None if none is known."""
    known = [(cell, cell.validations()) for cell in cells]
    known = [(cell, values) for cell, values in known if values]
    if not known:
        return None
    shared = set.intersection(*(set(values) for _, values in known))
    means = [statistics.fmean(values[seed] for seed in (shared or values)) for _, values in known]
    mode = known[0][0].runs[0].config.get("monitor_mode")
    return known[means.index((min if mode == "min" else max)(means))][0]


def published_figures(task: Task, backbone: str) -> dict[str, float]:
    """What the paper reports for a backbone on a task; empty where it reports nothing, or of other data."""
    if task.changed:
        return {}
    cfg = compose_shipped(task.dataset, backbone, task.cell)
    return numbers((cfg or {}).get("published"))


def performance(
    collection: Collection, tasks: Iterable[Task], options: Options, caption: str, label: str
) -> Table:
    """Rows as in the paper's Tables I and II: of each task and backbone its figures and ours, then baselines."""
    rows: list[list[str]] = []
    for task in tasks:
        digits = 3 if task.dataset == "spotify" else 4
        found = list(dict.fromkeys(cell.backbone for cell in collection.of(task)))
        for backbone in dict.fromkeys(["mamba", "transformer", *found]):
            published = published_figures(task, backbone)
            name = _name(backbone, is_next_item=False)
            if published:
                figures = [show(published.get(m, math.nan), digits) for m in METRICS]
                real = dataclasses.replace(task, generated=False)
                rows.append([real.label, name, "paper", str(_PAPER_SEEDS), *figures])
            for cell in chosen_cells(collection.of(task, backbone)):
                rows += _own_rows(cell, name, _role(cell, collection), digits, options)
        rows += _baseline_rows(task, collection.of(task), digits, options)
    return Table(
        caption, ("data", "model", "setting", "seeds", *METRICS), rows, n_labels=3, label=label
    )


def chosen_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Of one backbone on one task: the shipped setting, and the best on validation where it is another."""
    shipped = [cell for cell in cells if not cell.setting.changed]
    best = best_setting(cells)
    if best is not None and best not in shipped:
        return [*shipped, best]
    return shipped or list(cells[:1])


def _role(cell: Cell, collection: Collection) -> str:
    siblings = collection.of(cell.task, cell.backbone)
    known = [sibling for sibling in siblings if sibling.validations()]
    is_best = len(known) > 1 and best_setting(siblings) is cell
    if not cell.setting.changed:
        return cell.setting.label + (", also best" if is_best else "")
    return f"best: {cell.setting.label}" if is_best else cell.setting.label


def _own_rows(cell: Cell, name: str, role: str, digits: int, options: Options) -> list[list[str]]:
    generated = cell.task.generated
    rows = []
    groups = [("metrics", role, "**{}**")]
    if any(number(run.metrics.get("n_users_without_relevant")) > 0 for run in cell.runs):
        groups.append(("metrics_all_users", "… all users", "{}"))
    for group, setting, style in groups:
        estimates = [
            estimate(list(cell.values(m, group).values()), options.confidence) for m in METRICS
        ]
        figures = [
            show_estimate(e, digits, options, generated=generated, n_max=cell.n) for e in estimates
        ]
        styled = [style.format(text) if text != "–" else text for text in figures]
        rows.append([cell.task.label, name, setting, str(cell.n), *styled])
    return rows


def _baseline_rows(
    task: Task, cells: Sequence[Cell], digits: int, options: Options
) -> list[list[str]]:
    """What is simpler, on the same users; each seed once, whichever run saw it."""
    names = {
        name for cell in cells for run in cell.runs for name in run.results.get("baselines") or {}
    }
    rows = []
    for name in [*(n for n in _BASELINES if n in names), *sorted(names - set(_BASELINES))]:
        by_metric: list[dict[int, float]] = []
        for metric in METRICS:
            by_seed: dict[int, float] = {}
            for cell in cells:
                by_seed |= cell.baseline(name, metric)
            by_metric.append(by_seed)
        n = max(map(len, by_metric))
        figures = [
            show_estimate(
                estimate(list(values.values()), options.confidence),
                digits,
                options,
                generated=task.generated,
                n_max=n,
            )
            for values in by_metric
        ]
        rows.append([task.label, name.replace("_", "-"), "same users", str(n), *figures])
    return rows


# ------------------------------------------------------------------------------- paired differences


class Comparison(NamedTuple):
    """Two cells of one task and what lies between them, by metric."""

    first: Cell
    second: Cell
    what: str
    differences: dict[str, Difference]


def comparisons(
    collection: Collection, options: Options, metrics: Sequence[str] = METRICS
) -> list[Comparison]:
    """Every two backbones of a task, at their shipped settings and, where that is another choice, at their best."""
    found = []
    for task in collection.tasks:
        backbones = list(dict.fromkeys(cell.backbone for cell in collection.of(task)))
        for pair in itertools.combinations(backbones, 2):
            cells = [collection.of(task, backbone) for backbone in pair]
            shipped = [next((c for c in each if not c.setting.changed), None) for each in cells]
            best = [best_setting(each) for each in cells]
            choices = {"shipped settings": shipped} | (
                {"best settings": best} if best != shipped else {}
            )
            for said, (first, second) in choices.items():
                if first is None or second is None:
                    continue
                differences = {
                    m: paired_difference(first.values(m), second.values(m), options.confidence)
                    for m in metrics
                }
                if any(d.n for d in differences.values()):
                    found.append(Comparison(first, second, said, differences))
    return found


def paired(
    found: Sequence[Comparison], options: Options, metrics: Sequence[str] = METRICS
) -> Table:
    """Differences between backbones on the same seeds; p-values corrected over the whole table."""
    flat = [comparison.differences[m].p_value for comparison in found for m in metrics]
    n_tests = sum(not math.isnan(p) for p in flat)
    adjusted = iter(holm(flat))
    rows = []
    for comparison in found:
        cells = []
        n = max(d.n for d in comparison.differences.values())
        for metric in metrics:
            d, p = comparison.differences[metric], next(adjusted)
            cells.append(_show_difference(d, p, options, comparison.first.task.generated))
        first, second = model_name(comparison.first), model_name(comparison.second)
        task = comparison.first.task.label
        rows.append([task, f"{first} − {second}", comparison.what, str(n), *cells])
    caption = (
        f"Paired differences: mean over the seeds that both models have, {options.confidence:.0%} confidence interval "
        "(Student's t)"
    ) + (
        f", and the p-value of the paired t-test after Holm's correction for the {n_tests} tests of this table. Bold: "
        "p < .05."
        if n_tests
        else ". No pair has the two seeds a test needs."
    )
    head = ("data", "difference", "settings", "seeds", *metrics)
    return Table(caption, head, rows, n_labels=3, label="paired")


def _show_difference(d: Difference, p: float, options: Options, generated: bool) -> str:
    if d.n == 0:
        return "–"
    text = ("+" if d.mean > 0 else "") + show(d.mean).replace("-", "−")
    if not math.isnan(p):
        text += f" ± {show(d.half_width)}, p {show_p(p)}"
    remarks = [f"n = {d.n}"] * (d.n < options.min_seeds) + ["generated"] * generated
    text += f" ({', '.join(remarks)})" if remarks else ""
    return f"**{text}**" if p < 0.05 else text


def show_p(p: float) -> str:
    if p < 0.001:
        return "< .001"
    return show(p, 3 if p < 0.1 else 2)


# -------------------------------------------------------------------------------------------- other


def settings_table(collection: Collection, options: Options) -> Table:
    """All that was tried: each setting's best value on validation, by which the best is chosen, and test figures."""
    shown = ("ndcg@10", "p@5", "p@10", "hr@1", "hr@10")
    rows = []
    for cell in collection.cells:
        validation = estimate(list(cell.validations().values()), options.confidence)
        monitor = str(cell.runs[0].config.get("monitor"))
        rows.append(
            [
                cell.task.label,
                model_name(cell),
                cell.setting.label,
                str(cell.n),
                f"{monitor} {show_estimate(validation, 4, options)}" if validation.n else "–",
                *(
                    show_estimate(
                        estimate(list(cell.values(m).values()), options.confidence),
                        4,
                        options,
                        generated=cell.task.generated,
                    )
                    for m in shown
                ),
            ]
        )
    caption = (
        "Every setting that was run: the best value on validation, by which settings are compared, and test figures, "
        "by which they are not."
    )
    head = (
        "data",
        "model",
        "setting",
        "seeds",
        "best on validation",
        *(f"test {m}" for m in shown),
    )
    return Table(caption, head, rows, n_labels=3, label="settings")


def cost(collection: Collection) -> Table:
    """What training takes, by task, backbone and machine."""
    rows = []
    for cell in collection.cells:
        by_machine: dict[tuple[str, ...], list[Mapping[str, object]]] = {}
        for run in cell.runs:
            costs = run.results.get("cost") or {}
            keys = ("machine", "device", "threads", "seeds_at_once")
            where = tuple(str(costs.get(key, "–")) for key in keys)
            by_machine.setdefault(where, []).append({**run.results, **costs})
        for (processor, device, threads, at_once), runs in by_machine.items():
            machine = f"{processor}, {device}, threads: {threads}"
            machine += f", {at_once} seeds at once" if at_once != "–" else ""
            parameters = runs[0].get("parameters")
            counts = numbers(parameters)
            part = counts.get("backbone_per_tower", counts.get("without_embeddings", math.nan))
            rows.append(
                [
                    cell.task.label,
                    model_name(cell),
                    cell.setting.label,
                    str(len(runs)),
                    _show_median(runs, "seconds_per_step", 1e3, 1),
                    _show_median(runs, "train_seconds", 1 / 60, 1),
                    _show_median(runs, "peak_memory_bytes", 2**-20, 0),
                    _show_count(counts.get("total", math.nan)),
                    _show_count(part),
                    machine if processor != "–" else "not recorded",
                ]
            )
    caption = (
        "Cost of training: medians over the runs. Time of a step with its data, without validation; wall time of the "
        "whole training, validation included; peak memory of the process (of the device on a GPU); parameters "
        "in all, and of one tower's backbone (two towers) or without embeddings (next item). Times of runs that shared "
        "their machine with others are upper bounds; seeds trained at once: time and memory of all together."
    )
    head = (
        "data",
        "model",
        "setting",
        "runs",
        "step, ms",
        "training, min",
        "memory, MiB",
        "parameters",
        "of the backbone",
        "machine",
    )
    return Table(caption, head, rows, n_labels=3, label="cost")


def _show_median(runs: Sequence[Mapping[str, object]], key: str, factor: float, digits: int) -> str:
    values = [number(run.get(key)) for run in runs]
    values = [value for value in values if math.isfinite(value)]
    return f"{statistics.median(values) * factor:,.{digits}f}" if values else "–"


def _show_count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def next_item(collection: Collection, task: Task, options: Options) -> Table:
    """A table of the second paper: HR, NDCG and MRR at 10, latency and parameters, as published and here."""
    rows = []
    for row in NEXT_ITEM.get(task.dataset, ()):
        figures = [show_exact(v) if v is not None else "–" for v in row[1:5]]
        rows.append([row.model, "paper", "1", *figures[:3], "–", "–", figures[3], *row[5:]])
    for cell in collection.of(task):
        estimates = [
            show_estimate(
                estimate(list(cell.values(m, group).values()), options.confidence),
                4,
                options,
                generated=task.generated,
            )
            for m, group in (
                ("hr@10", "metrics_unfiltered"),
                ("ndcg@10", "metrics_unfiltered"),
                ("mrr@10", "metrics_unfiltered"),
                ("hr@10", "metrics"),
                ("ndcg@10", "metrics"),
            )
        ]
        counts = numbers(cell.runs[0].results.get("parameters"))
        latencies = [numbers(run.results.get("latency")) for run in cell.runs]
        seconds = [found["users_1"] for found in latencies if "users_1" in found]
        rows.append(
            [
                model_name(cell),
                cell.setting.label,
                str(cell.n),
                *(f"**{text}**" if text != "–" else text for text in estimates),
                f"{statistics.median(seconds):.4f} s" if seconds else "–",
                _show_count(counts.get("total", math.nan)),
                _show_count(counts.get("without_embeddings", math.nan)),
            ]
        )
    for name in _baseline_names(collection.of(task)):
        values = []
        for metric in ("hr@10", "ndcg@10"):
            by_seed: dict[int, float] = {}
            for cell in collection.of(task):
                by_seed |= cell.baseline(name, metric)
            found = estimate(list(by_seed.values()), options.confidence)
            values.append(show_estimate(found, 4, options, generated=task.generated))
        rows.append([name, "same users", "–", "–", "–", "–", *values, "–", "–", "–"])
    caption = (
        f"{task.label}: the whole catalogue ranked for each user's held-out item. First figures: items the user "
        "had before may be recommended again, as in the paper's evaluation; new: they are left out. Latency: median "
        "time of a call for one user; the paper gives no unit."
    )
    head = (
        "model",
        "setting",
        "seeds",
        "HR@10",
        "NDCG@10",
        "MRR@10",
        "HR@10, new",
        "NDCG@10, new",
        "latency",
        "parameters",
        "without embeddings",
    )
    return Table(caption, head, rows, n_labels=2, label=f"next-item-{task.dataset}")


def _baseline_names(cells: Sequence[Cell]) -> list[str]:
    names = {name for c in cells for run in c.runs for name in run.results.get("baselines") or {}}
    return sorted(names)


def paper_tasks(datasets: Sequence[str], found: Iterable[Task]) -> list[Task]:
    """The paper's tasks of these datasets, run here or not, and other runs on them."""
    found = [task for task in found if task.dataset in datasets]
    tasks = []
    for dataset in datasets:
        cells = VACCINE_CELLS if dataset == "vaccine" else (None,)
        for cell in cells:
            own = [task for task in found if task.dataset == dataset and task.cell == cell]
            tasks += own or [Task(dataset, cell)]
    return tasks + [task for task in found if task not in tasks]
