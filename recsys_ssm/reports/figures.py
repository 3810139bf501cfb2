"""Draw the figures of a report: legible in grey, with units, legends and numbers of seeds."""

from __future__ import annotations

import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from recsys_ssm.reports.document import Image
from recsys_ssm.reports.names import model_name
from recsys_ssm.reports.runs import Cell, Collection, Run, Task, number
from recsys_ssm.reports.statistics import estimate, half_widths
from recsys_ssm.reports.tables import (
    Options,
    chosen_cells,
    published_rows,
)

Styles = Mapping[str, Mapping[str, Any]]
"""``color``, ``linestyle`` and ``marker`` by backbone; see :func:`recsys_ssm.reports.names.styles`."""

_HATCHES = ("", "///", "...", "xx")
_BINS = 50
"""Number of popularity bins for a catalogue of more than four times as many items."""
_MOST_LINES = 8


def drawn_cells(collection: Collection, task: Task) -> list[Cell]:
    """Choose the cells to draw: of each backbone its shipped setting, and the best one where that is another."""
    chosen = [
        cell
        for backbone in collection.backbones(task)
        for cell in chosen_cells(collection.of(task, backbone))
    ]
    return chosen[:_MOST_LINES]


def _line(cells: Sequence[Cell], cell: Cell, styles: Styles) -> dict[str, Any]:
    """Return a cell's style; further settings of one backbone are thinner, with open markers."""
    siblings = [each for each in cells if each.backbone == cell.backbone]
    style = dict(styles[cell.backbone])
    if siblings.index(cell) == 0:
        return {"linewidth": 1.8, **style}
    return {"linewidth": 1.1, "markerfacecolor": "white", "alpha": 0.8, **style}


def _label(cells: Sequence[Cell], cell: Cell, n: int, options: Options) -> str:
    """Return a cell's entry in a legend: its setting is named unless it is the only one and the shipped one."""
    is_alone = sum(each.backbone == cell.backbone for each in cells) == 1
    setting = "" if is_alone and cell.setting.is_shipped else f", {cell.setting.label}"
    if len(setting) > 60:
        setting = f"{setting[:59]}…"
    return f"{model_name(cell)}{setting} ({_seeds(n, options)})"


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _image(figure: Figure, name: str, caption: str, alt: str) -> Image:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200)  # twice the pixels it is shown at
    return Image(caption, alt, name, png.getvalue(), int(figure.get_figwidth() * 100))


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)


def _seeds(n: int, options: Options) -> str:
    return f"n = {n}" + (", few seeds" if n < options.min_seeds else "")


# ----------------------------------------------------------------------------------- through training


