"""Draw the curves of a training as a picture."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from recsys_ssm.errors import UserError
from recsys_ssm.metrics import METRICS
from recsys_ssm.run.files import write_bytes
from recsys_ssm.run.table import format_number

# Lines differ by dash and marker as well as by colour, so a grey print stays legible.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0b3c5d", "linestyle": "-", "marker": "o"},
    {"color": "#d55e00", "linestyle": "--", "marker": "s"},
    {"color": "#009e73", "linestyle": "-.", "marker": "^"},
    {"color": "#8f8f8f", "linestyle": ":", "marker": "D"},
)
_TRAIN_RAW, _TRAIN, _VALIDATION = "#b8c4cf", "#0b3c5d", "#d55e00"


def plot_curves(
    history: Sequence[Mapping[str, SupportsFloat | None]] | Path | str,
    path: Path | str,
    *,
    monitor: str | None = None,
    mode: Literal["min", "max"] | None = None,
    metrics: Iterable[str] | None = None,
    title: str = "",
    loss: str = "loss",
) -> Path:
    """Draw training and validation loss, and validation metrics, over the training steps.

    Args:
        history: Records such as ``{"step": 100, "train/loss": 0.3}`` in any order and with any
            gaps, or a CSV file of them (Lightning's ``metrics.csv``). May be empty.
        path: PNG file to write.
        monitor: Metric whose best step is marked, for example ``"val/ndcg@10"``.
        mode: Direction of the best value; None: "min" for a loss, else "max".
        metrics: Validation metrics to draw; None: up to four, the monitored one first.
        title: Title above both panels.
        loss: Axis label of the left panel, with the unit of the loss.

    Returns:
        ``path``.

    Raises:
        UserError: The file cannot be written, or the CSV file cannot be read.
    """
    if isinstance(history, str | Path):
        history = read_history(Path(history))
    names = list(dict.fromkeys(name for record in history for name in record))
    drawn = _choose_metrics(names, monitor) if metrics is None else list(metrics)

    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    # Never empty: the best step is printed at the right of this line.
    figure.suptitle(title or " ", x=0.01, ha="left", fontsize=12, fontweight="bold")
    left, right = figure.subplots(1, 2, sharex=True)
    _draw_losses(left, history)
    for name, line in zip(drawn, itertools.cycle(_LINES), strict=False):
        _line(right, *_series(history, name), label=name.removeprefix("val/"), **line)
    if monitor is not None:
        _mark_best(figure, left, right, history, monitor, mode, is_drawn=monitor in drawn)
    if right.lines:
        right.set_ylim(bottom=0)
    _finish(left, loss, "no loss was recorded")
    _finish(right, "mean over validation users", "no validation metric was recorded")

    png = io.BytesIO()
    figure.savefig(png, format="png")
    return write_bytes(path, png.getvalue())


def read_history(path: Path) -> list[dict[str, float]]:
    """Read a CSV file with a column ``step`` and one column for each metric; empty cells are left out.

    Raises:
        UserError: There is no such file, no column ``step``, or a cell that is not a number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"cannot read the training history {path} ({error}); give a CSV file"
        ) from error
    records = []
    for number, row in enumerate(rows, start=2):
        record = {}
        for name, cell in row.items():
            if cell:
                try:
                    record[name] = float(cell)
                except ValueError:
                    raise UserError(
                        f"{path}, line {number}, column {name!r}: {cell!r} is not a number; correct the cell"
                    ) from None
        if "step" not in record:
            raise UserError(
                f"{path}, line {number}: a training history needs a column 'step'; add it"
            )
        records.append(record)
    return records


