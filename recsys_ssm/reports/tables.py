"""Make the tables of a report; each cell says its interval, few seeds and generated data."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from recsys_ssm.reports.document import Table
from recsys_ssm.reports.names import model_name, name_of_run
from recsys_ssm.reports.runs import LEFT_OUT, Cell, Collection, Run, Task, number, numbers
from recsys_ssm.reports.statistics import Difference, Estimate, estimate, holm, paired_difference
from recsys_ssm.run.defaults import option
from recsys_ssm.run.published import Row, rows_of
from recsys_ssm.text.weights import TINY

METRICS = ("p@5", "p@10", "r@5", "r@10", "mrr@5", "mrr@10", "hr@1", "hr@5", "hr@10")
"""The columns of a table of two towers."""

NEXT_ITEM_METRICS = ("ndcg@5", "ndcg@10", "mrr@10", "hr@1", "hr@5", "hr@10")


QUERY_TIME = "query time"
"""Head of the column that says which models see the time of the item that they predict."""


def yes_or_no(value: bool) -> str:
    """Return a cell of a column with yes and no."""
    return "yes" if value else "no"


def metrics_of(tasks: Iterable[Task]) -> tuple[str, ...]:
    """Return the metrics to compare by: those of next-item tasks where there are no others."""
    return NEXT_ITEM_METRICS if {task.kind for task in tasks} == {"next_item"} else METRICS


_ORACLE = "oracle"
_MOST_TRIALS = 20


class Options(NamedTuple):
    """Hold the options of tables: a cell on fewer than ``min_seeds`` seeds says so."""

    min_seeds: int = 10
    confidence: float = 0.95


# -------------------------------------------------------------------------------------------- cells


def show(value: float, digits: int = 3) -> str:
    """Write a figure below one without its leading zero, as papers print it: ``.952``."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def show_exact(value: float) -> str:
    """Write a published figure with the digits that it was published with."""
    return f"{value:g}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:g}"


def show_estimate(
    value: Estimate, digits: int, options: Options, *, generated: bool = False, n_max: int = 0
) -> str:
    """Write ``.963 ± .029``, with a remark on few seeds, fewer than the row's, and generated data."""
    if value.n == 0:
        return "–"
    text = show(value.mean, digits)
    if math.isfinite(value.half_width):
        text += f" ± {show(value.half_width, digits)}"
    remarks = [f"n = {value.n}"] * (value.n < options.min_seeds or value.n < n_max)
    remarks += ["generated"] * generated
    return f"{text} ({', '.join(remarks)})" if remarks else text


# ------------------------------------------------------------------------------------ how to read them


def conditions(cells: Sequence[Cell], options: Options) -> str:
    """Write what the figures of a table depend on: data, protocol, ties, seeds and interval."""
    runs = [run for cell in cells for run in cell.runs]
    seeds = sorted({cell.n for cell in cells})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "0"
    return (
        f"Data: {data_of(runs)}. Protocol: {_protocol(runs)}. Equal scores are ranked in catalogue order. "
        f"Seeds: {count}; mean ± half of a {options.confidence:.0%} confidence interval (Student's t)."
    )


def data_of(runs: Iterable[Run]) -> str:
    """Write the input files of runs with the beginning of their SHA-256; sampled and generated data are named so."""
    found = []
    for run in runs:
        if run.task.generated:
            found.append("files generated from a fixed seed")
        elif run.data is None:
            found.append("hash not recorded")
        elif not run.data:
            found.append("sampled from the seed")
        else:
            found += [f"{name} (SHA-256 {digest[:12]}…)" for name, digest in run.data.items()]
    return "; ".join(dict.fromkeys(found)) or "none"


def _protocol(runs: Sequence[Run]) -> str:
    next_item = [run for run in runs if run.task.kind == "next_item"]
    parts = []
    if len(next_item) < len(runs):
        parts.append(
            "two towers leave the items of a user's training data out of that user's ranking"
        )
    if repeating := [run for run in next_item if run.results.get("filter_seen") is False]:
        names = ", ".join(dict.fromkeys(run.task.label for run in repeating))
        parts.append(
            "next-item models rank the whole catalogue; figures allow seen items where users often take items again "
            f"({names}) and leave them out elsewhere, unless they say otherwise"
        )
    elif any("metrics_unfiltered" in run.results for run in next_item):
        parts.append(
            "next-item models rank the whole catalogue, and figures leave seen items out unless they say otherwise"
        )
    elif next_item:
        words = "left out" if _filters(next_item) else "allowed"
        parts.append(f"next-item models rank the whole catalogue, seen items {words}")
    return "; ".join(parts) or "none"