def through_training(
    task: Task,
    cells: Sequence[Cell],
    options: Options,
    styles: Styles,
    metrics: Sequence[str] = ("hr@1", "hr@5", "hr@10"),
) -> Image | None:
    """Draw validation metrics over the training steps, mean and band; None where no run has a history."""
    drawn = [(cell, _curves(cell.runs, metrics)) for cell in cells]
    drawn = [(cell, curves) for cell, curves in drawn if curves]
    if not drawn:
        return None
    figure = _figure(10, 3.9 + 0.1 * len(drawn), f"{task.label}: validation through training")
    panels = figure.subplots(1, len(metrics), sharex=True, sharey=True, squeeze=False)[0]
    said = []
    for axes, metric in zip(panels, metrics, strict=True):
        for cell, curves in drawn:
            if metric not in curves:
                continue
            steps, values = curves[metric]
            style, mean = _line(cells, cell, styles), values.mean(axis=0)
            label = _label(cells, cell, len(values), options)
            axes.plot(
                steps,
                mean,
                label=label,
                markersize=5,
                markevery=max(1, len(steps) // 8),
                **style,
            )
            if len(values) > 1:
                half = half_widths(values.T, options.confidence)
                axes.fill_between(
                    steps,
                    (mean - half).clip(0, 1),
                    (mean + half).clip(0, 1),
                    color=style["color"],
                    alpha=0.18,
                    linewidth=0,
                )
            said.append(f"{label}: {metric} ends at {mean[-1]:.3f}")
        axes.set_title(metric.upper(), fontsize=11)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _finish(axes, "training step", "mean over users" if axes is panels[0] else "")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    caption = (
        f"{task.label}: {', '.join(metrics)} of validation users through training, mean over the seeds; band: "
        f"{options.confidence:.0%} confidence interval of the mean."
    )
    return _image(figure, f"training-{_slug(task)}", caption, f"{caption} {'; '.join(said)}.")


def _curves(
    runs: Iterable[Run], metrics: Sequence[str]
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Metric -> steps ``(S,)`` that every run with a history was validated at, values ``(runs, S)``."""
    found: dict[str, list[dict[int, float]]] = defaultdict(list)
    for run in runs:
        for metric in metrics:
            values = {int(r["step"]): number(r.get(f"val/{metric}")) for r in run.history}
            if values := {step: value for step, value in values.items() if np.isfinite(value)}:
                found[metric].append(values)
    curves = {}
    for metric, each in found.items():
        steps = sorted(set.intersection(*(set(values) for values in each)))
        if steps:
            table = np.array([[values[step] for step in steps] for values in each])
            curves[metric] = (np.array(steps, dtype=np.float64), table)
    return curves


# -------------------------------------------------------------------------- recommended minus liked


def recommended_minus_liked(
    task: Task, cells: Sequence[Cell], options: Options, styles: Styles
) -> Image | None:
    """Draw how much oftener an item is recommended than liked, by popularity; None where no run kept rankings."""
    drawn = []
    for cell in cells:
        rows = [found for run in cell.runs if (found := rank_differences(run)) is not None]
        lengths = {len(row) for row in rows}
        if rows and len(lengths) == 1:
            drawn.append((cell, np.array(rows)))
    if not drawn:
        return None
    figure = _figure(10, 4.2, f"{task.label}: recommended minus liked")
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=1)
    said = []
    for cell, table in drawn:
        ranks, mean = np.arange(1, table.shape[1] + 1), table.mean(0)
        style, label = _line(cells, cell, styles), _label(cells, cell, len(table), options)
        axes.plot(ranks, mean, label=label, markersize=4, **style)
        if len(table) > 1:
            half = half_widths(table.T, options.confidence)
            axes.fill_between(
                ranks, mean - half, mean + half, color=style["color"], alpha=0.18, linewidth=0
            )
        said.append(
            f"{label} lies between {mean.min():+.1f} and {mean.max():+.1f}, "
            f"on average {np.abs(mean).mean():.1f} from zero"
        )
    binned = drawn[0][1].shape[1] < _n_items(drawn[0][0])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlim(0.5, drawn[0][1].shape[1] + 0.5)
    what = "popularity bin of items in training" if binned else "item's rank by likes"
    _finish(
        axes, f"{what}, 1 = most liked", "recommended − liked,\ntest users" + (" a bin" * binned)
    )
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    caption = (
        f"{task.label}: how many test users an item is recommended to, less how many like it; each user is recommended "
        "as many items as they like; items are ordered by their likes in each seed. Mean over the seeds, band: "
        f"{options.confidence:.0%} confidence interval. Above zero: recommended too often."
    )
    return _image(figure, f"popularity-{_slug(task)}", caption, f"{caption} {'; '.join(said)}.")


def rank_differences(run: Run) -> NDArray[np.float64] | None:
    """Return recommended minus liked test users of each item, most liked first, or of bins for a large catalogue.

    None if the run kept no rankings, or if some user's ranking is shorter than their list of liked items.
    """
    users, items = run.test_users(), run.items()
    needed = {"n_relevant", "recommended", "relevant"}
    if users is None or items is None or not needed <= set(users.columns):
        return None
    if "train_count" not in items.columns:
        return None
    lengths = users["recommended"].list.len()
    if (lengths < users["n_relevant"].clip(upper_bound=items.height)).any():
        return None
    recommended = users.select(pl.col("recommended").list.head(pl.col("n_relevant")))
    shown = _count(recommended["recommended"], items.height)
    liked = _count(users["relevant"], items.height)
    if items.height <= 4 * _BINS:
        return (shown - liked)[np.argsort(-liked, kind="stable")]
    order = np.argsort(-items["train_count"].to_numpy(), kind="stable")
    return np.array([part.sum() for part in np.array_split((shown - liked)[order], _BINS)])


def _count(lists: pl.Series, n_items: int) -> NDArray[np.float64]:
    indices = lists.explode().drop_nulls().to_numpy().astype(np.int64)
    return np.bincount(indices, minlength=n_items).astype(np.float64)


def _n_items(cell: Cell) -> int:
    return max(items.height if (items := run.items()) is not None else 0 for run in cell.runs)


# ------------------------------------------------------------------------------------------ over a grid


def over_grid(
    collection: Collection, dataset: str, options: Options, styles: Styles, metric: str = "hr@10"
) -> Image | None:
    """Draw a metric over the grid of a dataset's options, here and as published; None where no task has a grid."""
    tasks = [t for t in collection.tasks if t.dataset == dataset and t.grid and not t.changed]
    if not tasks:
        return None
    shown = {
        (task, backbone): chosen_cells(collection.of(task, backbone))[0]
        for task in tasks
        for backbone in collection.backbones(task)
    }
    backbones = list(dict.fromkeys(backbone for _, backbone in shown))
    axis = " / ".join(key.rpartition(".")[2] for key, _ in tasks[0].grid)
    name = tasks[0].name or dataset
    figure = _figure(10, 4.2, f"{name}: {metric.upper()} over {axis}")
    axes = figure.subplots()
    width = 0.8 / len(backbones)
    said = []
    labelled = set()
    for i, (backbone, hatch) in enumerate(zip(backbones, itertools.cycle(_HATCHES), strict=False)):
        for x, task in enumerate(tasks):
            place = x + (i - (len(backbones) - 1) / 2) * width
            cell = shown.get((task, backbone))
            if cell is not None:
                value = estimate(list(cell.values(metric).values()), options.confidence)
                error = value.half_width if np.isfinite(value.half_width) else None
                setting = "" if cell.setting.is_shipped else f", {cell.setting.label}"
                text = f"{model_name(cell)}{setting}, here, ± {options.confidence:.0%}"
                axes.bar(
                    place,
                    value.mean,
                    width * 0.92,
                    color=styles[backbone]["color"],
                    alpha=0.75,
                    edgecolor="white",
                    hatch=hatch,
                    yerr=error,
                    error_kw={"elinewidth": 1.4, "capsize": 3},
                    label=None if text in labelled else text,
                )
                labelled.add(text)
                axes.text(
                    place,
                    0.012,
                    f"n={value.n}",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color="black",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )
                said.append(f"{task.label} {model_name(cell)} (n = {value.n}) {value.mean:.3f}")
            for row in published_rows(task):
                if row.backbone == backbone and metric in row.metrics:
                    axes.plot(
                        [place - width * 0.44, place + width * 0.44],
                        [row.metrics[metric]] * 2,
                        color="black",
                        linewidth=2.2,
                        linestyle="-",
                        label=None if row.source_label in labelled else row.source_label,
                    )
                    labelled.add(row.source_label)
    axes.set_xticks(
        range(len(tasks)), [" / ".join(str(value) for _, value in task.grid) for task in tasks]
    )
    axes.set_ylim(0, 1.02)
    _finish(axes, axis, f"{metric.upper()}, mean over test users")
    axes.legend(
        frameon=False, fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0
    )
    caption = (
        f"{name}: {metric.upper()} over {axis}; n is the number of seeds, a bar across a column the published mean. "
        "The setting is the shipped one where it was run, else the best on validation."
    )
    return _image(figure, f"grid-{_clean(dataset)}", caption, f"{caption} {'; '.join(said)}.")


def _slug(task: Task) -> str:
    """Return a task's part of a file name."""
    words = [task.dataset, *(str(value) for _, value in task.grid)]
    words += [value for _, value in task.changed]
    return _clean("-".join(words) + ("-generated" if task.generated else ""))[:100]


def _clean(text: str) -> str:
    return re.sub(r"[^\w-]+", "-", text)
