"""Find finished runs under folders, report unusable ones, and group runs that differ only in their seed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recsys_ssm.errors import UserError
from recsys_ssm.reports.runs import (
    Cell,
    Changes,
    Collection,
    Problem,
    Run,
    Setting,
    Task,
    number,
    numbers,
)
from recsys_ssm.reports.shipped import place
from recsys_ssm.run.published import all_rows, backbone_class
from recsys_ssm.run.settings import read_config
from recsys_ssm.sweeps.status import (
    STATUS,
    changed_files,
    file_hashes,
    job_state,
    read_status,
)

RUN_FILES = ("metrics.json", "config.yaml", STATUS, "history.json", "train.log")
"""Files of a run: a folder with any of these is a run, finished or not."""

_PARTS = (
    "baselines",
    "cost",
    "data",
    "latency",
    "metrics_all_users",
    "metrics_filtered",
    "metrics_unfiltered",
    "parameters",
)
"""Parts of ``metrics.json`` that are mappings, beside ``metrics``."""


def collect(folders: Sequence[Path], others: Iterable[Run] = ()) -> Collection:
    """Group all runs below ``folders``, and ``others``.

    Raises:
        UserError: A folder does not exist.
    """
    runs = list(others)
    problems: list[Problem] = []
    for root in folders:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give a sweep's, or one with runs in it")
        for folder in _run_folders(root, problems):
            try:
                run = read_run(folder)
            except UserError as error:
                problems.append(Problem(folder, str(error)))
                continue
            if run is not None:
                runs.append(run)
    runs = _name_by_difference(_without_repeats(runs, problems))
    tested = [run for run in runs if run.metrics]
    trials = sorted((run for run in runs if not run.metrics), key=lambda run: str(run.folder))
    return Collection(group(tested), problems, trials)


def _run_folders(root: Path, problems: list[Problem]) -> list[Path]:
    """Return the folders of runs, finished or not; empty folders go to ``problems``."""
    found = []
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            problems.append(Problem(folder, f"cannot be read ({error.strerror})"))
            continue
        names = {entry.name for entry in entries}
        if not names.isdisjoint(RUN_FILES):
            found.append(folder)
            # Seeds of one batched training have a folder each within.
            pending += [
                entry
                for entry in entries
                if not entry.name.startswith(".")
                and any((entry / name).is_file() for name in RUN_FILES)
            ]
        elif not names and folder != root:
            problems.append(Problem(folder, "empty"))
        elif folder == root or "report.html" not in names:  # a report has no runs in it
            pending += [
                entry
                for entry in entries
                if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith(".")
            ]
    return sorted(found)


def read_run(folder: Path) -> Run | None:
    """Read a finished run. Nothing in the folder is executed, and interpolations stay text.

    Returns:
        The run; None for a batched training, whose seeds are runs in folders within. A run that was validated and not
        tested has no metrics.

    Raises:
        UserError: A file is missing or broken.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(_unfinished(folder))
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"metrics.json is broken ({error})") from error
    if not isinstance(results, dict) or not {"name", "dataset", "versions"} <= results.keys():
        raise UserError("metrics.json is of another program: no name, dataset and versions")
    if "seed" not in results and isinstance(results.get("seeds"), list):
        return None
    is_tested = isinstance(results.get("metrics"), dict)
    if not isinstance(results.get("seed"), int):
        if not is_tested:
            raise UserError("not tested (test=null)")
        raise UserError("an evaluation, not a training: metrics.json has no seed")
    if is_tested and not numbers(results["metrics"]):
        raise UserError("metrics.json has no finite figure")
    for part in _PARTS:
        if not isinstance(results.get(part) or {}, dict):
            raise UserError(f"metrics.json is broken ({part}: expected names with values)")
    try:
        config = read_config(folder / "config.yaml")
    except UserError as error:
        if not is_tested:
            raise UserError("not tested (test=null)") from error
        raise UserError(str(error).replace(f"{folder}/", "")) from error
    if not backbone_class(config):
        raise UserError("config.yaml is of another program: no backbone._target_")
    dataset = config.get("dataset")
    if not isinstance(dataset, dict) or not isinstance(dataset.get("name"), str):
        raise UserError("config.yaml is of another program: no dataset.name")
    run = make_run(folder, results, config, _read_history(folder / "history.json"))
    if not is_tested and not math.isfinite(run.validation):
        raise UserError("not tested (test=null), and never validated")
    return run


def make_run(
    folder: Path,
    results: dict[str, Any],
    config: dict[str, Any],
    history: list[dict[str, Any]],
) -> Run:
    """Return a run, its task and setting found by comparing its config with the shipped one."""
    found = place(config, results)
    validation = _best_monitored(config, history)
    return Run(
        folder,
        results,
        config,
        found.task,
        found.setting,
        history,
        validation,
        is_compared=found.compared,
        data_options=found.data_options,
    )


