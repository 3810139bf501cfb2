"""Runs out of a tree of folders: what each is, what is wrong with the others, and which are seeds of one setting.

A *task* is what there is to learn: a dataset with its options. A *setting* is everything a model was trained with,
the seed aside; settings are named by what they change of the shipped recipe. Runs of one task, backbone and setting are
the seeds of one cell of a table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import polars as pl
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import OmegaConf

from recsys_ssm.errors import UserError
from recsys_ssm.paths import CONF_DIR
from recsys_ssm.run.settings import Settings, differences, read_config, settings
from recsys_ssm.sweeps.status import STATUS, job_state, read_status

RUN_FILES = ("metrics.json", "config.yaml", STATUS, "history.json", "train.log")
"""A folder with any of these is, or was to be, a run."""

_CELL_OPTIONS = ("dataset.k", "dataset.n_messages")
"""Options that make a cell of the paper's second table, and so no other task than the published one."""

_PARTS = ("baselines", "cost", "latency", "metrics_all_users", "metrics_unfiltered", "parameters")
"""What of ``metrics.json`` is a table of its own, beside ``metrics``."""


class Problem(NamedTuple):
    """A folder that is left out, and why."""

    folder: Path
    what: str


@dataclasses.dataclass(frozen=True)
class Task:
    """What there is to learn: ``dataset`` with the options that differ from the shipped ones."""

    dataset: str
    cell: tuple[int, int] | None = None
    changed: tuple[tuple[str, str], ...] = ()
    generated: bool = False

    @property
    def label(self) -> str:
        name = {"spotify": "Spotify", "hm": "H&M", "vaccine": "Vaccine"}.get(
            self.dataset, self.dataset
        )
        if self.cell is not None:
            name += f" {self.cell[0]}/{self.cell[1]}"
        if self.changed:
            name += f" ({spell(self.changed)})"
        return f"{name}, generated data" if self.generated else name


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a backbone was trained: what differs from the shipped recipe; nothing where that was followed."""

    changed: tuple[tuple[str, str], ...] = ()
    is_published: bool = False

    @property
    def label(self) -> str:
        if self.changed:
            return spell(self.changed)
        return "published setting" if self.is_published else "default setting"


@dataclasses.dataclass(eq=False)
class Run:
    """A finished run: what it was made of and what it found."""

    folder: Path
    results: dict[str, Any]
    config: dict[str, Any]
    task: Task
    setting: Setting
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    validation: float = math.nan
    """The best monitored value: what a setting is chosen by. NaN where it is not known."""

    @property
    def seed(self) -> int:
        return int(self.results["seed"])

    @property
    def backbone(self) -> str:
        return backbone_of(self.config)

    @property
    def is_next_item(self) -> bool:
        return "metrics_unfiltered" in self.results

    @property
    def metrics(self) -> dict[str, float]:
        return numbers(self.results.get("metrics"))

    def test_users(self) -> pl.DataFrame | None:
        return _read_table(self.folder / "test_users.parquet")

    def items(self) -> pl.DataFrame | None:
        return _read_table(self.folder / "items.parquet")


@dataclasses.dataclass(eq=False)
class Cell:
    """The seeds of one task, backbone and setting, by seed."""

    task: Task
    backbone: str
    setting: Setting
    runs: list[Run]

    @property
    def n(self) -> int:
        return len(self.runs)

    def values(self, metric: str, group: str = "metrics") -> dict[int, float]:
        """A metric's value of each seed that has it; ``group`` names the part of ``metrics.json``."""
        found = {run.seed: number((run.results.get(group) or {}).get(metric)) for run in self.runs}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def baseline(self, name: str, metric: str) -> dict[int, float]:
        found = {
            run.seed: number(((run.results.get("baselines") or {}).get(name) or {}).get(metric))
            for run in self.runs
        }
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def validations(self) -> dict[int, float]:
        """The best monitored value on validation of each seed that kept it."""
        return {run.seed: run.validation for run in self.runs if math.isfinite(run.validation)}


