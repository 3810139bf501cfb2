"""Finished cells as JSON files to keep: all that the tables are made from, without the run folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recsys_ssm.errors import UserError
from recsys_ssm.reports.collect import Cell, Run, Setting, Task, in_order, number, spell
from recsys_ssm.reports.statistics import estimate
from recsys_ssm.run.files import write_json
from recsys_ssm.run.settings import settings

_OF_A_SEED = (
    "metrics",
    "metrics_all_users",
    "metrics_unfiltered",
    "baselines",
    "cost",
    "latency",
    "parameters",
    "steps",
    "train_seconds",
    "versions",
)
# Where a run was kept and what it was called are of no use to a reader.
_PLACES = ("output_root=", "name=", "logger=", "seed=", "sweep=", "launcher", "tags=", "hydra.")


_LONGEST = 120
"""Characters of a file's name; what a longer one says in full is in the file."""


def write_cells(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """A file for each cell, named after it; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write_json(folder / f"{file_name(cell)}.json", cell_record(cell)) for cell in cells]


def file_name(cell: Cell) -> str:
    """``vaccine-25-50_mamba``, and what the setting changes behind it."""
    task = cell.task
    words = [task.dataset, *(map(str, task.cell or ())), *(value for _, value in task.changed)]
    changed = spell(cell.setting.changed)
    parts = ["-".join(words) + "-generated" * task.generated, cell.backbone, changed]
    text = "_".join(part for part in parts if part)
    name = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in text)
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def cell_record(cell: Cell) -> dict[str, Any]:
    """What of a cell is kept: how it was made, means with intervals, and every seed's figures."""
    metrics = sorted({name for run in cell.runs for name in run.metrics})
    means = {}
    for metric in metrics:
        value = estimate(list(cell.values(metric).values()))
        means[metric] = {"mean": value.mean, "half_width_95": value.half_width, "n": value.n}
    config = cell.runs[0].config
    return {
        "task": dataclasses.asdict(cell.task),
        "backbone": cell.backbone,
        "setting": dataclasses.asdict(cell.setting),
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
            }
            for run in cell.runs
        },
    }


def command(cell: Cell) -> str | None:
    """The command that makes all the seeds of a cell; None where no run kept its own."""
    # Runs of a cell differ in their seed alone, however they were called: any one's options do.
    all_kept = (run.results.get("overrides") for run in cell.runs)
    overrides = next((each for each in all_kept if isinstance(each, list)), None)
    if overrides is None:
        return None
    kept = [str(each) for each in overrides if not str(each).startswith(_PLACES)]
    seeds = [run.seed for run in cell.runs]
    is_range = seeds == list(range(len(seeds)))
    seed = f"'seed=range({len(seeds)})'" if is_range else "seed=" + ",".join(map(str, seeds))
    return " ".join(["python -m recsys_ssm.train --multirun", *kept, seed])


def _machine(run: Run) -> str:
    cost = run.results.get("cost") or {}
    named = [str(cost[key]) for key in ("machine", "device") if cost.get(key)]
    threads = [f"threads: {cost['threads']}"] if cost.get("threads") else []
    return ", ".join(named + threads) or "not recorded"


def _rounded(value: Any) -> Any:
    """Six significant digits: what a mean of a hundred users holds, and half the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return value


def read_cells(folder: Path) -> list[Cell]:
    """The cells that :func:`write_cells` left in a folder, in the papers' order.

    Raises:
        UserError: A file is no cell.
    """
    cells = []
    for path in sorted(folder.glob("*.json")):
        try:
            cells.append(_cell(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the results of a cell ({error})") from error
    return in_order(cells)


def _cell(record: dict[str, Any]) -> Cell:
    task, setting = record["task"], record["setting"]
    task = Task(
        task["dataset"],
        tuple(task["cell"]) if task["cell"] else None,
        tuple((key, value) for key, value in task["changed"]),
        task["generated"],
    )
    changed = tuple((key, value) for key, value in setting["changed"])
    setting = Setting(changed, setting["is_published"])
    config = {
        "backbone": {"_target_": record["backbone"]},
        "monitor": record["monitor"],
        "monitor_mode": record["monitor_mode"],
    }
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