def _filters(runs: Sequence[Run]) -> bool:
    paths = ("model.filter_seen", "head.filter_seen")
    return all(option(run.config, path, True) for run in runs for path in paths)


def sources(rows: Iterable[Row]) -> str:
    """Write the references of published rows, with their protocol and errata."""
    by_reference: dict[str, list[Row]] = {}
    for row in rows:
        by_reference.setdefault(row.reference, []).append(row)
    parts = []
    for reference, members in by_reference.items():
        first = members[0]
        text = f"Rows marked {first.source_label}: {reference}"
        text += "" if first.seen_items == "none" else f"; seen items {first.seen_items}"
        notes = dict.fromkeys(note for row in members for note in row.notes)
        parts.append(" ".join([f"{text}; seeds: {first.seeds}.", *notes]))
    return " ".join(parts)


# ------------------------------------------------------------------------------------------ two towers


def best_setting(cells: Sequence[Cell]) -> Cell | None:
    """Return the setting with the best validation score on the shared seeds, or None.

    Settings without a common seed are compared by their own means.
    """
    known = [(cell, cell.validations()) for cell in cells]
    known = [(cell, values) for cell, values in known if values]
    if not known:
        return None
    shared = set.intersection(*(set(values) for _, values in known))
    means = [statistics.fmean(values[seed] for seed in (shared or values)) for _, values in known]
    mode = known[0][0].runs[0].config.get("monitor_mode")
    return known[means.index((min if mode == "min" else max)(means))][0]


def published_rows(task: Task) -> list[Row]:
    """Return the published rows of a task; none for data with other options than the shipped ones."""
    return [] if task.changed else rows_of(task.dataset, dict(task.grid))


def performance(
    collection: Collection, tasks: Iterable[Task], options: Options, caption: str, label: str
) -> Table:
    """Make a table with the figures of each task and backbone, published and here, and of the baselines."""
    rows: list[list[str]] = []
    tasks = list(tasks)
    cited: list[Row] = []
    for task in tasks:
        published = published_rows(task)
        cited += published
        digits = digits_of(published)
        names = [row.backbone or row.model for row in published]
        for backbone in dict.fromkeys([*names, *collection.backbones(task)]):
            for row in published:
                if backbone == (row.backbone or row.model):
                    figures = [show(row.metrics.get(m, math.nan), digits) for m in METRICS]
                    label_of_paper = label_without_generation(task)
                    rows.append(
                        [
                            label_of_paper,
                            row.model,
                            row.source_label,
                            yes_or_no(row.sees_query_time),
                            str(row.seeds),
                            *figures,
                        ]
                    )
            for cell in chosen_cells(collection.of(task, backbone)):
                role = _role(cell, collection)
                rows += _own_rows(cell, model_name(cell), role, digits, options)
        rows += _baseline_rows(task, collection.of(task), digits, options)
    cells = [cell for task in tasks for cell in collection.of(task)]
    texts = [caption, conditions(cells, options), sources(cited)]
    return Table(
        " ".join(text for text in texts if text),
        ("data", "model", "setting", QUERY_TIME, "seeds", *METRICS),
        rows,
        n_labels=4,
        label=label,
    )


def digits_of(published: Sequence[Row]) -> int:
    """Return the most decimals of published figures; four where nothing was published."""
    values = [value for row in published for value in row.metrics.values()]
    decimals = [len(str(value).partition(".")[2]) for value in values]
    return max(decimals, default=4)


def label_without_generation(task: Task) -> str:
    """Return the label of a task on the real data."""
    return task.label.removesuffix(", generated data")


