"""Keep finished cells as JSON files: everything that tables are made from, without the run folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recsys_ssm.errors import UserError
from recsys_ssm.reports.collect import in_order
from recsys_ssm.reports.runs import Cell, Run, Setting, Task, number, spell
from recsys_ssm.reports.shipped import display_name, grid_of, kind_of
from recsys_ssm.reports.statistics import estimate
from recsys_ssm.run.files import write_json
from recsys_ssm.run.settings import settings
from recsys_ssm.sweeps.identity import published_overrides, sweep_command

_OF_A_SEED = (
    "metrics",
    "metrics_all_users",
    "metrics_filtered",
    "metrics_unfiltered",
    "baselines",
    "cost",
    "data",
    "latency",
    "parameters",
    "sees_query_time",
    "steps",
    "train_seconds",
    "versions",
)

_LONGEST = 120
"""Most characters of a file's name; the file holds the setting in full."""


def write_cells(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write a file for each cell, named after it; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_json(folder / f"{file_name(cell)}.json", cell_record(cell)) for cell in cells]


def file_name(cell: Cell) -> str:
    """Return ``vaccine-25-50_mamba``, with the options that the setting changes behind it."""
    task = cell.task
    words = [task.dataset, *(str(value) for _, value in task.grid)]
    words += [value for _, value in task.changed]
    changed = "_".join(part for part in (cell.setting.name, spell(cell.setting.changed)) if part)
    parts = ["-".join(words) + "-generated" * task.generated, cell.backbone, changed]
    text = "_".join(part for part in parts if part)
    name = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in text)
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def cell_record(cell: Cell) -> dict[str, Any]:
    """Return a cell as plain data: how it was made, means with intervals, and every seed's figures."""
    metrics = sorted({name for run in cell.runs for name in run.metrics})
    means = {}
    for metric in metrics:
        value = estimate(list(cell.values(metric).values()))
        means[metric] = {"mean": value.mean, "half_width_95": value.half_width, "n": value.n}
    config = cell.runs[0].config
    return {
        "task": dataclasses.asdict(cell.task),
        "backbone": cell.backbone,
        "setting": {
            "name": cell.setting.name,
            "changed": cell.setting.changed,
            "is_published": cell.setting.is_published,
        },
        "command": command(cell),
        "seeds": [run.seed for run in cell.runs],
        "machines": sorted({_machine(run) for run in cell.runs}),
        "monitor": config.get("monitor"),
        "monitor_mode": config.get("monitor_mode"),
        "options": settings(config),
        "means": means,
        "per_seed": {
            str(run.seed): {
                "validation": run.validation,
                **{key: _rounded(run.results[key]) for key in _OF_A_SEED if key in run.results},
                **({} if run.data is None else {"data": run.data}),
            }
            for run in cell.runs
        },
    }


def command(cell: Cell) -> str | None:
    """Return the command that makes all the seeds of a cell; None if no run kept its own."""
    # The runs of a cell differ in their seed alone, so the options of any of them do.
    all_kept = (run.results.get("overrides") for run in cell.runs)
    overrides = next((each for each in all_kept if isinstance(each, list)), None)
    if overrides is None:
        return None
    seeds = [run.seed for run in cell.runs]
    is_range = seeds == list(range(len(seeds)))
    seed = f"seed=range({len(seeds)})" if is_range else "seed=" + ",".join(map(str, seeds))
    return sweep_command([*published_overrides(overrides), seed])


def _machine(run: Run) -> str:
    cost = run.results.get("cost") or {}
    named = [str(cost[key]) for key in ("machine", "device") if cost.get(key)]
    threads = [f"threads: {cost['threads']}"] if cost.get("threads") else []
    return ", ".join(named + threads) or "not recorded"


def _rounded(value: Any) -> Any:
    """Round to six significant digits: as many as a mean over a hundred users has, at half the size."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return value


def read_cells(folder: Path) -> list[Cell]:
    """Read the cells that :func:`write_cells` wrote to a folder, in the order of a report.

    Raises:
        UserError: A file is not a cell.
    """
    cells = []
    for path in sorted(folder.glob("*.json")):
        try:
            cells.append(_cell(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the results of a cell ({error})") from error
    return in_order(cells)


def _cell(record: dict[str, Any]) -> Cell:
    task, setting = _task(record), record["setting"]
    changed = tuple((key, value) for key, value in setting["changed"])
    setting = Setting(changed, setting["is_published"], setting.get("name", ""))
    config = _config(record)
    runs = [
        Run(
            Path(),
            {"seed": int(seed), "dataset": task.dataset, "generated": task.generated, **figures},
            config,
            task,
            setting,
            validation=number(figures["validation"]),
        )
        for seed, figures in record["per_seed"].items()
    ]
    return Cell(task, record["backbone"], setting, sorted(runs, key=lambda run: run.seed))


def _task(record: dict[str, Any]) -> Task:
    """Return the task of a cell; older cells have no grid by option and no kind of task."""
    task, config = record["task"], _config(record)
    grid = tuple((key, value) for key, value in task.get("grid") or grid_of(config))
    figures = next(iter(record["per_seed"].values()))
    return Task(
        task["dataset"],
        task.get("kind") or kind_of(config, figures),
        grid,
        tuple((key, value) for key, value in task["changed"]),
        task["generated"],
        task.get("name") or display_name(config, task["dataset"], shipped=True),
    )


def _config(record: dict[str, Any]) -> dict[str, Any]:
    """Return a run's config again, from a cell's dotted options."""
    config: dict[str, Any] = {}
    for path, value in record["options"].items():
        *parents, key = path.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return {**config, "monitor": record["monitor"], "monitor_mode": record["monitor_mode"]}