@dataclasses.dataclass
class Collection:
    """Everything found: cells in the order of the paper, and folders that are left out."""

    cells: list[Cell]
    problems: list[Problem]

    @property
    def tasks(self) -> list[Task]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    def of(self, task: Task, backbone: str | None = None) -> list[Cell]:
        return [c for c in self.cells if c.task == task and backbone in (None, c.backbone)]


def number(value: Any) -> float:
    """A figure of a file as a float; NaN for what is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def numbers(values: Any) -> dict[str, float]:
    """The figures among a mapping's values."""
    found = values.items() if isinstance(values, Mapping) else ()
    return {str(name): number(value) for name, value in found if math.isfinite(number(value))}


def spell(changed: Iterable[tuple[str, str]]) -> str:
    """Changed options for people: ``optimizer.lr=0.0003 scheduler=WarmupCosine``."""
    return " ".join(f"{key.removesuffix('._target_')}={value}" for key, value in changed)


def backbone_of(config: Mapping[str, Any]) -> str:
    """The backbone's name: that of its class, in lower case."""
    target = (config.get("backbone") or {}).get("_target_")
    return str(target).rpartition(".")[2].lower()


# ---------------------------------------------------------------------------------------- collecting


def collect(folders: Sequence[Path], others: Iterable[Run] = ()) -> Collection:
    """All runs below ``folders``, and ``others``, put together by what they are seeds of.

    Raises:
        UserError: One of the folders is not there.
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
    return Collection(_cells(_without_repeats(runs, problems)), problems)


def _run_folders(root: Path, problems: list[Problem]) -> list[Path]:
    """Folders that are runs, or were to be; empty ones go to ``problems``."""
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
            # Seeds that were trained at once have a folder each within.
            pending += [
                entry
                for entry in entries
                if not entry.name.startswith(".")
                and any((entry / name).is_file() for name in RUN_FILES)
            ]
        elif not names and folder != root:
            problems.append(Problem(folder, "empty"))
        elif folder == root or "report.html" not in names:  # a report holds no runs
            pending += [
                entry
                for entry in entries
                if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith(".")
            ]
    return sorted(found)


def read_run(folder: Path) -> Run | None:
    """A finished run; None for one of many seeds at once, each of which is a run in a folder within.

    Raises:
        UserError: It is none: what is missing or broken in it.
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
    if not isinstance(results.get("metrics"), dict):
        raise UserError("not tested (test=null)")
    if not isinstance(results.get("seed"), int):
        raise UserError("an evaluation, not a training: metrics.json has no seed")
    if not numbers(results["metrics"]):
        raise UserError("metrics.json has no finite figure")
    for part in _PARTS:
        if not isinstance(results.get(part) or {}, dict):
            raise UserError(f"metrics.json is broken ({part}: expected names with values)")
    try:
        config = read_config(folder / "config.yaml")
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}/", "")) from error
    for part, key in (("backbone", "_target_"), ("dataset", "name")):
        node = config.get(part)
        if not isinstance(node, dict) or not isinstance(node.get(key), str):
            raise UserError(f"config.yaml is of another program: no {part}.{key}")
    return make_run(folder, results, config, _read_history(folder / "history.json"))


def make_run(
    folder: Path,
    results: dict[str, Any],
    config: dict[str, Any],
    history: list[dict[str, Any]],
) -> Run:
    """A run out of its parts, its task and setting found by holding it against the shipped recipe."""
    own = settings(config)
    dataset = config["dataset"]
    options = [dataset.get(key.partition(".")[2]) for key in _CELL_OPTIONS]
    cell = (options[0], options[1]) if all(isinstance(value, int) for value in options) else None
    shipped = _shipped(str(dataset.get("name")), backbone_of(config), cell)
    base, is_published = shipped if shipped is not None else ({}, False)
    changed = {
        key: (old, new)
        for key, (old, new) in differences(base, own).items()
        if key not in _CELL_OPTIONS
    }
    if shipped is None:  # nothing to hold it against: every option counts
        changed = {key: (None, value) for key, value in own.items()}
    of_data = tuple((k, _show(new)) for k, (_, new) in changed.items() if k.startswith("dataset."))
    of_model = tuple(
        (k, _show(new)) for k, (_, new) in changed.items() if not k.startswith("dataset.")
    )
    task = Task(
        str(results["dataset"]),
        cell,
        of_data if shipped is not None else (),
        bool(results.get("generated")),
    )
    setting = Setting(of_model, is_published)
    return Run(folder, results, config, task, setting, history, _best_monitored(config, history))