def chosen_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Choose the settings of one backbone to show: the shipped one, and the best on validation if it is another.

    Without a shipped setting and a validation score nothing tells the settings apart, and all are shown.
    """
    shipped = [cell for cell in cells if cell.setting.is_shipped]
    best = best_setting(cells)
    if best is not None and best not in shipped:
        return [*shipped, best]
    return shipped or list(cells)


def _role(cell: Cell, collection: Collection) -> str:
    siblings = collection.of(cell.task, cell.backbone)
    known = [sibling for sibling in siblings if sibling.validations()]
    is_best = len(known) > 1 and best_setting(siblings) is cell
    if cell.setting.is_shipped:
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
        sees = yes_or_no(cell.sees_query_time)
        rows.append([cell.task.label, name, setting, sees, str(cell.n), *styled])
    return rows


def _baseline_rows(
    task: Task, cells: Sequence[Cell], digits: int, options: Options
) -> list[list[str]]:
    """Make the rows of the baselines on the same users; each seed counts once, whichever run has it."""
    rows = []
    for name in baseline_names(cells):
        found = [baseline(cells, name, metric, options) for metric in METRICS]
        n = max(each.n for each in found)
        figures = [
            show_estimate(each, digits, options, generated=task.generated, n_max=n)
            for each in found
        ]
        rows.append([task.label, name.replace("_", "-"), "same users", "no", str(n), *figures])
    return rows


def baseline_names(cells: Sequence[Cell]) -> list[str]:
    """Return the names of the baselines that runs have: the oracle, then by their first metric, the best first."""
    names = {name for c in cells for run in c.runs for name in run.results.get("baselines") or {}}
    options = Options()

    def key(name: str) -> tuple[bool, float, str]:
        found = baseline(cells, name, "hr@10", options)
        return name != _ORACLE, -found.mean if found.n else math.inf, name

    return sorted(names, key=key)


def baseline(cells: Sequence[Cell], name: str, metric: str, options: Options) -> Estimate:
    """Return a baseline's mean over the seeds of cells."""
    by_seed: dict[int, float] = {}
    for cell in cells:
        by_seed |= cell.baseline(name, metric)
    return estimate(list(by_seed.values()), options.confidence)


# ------------------------------------------------------------------------------- paired differences


class Comparison(NamedTuple):
    """Hold two cells of one task, and their differences by metric."""

    first: Cell
    second: Cell
    settings: str
    differences: dict[str, Difference]


def comparisons(
    collection: Collection, options: Options, metrics: Sequence[str] | None = None
) -> list[Comparison]:
    """Compare every two backbones of a task, at their shipped settings and, if these are others, at their best ones."""
    metrics = metrics or metrics_of(collection.tasks)
    found = []
    for task in collection.tasks:
        backbones = collection.backbones(task)
        for pair in itertools.combinations(backbones, 2):
            cells = [collection.of(task, backbone) for backbone in pair]
            shipped = [next((c for c in each if c.setting.is_shipped), None) for each in cells]
            best = [best_setting(each) for each in cells]
            choices = {"shipped settings": shipped} | (
                {"best settings": best} if best != shipped else {}
            )
            for settings, (first, second) in choices.items():
                if first is None or second is None:
                    continue
                differences = {
                    m: paired_difference(first.values(m), second.values(m), options.confidence)
                    for m in metrics
                }
                if any(d.n for d in differences.values()):
                    found.append(Comparison(first, second, settings, differences))
    return found


def paired(
    found: Sequence[Comparison], options: Options, metrics: Sequence[str] | None = None
) -> Table:
    """Make the table of differences between backbones on the same seeds; p-values are corrected over the table."""
    metrics = metrics or tuple(found[0].differences if found else METRICS)
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
        sees = ", ".join(
            dict.fromkeys(
                yes_or_no(cell.sees_query_time) for cell in (comparison.first, comparison.second)
            )
        )
        rows.append([task, f"{first} − {second}", comparison.settings, sees, str(n), *cells])
    caption = (
        f"Paired differences: mean over the seeds that both models have, {options.confidence:.0%} confidence interval "
        "(Student's t)"
    ) + (
        f", and the p-value of the paired t-test after Holm's correction for the {n_tests} tests of this table. Bold: "
        "p < .05. Differences on fewer than three seeds, or equal on all of them, are not tested."
        if n_tests
        else ". No pair has the three seeds that a test needs."
    )
    compared = [cell for each in found for cell in (each.first, each.second)]
    caption += f" {conditions(compared, options)}"
    head = ("data", "difference", "settings", QUERY_TIME, "seeds", *metrics)
    return Table(caption, head, rows, n_labels=4, label="paired")


def _show_difference(d: Difference, p: float, options: Options, generated: bool) -> str:
    if d.n == 0:
        return "–"
    text = ("+" if d.mean > 0 else "") + show(d.mean).replace("-", "−")
    if math.isfinite(d.half_width):
        text += f" ± {show(d.half_width)}"
    if not math.isnan(p):
        text += f", p {show_p(p)}"
    remarks = [f"n = {d.n}"] * (d.n < options.min_seeds) + ["generated"] * generated
    text += f" ({', '.join(remarks)})" if remarks else ""
    return f"**{text}**" if p < 0.05 else text


def show_p(p: float) -> str:
    """Write a p-value."""
    if p < 0.001:
        return "< .001"
    return show(p, 3 if p < 0.1 else 2)


