"""The paper's figures 4, 5 and 6 from finished runs: legible in grey, with units, legends and numbers of seeds."""

from __future__ import annotations

import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from recsys_ssm.reports.collect import Cell, Collection, Run, Task, number
from recsys_ssm.reports.document import Image
from recsys_ssm.reports.statistics import estimate, half_widths
from recsys_ssm.reports.tables import Options, model_name, published_figures

# Told apart by dash, marker and hatch as well as by colour: a print in grey stays legible.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#0b3c5d", "linestyle": "-", "marker": "o"},
    {"color": "#d55e00", "linestyle": "--", "marker": "s"},
    {"color": "#009e73", "linestyle": "-.", "marker": "^"},
    {"color": "#767676", "linestyle": ":", "marker": "D"},
)
_HATCHES = ("", "///", "...", "xx")
_BINS = 50
"""Items in popularity bins where the catalogue is larger than a few times this."""


def style_of(backbone: str) -> dict[str, Any]:
    """A backbone looks the same in every figure."""
    order = ("mamba", "transformer", "mamba2", "hydra")
    return _STYLES[order.index(backbone) if backbone in order else len(_STYLES) - 1]


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


# ------------------------------------------------------------------------- figure 4: through training


def through_training(
    task: Task,
    cells: Sequence[Cell],
    options: Options,
    metrics: Sequence[str] = ("hr@1", "hr@5", "hr@10"),
) -> Image | None:
    """Validation metrics over the training steps, mean and band; None where no run has a history."""
    drawn = [(cell, _curves(cell.runs, metrics)) for cell in cells]
    drawn = [(cell, curves) for cell, curves in drawn if curves]
    if not drawn:
        return None
    figure = _figure(10, 3.9, f"{task.label}: validation through training")
    panels = figure.subplots(1, len(metrics), sharex=True, sharey=True, squeeze=False)[0]
    said = []
    for axes, metric in zip(panels, metrics, strict=True):
        for cell, curves in drawn:
            if metric not in curves:
                continue
            steps, values = curves[metric]
            style, mean = style_of(cell.backbone), values.mean(axis=0)
            label = f"{model_name(cell)} ({_seeds(len(values), options)})"
            axes.plot(
                steps,
                mean,
                label=label,
                linewidth=1.8,
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
    panels[0].legend(frameon=True, framealpha=0.9, edgecolor="none", loc="lower right", fontsize=9)
    caption = (
        f"{task.label}: hit ratio of validation users through training, mean over the seeds; band: "
        f"{options.confidence:.0%} confidence interval of the mean. As the paper's Figure 4."
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


# ---------------------------------------------------------------- figure 5: recommended minus liked


def recommended_minus_liked(task: Task, cells: Sequence[Cell], options: Options) -> Image | None:
    """How much oftener an item is recommended than liked, by popularity rank; None where no run kept rankings."""
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
        ranks, style, mean = (
            np.arange(1, table.shape[1] + 1),
            style_of(cell.backbone),
            table.mean(0),
        )
        label = f"{model_name(cell)} ({_seeds(len(table), options)})"
        axes.plot(
            ranks,
            mean,
            label=label,
            linewidth=1.4,
            markersize=4,
            **style,
        )
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
        "as many items as he likes; items ordered by their likes in each seed. Mean over the seeds, band: "
        f"{options.confidence:.0%} confidence interval. Above zero: recommended too often. As the paper's Figure 5."
    )
    return _image(figure, f"popularity-{_slug(task)}", caption, f"{caption} {'; '.join(said)}.")


def rank_differences(run: Run) -> NDArray[np.float64] | None:
    """Recommended minus liked test users of each item, most liked first; of a large catalogue in bins by popularity.

    None where the run kept no rankings, or shorter ones than some user has liked items.
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


# ------------------------------------------------------------- figure 6: over clusters and messages


def over_cells(
    collection: Collection, options: Options, metric: str = "hr@10", dataset: str = "vaccine"
) -> Image | None:
    """HR@10 of each cell of clusters × messages, here and as published; None where none was run."""
    tasks = [t for t in collection.tasks if t.dataset == dataset and t.cell and not t.changed]
    shipped = {
        (task, cell.backbone): cell
        for task in tasks
        for cell in collection.of(task)
        if not cell.setting.changed
    }
    if not shipped:
        return None
    backbones = list(dict.fromkeys(backbone for _, backbone in shipped))
    figure = _figure(10, 4.2, f"Vaccine messages: {metric.upper()} over clusters and messages")
    axes = figure.subplots()
    width = 0.8 / len(backbones)
    said = []
    for i, (backbone, hatch) in enumerate(zip(backbones, itertools.cycle(_HATCHES), strict=False)):
        label: str | None = None
        for x, task in enumerate(tasks):
            place = x + (i - (len(backbones) - 1) / 2) * width
            cell = shipped.get((task, backbone))
            if cell is not None:
                value = estimate(list(cell.values(metric).values()), options.confidence)
                error = value.half_width if np.isfinite(value.half_width) else None
                fresh = model_name(cell) + ", here, ± 95%"
                axes.bar(
                    place,
                    value.mean,
                    width * 0.92,
                    color=style_of(backbone)["color"],
                    alpha=0.75,
                    edgecolor="white",
                    hatch=hatch,
                    yerr=error,
                    error_kw={"elinewidth": 1.4, "capsize": 3},
                    label=None if label else fresh,
                )
                label = fresh
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
            published = published_figures(task, backbone).get(metric)
            if published is not None:
                axes.plot(
                    [place - width * 0.44, place + width * 0.44],
                    [published, published],
                    color="black",
                    linewidth=2.2,
                    linestyle="-",
                    label="paper" if x == 0 and i == 0 else None,
                )
    axes.set_xticks(range(len(tasks)), [f"{t.cell[0]} / {t.cell[1]}" for t in tasks if t.cell])
    axes.set_ylim(0, 1.02)
    _finish(axes, "clusters / messages", f"{metric.upper()}, mean over test users")
    axes.legend(
        frameon=False, fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0
    )
    caption = (
        f"Vaccine messages: {metric.upper()} of the published setting for each number of clusters and messages; n is "
        "the number of seeds, the bar across the paper's mean. As the paper's Figure 6."
    )
    return _image(figure, "vaccine-cells", caption, f"{caption} {'; '.join(said)}.")


def _slug(task: Task) -> str:
    cell = f"-{task.cell[0]}-{task.cell[1]}" if task.cell else ""
    extra = "".join(f"-{value}" for _, value in task.changed)
    name = f"{task.dataset}{cell}{extra}" + ("-generated" if task.generated else "")
    return re.sub(r"[^\w-]+", "-", name)