def _best_monitored(config: Mapping[str, Any], history: Iterable[Mapping[str, Any]]) -> float:
    values = [number(record.get(str(config.get("monitor")))) for record in history]
    best = min if config.get("monitor_mode") == "min" else max
    return best((value for value in values if math.isfinite(value)), default=math.nan)


def _show(value: Any) -> str:
    text = str(value)
    return text.rpartition(".")[2] if text.startswith(("recsys_ssm.", "torch.")) else text


@functools.cache
def _shipped(
    dataset: str, backbone: str, cell: tuple[int, int] | None
) -> tuple[Settings, bool] | None:
    """Settings of the shipped recipe and whether it is a published one; None for a dataset of a user's own."""
    cfg = compose_shipped(dataset, backbone, cell)
    if cfg is None:
        return None
    return settings(cfg), bool(cfg.get("published"))


@functools.cache
def compose_shipped(
    dataset: str, backbone: str, cell: tuple[int, int] | None = None
) -> dict[str, Any] | None:
    """The whole config of ``dataset=… backbone=…``; None where there is no such dataset or backbone."""
    from recsys_ssm.cli.resolvers import register_resolvers

    if not all(
        (CONF_DIR / group / f"{name}.yaml").is_file()
        for group, name in (("dataset", dataset), ("backbone", backbone))
    ):
        return None
    overrides = [f"dataset={dataset}", f"backbone={backbone}", "output_dir=.", "name=shipped"]
    if cell is not None:
        overrides += [f"{key}={value}" for key, value in zip(_CELL_OPTIONS, cell, strict=True)]
    register_resolvers()
    running = get_gh_backup()  # the door's own Hydra, which knows nothing of the training's options
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = hydra.compose("train", overrides)
            found: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
            return found
    finally:
        restore_gh_from_backup(running)


def _unfinished(folder: Path) -> str:
    state = job_state(folder)
    if state == "running":
        return "still running"
    if state == "failed":
        lines = str(read_status(folder).get("error") or "").strip().splitlines() or ["no message"]
        return f"failed: {lines[-1].removeprefix('error: ')}"
    return "not finished: no metrics.json"


def _read_history(path: Path) -> list[dict[str, Any]]:
    """The records of ``history.json``; none where it is absent (older runs) or broken."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(records, list):
        return []
    return [r for r in records if isinstance(r, dict) and math.isfinite(number(r.get("step")))]


def _read_table(path: Path) -> pl.DataFrame | None:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError):
        return None


def _without_repeats(runs: Iterable[Run], problems: list[Problem]) -> list[Run]:
    """The newest of runs that are the same seed of the same setting."""
    newest: dict[tuple[Any, ...], Run] = {}
    for run in sorted(runs, key=_written):
        key = (run.task, run.backbone, run.setting, run.seed)
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


def _cells(runs: Iterable[Run]) -> list[Cell]:
    groups: dict[tuple[Task, str, Setting], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.task, run.backbone, run.setting].append(run)
    cells = [
        Cell(*key, sorted(members, key=lambda run: run.seed)) for key, members in groups.items()
    ]
    return in_order(cells)


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """The papers' order: datasets, then cells, then Mamba before the Transformer, shipped settings first."""
    return sorted(cells, key=_place)


def _place(cell: Cell) -> tuple[Any, ...]:
    datasets, backbones = ("spotify", "hm", "vaccine"), ("mamba", "transformer")
    task = cell.task
    return (
        datasets.index(task.dataset) if task.dataset in datasets else len(datasets),
        task.dataset,
        task.cell or (0, 0),
        task.changed,
        task.generated,
        backbones.index(cell.backbone) if cell.backbone in backbones else len(backbones),
        cell.backbone,
        len(cell.setting.changed),
        cell.setting.changed,
    )