# ------------------------------------------------------------------------------- settings, cost, trials


_SETTINGS_SHOWN = ("ndcg@10", "p@5", "p@10", "hr@1", "hr@10")


def settings_table(collection: Collection, options: Options) -> Table:
    """Make the table of all settings: the best validation score, by which settings are chosen, and test figures."""
    kinds = {task.kind for task in collection.tasks}
    shown = ("ndcg@10", "mrr@10", "hr@1", "hr@10") if kinds == {"next_item"} else _SETTINGS_SHOWN
    rows = []
    for cell in collection.cells:
        validation = estimate(list(cell.validations().values()), options.confidence)
        monitor = str(cell.runs[0].config.get("monitor"))
        rows.append(
            [
                cell.task.label,
                model_name(cell),
                cell.setting.label,
                yes_or_no(cell.sees_query_time),
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
        "Every setting that was run: the best score on validation, by which settings are compared, and test figures, "
        f"by which they are not compared. {conditions(collection.cells, options)}"
    )
    head = (
        "data",
        "model",
        "setting",
        QUERY_TIME,
        "seeds",
        "best on validation",
        *(f"test {m}" for m in shown),
    )
    return Table(caption, head, rows, n_labels=4, label="settings")


def cost(collection: Collection) -> Table:
    """Make the table of the cost of training, by task, backbone and machine."""
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
                    yes_or_no(cell.sees_query_time),
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
        "whole training, validation included; peak memory of the process (of the device on a GPU); total number of "
        "parameters, and that of one tower's backbone (two towers) or without embeddings (next item). Times of runs "
        "that shared their machine with others are upper bounds. For seeds trained at once, time and memory are of all "
        "together."
    )
    head = (
        "data",
        "model",
        "setting",
        QUERY_TIME,
        "runs",
        "step, ms",
        "training, min",
        "memory, MiB",
        "parameters",
        "of the backbone",
        "machine",
    )
    return Table(caption, head, rows, n_labels=4, label="cost")


def trials(collection: Collection) -> Table:
    """Make the table of the runs that were validated and not tested, the best of each task first."""
    runs = collection.trials

    def key(run: Run) -> tuple[str, float]:
        is_loss = run.config.get("monitor_mode") == "min"
        return run.task.label, run.validation if is_loss else -run.validation

    rows = [
        [
            run.task.label,
            name_of_run(run),
            run.setting.label,
            yes_or_no(run.sees_query_time),
            str(run.seed),
            f"{run.config.get('monitor')} {show(run.validation, 4)}",
        ]
        for run in sorted(runs, key=key)[:_MOST_TRIALS]
    ]
    caption = (
        "Runs that were validated and not tested, such as the trials of a search; the best first."
    )
    if len(runs) > _MOST_TRIALS:
        caption += f" {_MOST_TRIALS} of {len(runs)} are shown."
    head = ("data", "model", "setting", QUERY_TIME, "seed", "best on validation")
    return Table(caption, head, rows, n_labels=4, label="trials")


def _show_median(runs: Sequence[Mapping[str, object]], key: str, factor: float, digits: int) -> str:
    values = [number(run.get(key)) for run in runs]
    values = [value for value in values if math.isfinite(value)]
    return f"{statistics.median(values) * factor:,.{digits}f}" if values else "–"


def _show_count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


# ------------------------------------------------------------------------------------------- next item

_NEXT_ITEM_HEAD = (
    "model",
    "setting",
    QUERY_TIME,
    "trained on",
    "length",
    "seeds",
    "HR@10",
    "NDCG@10",
    "MRR@10",
    "HR@10, new",
    "NDCG@10, new",
    "latency",
    "latency, 256",
    "parameters",
    "without embeddings",
)
_ALLOWED = (
    ("hr@10", "metrics_unfiltered"),
    ("ndcg@10", "metrics_unfiltered"),
    ("mrr@10", "metrics_unfiltered"),
)
_LEFT_OUT = (("hr@10", LEFT_OUT), ("ndcg@10", LEFT_OUT))


