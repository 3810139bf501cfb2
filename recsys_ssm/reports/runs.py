"""Hold what reports are made from: tasks, settings, finished runs, and cells of runs that differ in their seed alone.

A *task* is a dataset with its options. A *setting* is everything that a model was trained with, except the seed; its
name lists the options that differ from the shipped ones. Runs of one task, backbone and setting are one cell's seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import polars as pl

from recsys_ssm.run.published import backbone_name

Changes = tuple[tuple[str, str], ...]

_SHOWN = 6
_LONGEST_VALUE = 40


class Problem(NamedTuple):
    """Name a folder that is left out, with the reason."""

    folder: Path
    what: str


@dataclasses.dataclass(frozen=True)
class Task:
    """Describe a dataset by the options that differ from the shipped ones.

    Attributes:
        dataset: its name.
        kind: the task that models are built for: ``two_tower``, ``next_item``, or another.
        grid: values of the options that the dataset declares as a grid, by option.
        changed: other options of the data that differ, by option.
        generated: whether the data were generated in place of files.
        name: display name of the dataset.
    """

    dataset: str
    kind: str = "two_tower"
    grid: tuple[tuple[str, Any], ...] = ()
    changed: Changes = ()
    generated: bool = False
    name: str = ""

    @property
    def label(self) -> str:
        text = self.name or self.dataset
        if self.grid:
            text += " " + "/".join(str(value) for _, value in self.grid)
        if self.changed:
            text += f" ({spell(self.changed)})"
        return f"{text}, generated data" if self.generated else text


LEFT_OUT = "left out"
"""Name of the metrics in which a user's seen items are left out."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Describe a training by the options that differ from the shipped ones.

    Attributes:
        changed: options that differ from the shipped ones, or from the experiment's.
        is_published: whether the shipped setting is the recipe of a paper.
        name: the experiment that the run started from; empty for none.
        first: options to show first where there are too many to show all.
    """

    changed: Changes = ()
    is_published: bool = False
    name: str = ""
    first: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def is_shipped(self) -> bool:
        """Return True for the shipped setting itself."""
        return not self.changed and not self.name

    @property
    def label(self) -> str:
        if self.is_shipped:
            return "published setting" if self.is_published else "default setting"
        return " ".join(part for part in (self.name, spell(self.changed, self.first)) if part)


@dataclasses.dataclass(eq=False)
class Run:
    """Hold a finished run: its config and its results."""

    folder: Path
    results: dict[str, Any]
    config: dict[str, Any]
    task: Task
    setting: Setting
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    validation: float = math.nan
    """The best monitored value, by which settings are compared; NaN if unknown."""
    is_compared: bool = True
    """True if the setting was named by comparison with a shipped config."""
    data_options: Changes = ()
    """All options of a dataset that is not shipped."""

    @property
    def seed(self) -> int:
        return int(self.results["seed"])

    @property
    def backbone(self) -> str:
        return backbone_name(self.config)

    @property
    def metrics(self) -> dict[str, float]:
        return numbers(self.results.get("metrics"))

    @property
    def sees_query_time(self) -> bool:
        """True if the model sees the time of the item that it predicts."""
        return self.results.get("sees_query_time") is True

    @property
    def data(self) -> dict[str, str] | None:
        """SHA-256 of each input file by its name, empty for sampled data; None if the run did not record it.

        A file's name is its path from ``dataset.root``, so the same file has the same name on every machine.
        """
        found = self.results.get("data")
        if not isinstance(found, dict):
            return None
        options = self.config.get("dataset")
        root = options.get("root") if isinstance(options, dict) else None
        return {_from_root(str(k), root): str(v) for k, v in found.items()}

    def test_users(self) -> pl.DataFrame | None:
        return _read_table(self.folder / "test_users.parquet")

    def items(self) -> pl.DataFrame | None:
        return _read_table(self.folder / "items.parquet")


@dataclasses.dataclass(eq=False)
class Cell:
    """Group the runs of one task, backbone and setting, ordered by seed."""

    task: Task
    backbone: str
    setting: Setting
    runs: list[Run]

    @property
    def n(self) -> int:
        return len(self.runs)

    @property
    def sees_query_time(self) -> bool:
        """True if the models see the time of the item that they predict."""
        return any(run.sees_query_time for run in self.runs)

    def values(self, metric: str, group: str = "metrics") -> dict[int, float]:
        """Return a metric's value by seed; ``group`` names the part of ``metrics.json``.

        The group :data:`LEFT_OUT` is the part with seen items left out, under whatever name a run has it.
        """

        def part(run: Run) -> Mapping[str, Any]:
            if group == LEFT_OUT:
                return run.results.get("metrics_filtered") or run.results.get("metrics") or {}
            return run.results.get(group) or {}

        found = {run.seed: number(part(run).get(metric)) for run in self.runs}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def baseline(self, name: str, metric: str) -> dict[int, float]:
        """Return a baseline's value by seed."""
        found = {
            run.seed: number(((run.results.get("baselines") or {}).get(name) or {}).get(metric))
            for run in self.runs
        }
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def validations(self) -> dict[int, float]:
        """Return the best monitored validation value by seed."""
        return {run.seed: run.validation for run in self.runs if math.isfinite(run.validation)}


@dataclasses.dataclass
class Collection:
    """Hold everything that was found.

    Attributes:
        cells: tested runs, grouped.
        problems: folders that are left out.
        trials: runs that were validated and not tested, such as the trials of a search.
    """

    cells: list[Cell]
    problems: list[Problem]
    trials: list[Run] = dataclasses.field(default_factory=list)

    @property
    def tasks(self) -> list[Task]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    def of(self, task: Task, backbone: str | None = None) -> list[Cell]:
        return [c for c in self.cells if c.task == task and backbone in (None, c.backbone)]

    def backbones(self, task: Task) -> list[str]:
        return list(dict.fromkeys(cell.backbone for cell in self.of(task)))


def number(value: Any) -> float:
    """Return a value of a file as a float; NaN if it is not a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def numbers(values: Any) -> dict[str, float]:
    """Return the finite numbers among a mapping's values."""
    found = values.items() if isinstance(values, Mapping) else ()
    return {str(name): number(value) for name, value in found if math.isfinite(number(value))}


def spell(changed: Iterable[tuple[str, str]], first: Iterable[str] = ()) -> str:
    """Write changed options for people: ``optimizer.lr=0.0003 scheduler=WarmupCosine``.

    At most ``_SHOWN`` options are written, those named in ``first`` before the others; long values are cut.
    """
    changed = list(changed)
    if len(changed) > _SHOWN:
        leading = set(first)
        changed.sort(key=lambda change: change[0] not in leading)
    words = [f"{key.removesuffix('._target_')}={_cut(value)}" for key, value in changed[:_SHOWN]]
    more = len(changed) - len(words)
    return " ".join(words) + (f" and {more} more" if more else "")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _read_table(path: Path) -> pl.DataFrame | None:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError):
        return None


def _from_root(path: str, root: object) -> str:
    """Return a file's path from the folder of the dataset; of another absolute path its folder and name."""
    if isinstance(root, str) and PurePath(path).is_relative_to(root):
        return PurePath(path).relative_to(root).as_posix()
    return "/".join(PurePath(path).parts[-2:]) if PurePath(path).is_absolute() else path