def _best_monitored(config: Mapping[str, Any], history: Iterable[Mapping[str, Any]]) -> float:
    values = [number(record.get(str(config.get("monitor")))) for record in history]
    best = min if config.get("monitor_mode") == "min" else max
    return best((value for value in values if math.isfinite(value)), default=math.nan)


def _unfinished(folder: Path) -> str:
    state = job_state(folder)
    if state == "running":
        return "still running"
    if state == "pruned":
        return "pruned by its search"
    if state == "failed":
        lines = str(read_status(folder).get("error") or "").strip().splitlines() or ["no message"]
        return f"failed: {lines[-1].removeprefix('error: ')}"
    return "not finished: no metrics.json"


def _read_history(path: Path) -> list[dict[str, Any]]:
    """Read the records of ``history.json``; none where it is absent (older runs) or broken."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(records, list):
        return []
    return [r for r in records if isinstance(r, dict) and math.isfinite(number(r.get("step")))]


def _without_repeats(runs: Iterable[Run], problems: list[Problem]) -> list[Run]:
    """Keep the newest of runs that are the same seed of the same setting."""
    newest: dict[tuple[Any, ...], Run] = {}
    for run in sorted(runs, key=_written):
        data = file_hashes(run.data or {})
        key = (
            run.task,
            run.data_options,
            data,
            run.backbone,
            run.setting,
            run.seed,
            bool(run.metrics),
        )
        if key in newest:
            what = f"the same run again, newer: {run.folder}"
            problems.append(Problem(newest[key].folder, what))
        newest[key] = run
    return list(newest.values())


def _written(run: Run) -> float:
    try:
        return (run.folder / "metrics.json").stat().st_mtime
    except OSError:
        return 0.0


# -------------------------------------------------------------------------------------------- naming


def _name_by_difference(runs: Sequence[Run]) -> list[Run]:
    """Name the tasks and settings of a user's own dataset or backbone by what differs among the runs of the report.

    Without a shipped config to compare with, each option would count as changed.
    """
    by_dataset: dict[Task, list[Run]] = defaultdict(list)
    for run in runs:
        by_dataset[run.task].append(run)
    for members in by_dataset.values():
        # Runs that read different contents of a file are never in one mean.
        changed = changed_files(run.data or {} for run in members)
        for run in members if changed else ():
            data = run.data or {}
            _set_task(
                run, tuple((f"data of {name}", data[name][:8]) for name in changed if name in data)
            )
    by_dataset.clear()
    for run in runs:
        by_dataset[run.task].append(run)
    for members in by_dataset.values():
        if any(run.data_options for run in members):
            _keep_varying(members, lambda run: run.data_options, _set_task)
    by_model: dict[tuple[Task, str], list[Run]] = defaultdict(list)
    for run in runs:
        by_model[run.task, run.backbone].append(run)
    for members in by_model.values():
        own = [run for run in members if not run.is_compared]
        _keep_varying(own, lambda run: run.setting.changed, _set_setting)
        varying = _varying([run.setting.changed for run in members])
        for run in members:
            run.setting = dataclasses.replace(run.setting, first=tuple(sorted(varying)))
    return list(runs)


def _keep_varying(
    runs: Sequence[Run], of: Callable[[Run], Changes], put: Callable[[Run, Changes], None]
) -> None:
    varying = _varying([of(run) for run in runs])
    for run in runs:
        put(run, tuple((key, value) for key, value in of(run) if key in varying))


def _varying(options: Sequence[Changes]) -> set[str]:
    """Return the options whose values are not the same in all of ``options``."""
    if not options:
        return set()
    values = [dict(each) for each in options]
    keys = {key for each in values for key in each}
    return {key for key in keys if len({each.get(key) for each in values}) > 1}


def _set_task(run: Run, changed: Changes) -> None:
    run.task = dataclasses.replace(run.task, changed=run.task.changed + changed)


def _set_setting(run: Run, changed: Changes) -> None:
    run.setting = dataclasses.replace(run.setting, changed=changed)


# ------------------------------------------------------------------------------------------ grouping


def group(runs: Iterable[Run]) -> list[Cell]:
    """Put runs that differ in their seed alone into one cell."""
    groups: dict[tuple[Task, str, Setting], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.task, run.backbone, run.setting].append(run)
    cells = [
        Cell(*key, sorted(members, key=lambda run: run.seed)) for key, members in groups.items()
    ]
    return in_order(cells)


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Order cells: datasets as in ``published.yaml``, then by name, the shipped setting before others."""
    datasets = list(dict.fromkeys(row.dataset for row in all_rows()))

    def key(cell: Cell) -> tuple[Any, ...]:
        task = cell.task
        known = task.dataset in datasets
        return (
            datasets.index(task.dataset) if known else len(datasets),
            task.dataset,
            [(str(type(value)), value) for _, value in task.grid],
            task.changed,
            task.generated,
            cell.backbone,
            cell.setting.name,
            len(cell.setting.changed),
            cell.setting.changed,
        )

    return sorted(cells, key=key)