def next_item(collection: Collection, task: Task, options: Options) -> Table:
    """Make the table of a next-item task: HR, NDCG and MRR at 10, latency and parameters, published and here."""
    published = published_rows(task)
    rows = [_published_next_item(row) for row in published]
    cells = collection.of(task)
    any_tiny = False
    for cell in cells:
        estimates = [
            show_estimate(
                estimate(list(cell.values(m, group).values()), options.confidence),
                4,
                options,
                generated=task.generated,
            )
            for m, group in (*_ALLOWED, *_LEFT_OUT)
        ]
        counts = numbers(cell.runs[0].results.get("parameters"))
        config = cell.runs[0].config
        dataset, text = (config.get(part) or {} for part in ("dataset", "text"))
        is_tiny = bool(text) and text.get("model", TINY) == TINY
        any_tiny |= is_tiny
        rows.append(
            [
                model_name(cell) + ", tiny" * is_tiny,
                cell.setting.label,
                yes_or_no(cell.sees_query_time),
                str(dataset.get("objective", "–")),
                str(dataset.get("max_length", "–")),
                str(cell.n),
                *estimates,
                *(_latency(cell.runs, users) for users in (1, 256)),
                _show_count(counts.get("total", math.nan)),
                _show_count(counts.get("without_embeddings", math.nan)),
            ]
        )
    rows += _next_item_baselines(task, cells, options)
    caption = (
        f"{task.label}: the whole catalogue is ranked for each user's held-out item. The first three figures allow "
        "items that the user had before; the two marked new leave them out. Query time: the model sees the time of the "
        "item that it predicts. Trained on: all positions of a history, the last one of each prefix, or masked items. "
        "Length: most items of a history that the model reads. Latency: median time of a call for one user and for 256 "
        "users."
    )
    scratch = (
        "Tiny: a small language model with random weights, trained from scratch; text.model=<folder> takes the "
        "published weights."
    )
    texts = [caption, scratch * any_tiny, conditions(cells, options), sources(published)]
    return Table(
        " ".join(text for text in texts if text),
        _NEXT_ITEM_HEAD,
        rows,
        n_labels=3,
        label=f"next-item-{task.dataset}",
    )


def _latency(runs: Sequence[Run], users: int) -> str:
    """Return the median of the runs' latencies for a number of users."""
    latencies = [numbers(run.results.get("latency")) for run in runs]
    seconds = [found[f"users_{users}"] for found in latencies if f"users_{users}" in found]
    return f"{statistics.median(seconds):.4f} s" if seconds else "–"


def _published_next_item(row: Row) -> list[str]:
    def figure(metric: str, seen_items: str) -> str:
        value = row.metrics.get(metric)
        return show_exact(value) if value is not None and row.seen_items == seen_items else "–"

    latency = row.cost.get("latency")
    return [
        row.model,
        row.source_label,
        yes_or_no(row.sees_query_time),
        "–",
        str(row.max_length or "–"),
        str(row.seeds),
        *(figure(metric, "allowed") for metric, _ in _ALLOWED),
        *(figure(metric, "left out") for metric, _ in _LEFT_OUT),
        show_exact(latency) if latency is not None else "–",
        "–",
        str(row.cost.get("parameters", "–")),
        str(row.cost.get("without_embeddings", "–")),
    ]


_UNFILTERED = "_unfiltered"


def _next_item_baselines(task: Task, cells: Sequence[Cell], options: Options) -> list[list[str]]:
    """Make the rows of the baselines, those with seen items allowed and left out of one name in one row."""
    names = dict.fromkeys(name.removesuffix(_UNFILTERED) for name in baseline_names(cells))
    rows = []
    for name in names:
        found = [baseline(cells, name + _UNFILTERED, metric, options) for metric, _ in _ALLOWED]
        found += [baseline(cells, name, metric, options) for metric, _ in _LEFT_OUT]
        figures = [show_estimate(each, 4, options, generated=task.generated) for each in found]
        n = max(each.n for each in found)
        labels = [name.replace("_", "-"), "same users", "no", "–", "–", str(n)]
        rows.append([*labels, *figures, *["–"] * 4])
    return rows


def with_published_tasks(datasets: Sequence[str], found: Iterable[Task]) -> list[Task]:
    """Return the tasks of datasets that were published, run here or not, and the other tasks found on them."""
    found = [task for task in found if task.dataset in datasets]
    tasks: list[Task] = []
    for dataset in datasets:
        own = [task for task in found if task.dataset == dataset]
        like = own[0] if own else Task(dataset)
        grids = {
            tuple((key, value) for key, value in row.when.items() if key.startswith("dataset."))
            for row in rows_of(dataset)
        }
        for grid in sorted(grids, key=lambda grid: [value for _, value in grid]):
            tasks += [task for task in own if task.grid == grid] or [
                Task(dataset, like.kind, grid, name=like.name)
            ]
        tasks += [task for task in own if task not in tasks]
    return tasks