def _series(
    history: Sequence[Mapping[str, SupportsFloat | None]], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps, ascending, and the finite values of a metric; of two records the later is used."""
    found = {}
    for record in history:
        value = record.get(name)
        if value is not None and math.isfinite(value := float(value)):
            found[float(record["step"])] = value  # type: ignore[arg-type]
    steps = np.array(sorted(found))
    return steps, np.array([found[step] for step in steps])


def _choose_metrics(names: Sequence[str], monitor: str | None, limit: int = 4) -> list[str]:
    """Return the monitored metric, then one of each other family, at the same cut-off if possible.

    Only means over users are chosen: coverage and popularity have other scales, and are drawn on request.
    """
    means = METRICS.keys() - {"coverage", "popularity"}
    ranking = [
        name
        for name in names
        if name.startswith("val/") and "@" in name and name[4:].partition("@")[0] in means
    ]
    chosen = [monitor] if monitor in ranking else []
    cut_off = (monitor or "").partition("@")[2]
    ranking.sort(key=lambda name: name.partition("@")[2] != cut_off)
    for name in ranking:
        if name.partition("@")[0] not in {each.partition("@")[0] for each in chosen}:
            chosen.append(name)
    return chosen[:limit]


def _draw_losses(axes: Axes, history: Sequence[Mapping[str, SupportsFloat | None]]) -> None:
    steps, values = _series(history, "train/loss")
    shown = [values]
    if len(values) >= 20:
        smooth = _running_mean(values, window=max(5, len(values) // 25))
        axes.plot(steps, values, color=_TRAIN_RAW, linewidth=0.8, label="training")
        axes.plot(steps, smooth, color=_TRAIN, linewidth=1.8, label="training, running mean")
        shown = [smooth]
    else:
        _line(axes, steps, values, color=_TRAIN, linestyle="-", marker="o", label="training")
    steps, values = _series(history, "val/loss")
    _line(axes, steps, values, color=_VALIDATION, linestyle="--", marker="s", label="validation")
    both = np.concatenate([*shown, values])
    if both.size and both.min() > 0 and both.max() / both.min() > 50:
        axes.set_yscale("log")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return a centred mean; at both ends it covers the values there are, so it neither lags nor starts late."""
    total = np.concatenate([[0.0], values.cumsum()])
    index = np.arange(len(values))
    start = (index - window // 2).clip(min=0)
    stop = (index + window // 2 + 1).clip(max=len(values))
    mean: np.ndarray = (total[stop] - total[start]) / (stop - start)
    return mean


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, *, marker: str, **line: Any) -> None:
    if len(steps):
        every = max(1, len(steps) // 12)
        axes.plot(
            steps, values, linewidth=1.8, marker=marker, markersize=5, markevery=every, **line
        )


def _mark_best(
    figure: Figure,
    left: Axes,
    right: Axes,
    history: Sequence[Mapping[str, SupportsFloat | None]],
    monitor: str,
    mode: str | None,
    *,
    is_drawn: bool,
) -> None:
    steps, values = _series(history, monitor)
    if not len(steps):
        return
    best = int(values.argmin() if (mode or _mode(monitor)) == "min" else values.argmax())
    for axes in filter(lambda axes: axes.lines, (left, right)):
        axes.axvline(steps[best], color="black", linewidth=1, linestyle=(0, (1, 2)))
    best_text = (
        f"best {monitor}: {format_number(values[best])} at step {steps[best]:,.0f} (dotted line)"
    )
    figure.text(0.99, 0.985, best_text, ha="right", va="top", fontsize=10)
    on = left if monitor == "val/loss" else right if is_drawn else None
    if on is not None:
        on.plot(steps[best], values[best], marker="*", markersize=15, color="black", zorder=5)


def _mode(monitor: str) -> str:
    return "min" if "loss" in monitor else "max"


def _finish(axes: Axes, label: str, if_empty: str) -> None:
    axes.set_xlabel("training step")
    axes.set_ylabel(f"{label}, log scale" if axes.get_yscale() == "log" else label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlim(left=0)
    if axes.lines:
        axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(
            fontsize=9,
            frameon=False,
            ncols=4,
            columnspacing=1.2,
            handlelength=2.5,
            borderpad=0,
            loc="lower left",
            bbox_to_anchor=(0, 1),
        )
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, if_empty, transform=axes.transAxes, ha="center", color="#666666")
