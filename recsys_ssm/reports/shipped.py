"""Compare a run's options with the shipped ones: what task it had, and what its setting changes."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recsys_ssm.paths import CONF_DIR
from recsys_ssm.reports.runs import Changes, Setting, Task
from recsys_ssm.run.defaults import known_class, option, with_defaults
from recsys_ssm.run.published import backbone_name, published_for
from recsys_ssm.run.settings import Settings, differences, settings

_OF_TRAINING = re.compile(
    r"dataset\.(batch_size|batch_positions|batch_samples|max_length|n_val_loss|objective|row_length|shuffle"
    r"|start_token|windows)"
)
"""Options of a dataset that decide how a model is trained; the task stays the same."""

_NAME = re.compile(r"[\w-]{1,100}(?:/[\w-]{1,100}){0,3}")
_EXPERIMENT = re.compile(rf"experiment=({_NAME.pattern})")

_UNKNOWN = object()

Grid = tuple[tuple[str, Any], ...]


class Place(NamedTuple):
    """Hold the task and the setting of a run.

    ``compared``: whether the setting was named by comparison with shipped options; otherwise it holds every option.
    ``data_options``: every option of a dataset that is not shipped. The runs of a report are then named by the options
    that differ among them.
    """

    task: Task
    setting: Setting
    compared: bool
    data_options: Changes


def place(config: Mapping[str, Any], results: Mapping[str, Any]) -> Place:
    """Return the task and the setting of a run.

    Args:
        config: The run's config as plain data. Nothing in it is called, imported or resolved.
        results: Its ``metrics.json``.
    """
    config = with_defaults(config)
    own = settings(config)
    dataset, backbone, grid = (
        str(option(config, "dataset.name")),
        backbone_name(config),
        grid_of(config),
    )
    shipped = _shipped(dataset, backbone, grid)
    of_dataset = _shipped(dataset, None, grid)
    # A dataset of a user's own from a class that ships: models are compared with the shipped ones on that class.
    like = shipped or _shipped(_dataset_of(str(option(config, "dataset._target_"))), backbone, grid)
    base = _experiment(results, dataset, backbone, grid)
    keys = {key for key, _ in grid}

    def changes(base: Settings, data: bool) -> Changes:
        found = differences(base, own).items()
        return tuple(
            (key, show_option(new))
            for key, (_, new) in found
            if _is_data(key) == data and key not in keys
        )

    every: Settings = dict.fromkeys(own, _UNKNOWN)
    reference = shipped or of_dataset
    of_model = changes((base or like).settings if like else every, data=False)
    of_data = () if reference else changes(every, data=True)
    task = Task(
        str(results.get("dataset", dataset)),
        kind_of(config, results),
        grid,
        changes(reference.settings, data=True) if reference else (),
        bool(results.get("generated")),
        display_name(config, dataset, shipped=reference is not None),
    )
    is_published = shipped is not None and shipped.is_published
    setting = Setting(of_model, is_published, base.experiment if base and shipped else "")
    return Place(task, setting, like is not None, of_data)


def _is_data(key: str) -> bool:
    return key.startswith("dataset.") and not _OF_TRAINING.fullmatch(key)


def grid_of(config: Mapping[str, Any]) -> Grid:
    """Return the values of the options that the dataset's class declares as its grid."""
    dataset = known_class(option(config, "dataset._target_"))
    names = getattr(dataset, "grid", ())
    found = tuple((f"dataset.{name}", option(config, f"dataset.{name}")) for name in names)
    is_whole = found and all(isinstance(value, int | float | str) for _, value in found)
    return found if is_whole else ()


def kind_of(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the task that a run's model is built for: ``two_tower``, ``next_item``, or the model's name.

    Models of titles are compared with those of next items.
    """
    if option(config, "text") is not None:
        return "next_item"
    for path in ("task", "task.name"):
        if isinstance(value := option(config, path), str):
            return value
    for path, allowed in (("model", None), ("head", ("two_tower", "next_item"))):
        words = re.findall(
            "[A-Z][a-z0-9]*", str(option(config, f"{path}._target_", "")).rpartition(".")[2]
        )
        name = "_".join(words).lower()
        if name and (allowed is None or name in allowed):
            return name
    return "next_item" if "metrics_unfiltered" in results else "two_tower"


def display_name(config: Mapping[str, Any], dataset: str, *, shipped: bool) -> str:
    """Return the label that a dataset's class declares; a dataset of a user's own has its name."""
    label = getattr(known_class(option(config, "dataset._target_")), "label", None)
    return str(label) if shipped and label else dataset


def show_option(value: Any) -> str:
    """Write an option's value; classes of ours and of PyTorch without their module."""
    text = str(value)
    return text.rpartition(".")[2] if text.startswith(("recsys_ssm.", "torch.")) else text


@functools.cache
def _dataset_of(target: str) -> str:
    """Return the name of the shipped dataset that is a config of a class; empty for none."""
    for path in sorted((CONF_DIR / "dataset").glob("*.yaml")):
        if yaml.safe_load(path.read_text(encoding="utf-8")).get("_target_") == target:
            return path.stem
    return ""


class _Base(NamedTuple):
    """Hold shipped options to compare with."""

    settings: Settings
    is_published: bool
    experiment: str = ""


@functools.cache
def _shipped(dataset: str, backbone: str | None, grid: Grid) -> _Base | None:
    cfg = compose_shipped(dataset, backbone, grid)
    if cfg is None:
        return None
    row = published_for(cfg)
    return _Base(settings(cfg), row is not None and row.shipped_recipe)


def _experiment(
    results: Mapping[str, Any], dataset: str, backbone: str, grid: Grid
) -> _Base | None:
    overrides = results.get("overrides")
    matches = [
        match
        for each in (overrides if isinstance(overrides, list) else [])
        if (match := _EXPERIMENT.fullmatch(str(each)))
    ]
    if not matches:
        return None
    return _with_experiment(dataset, backbone, grid, matches[-1][1])


@functools.cache
def _with_experiment(dataset: str, backbone: str, grid: Grid, experiment: str) -> _Base | None:
    plain = _shipped(dataset, backbone, grid)
    cfg = compose_shipped(dataset, backbone, grid, experiment)
    if plain is None or cfg is None:
        return None
    own = settings(cfg)
    changed = [key for key in differences(plain.settings, own) if not _is_data(key)]
    return _Base(own, plain.is_published, experiment) if changed else plain


@functools.cache
def compose_shipped(
    dataset: str, backbone: str | None = None, grid: Grid = (), experiment: str | None = None
) -> dict[str, Any] | None:
    """Return the config of ``dataset=… backbone=…``, defaults filled in; None if one of them is not shipped.

    A model of titles has no backbone; the experiment of its name in ``conf/experiment/text`` stands for it.
    """
    from recsys_ssm.cli.resolvers import register_resolvers

    if backbone is not None and (CONF_DIR / "experiment" / "text" / f"{backbone}.yaml").is_file():
        backbone, experiment = None, f"text/{backbone}"
    named = {"dataset": dataset, "backbone": backbone, "experiment": experiment}
    choices = {group: name for group, name in named.items() if name is not None}
    for group, name in choices.items():
        if not _NAME.fullmatch(name) or not (CONF_DIR / group / f"{name}.yaml").is_file():
            return None
    overrides = [f"{group}={name}" for group, name in choices.items()]
    overrides += ["output_dir=.", "name=shipped", *(f"++{key}={value}" for key, value in grid)]
    register_resolvers()
    running = (
        get_gh_backup()
    )  # the report's own Hydra, which does not know the options of a training
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = hydra.compose("train", overrides)
            found = OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException):
        return None
    finally:
        restore_gh_from_backup(running)
    assert isinstance(found, dict)
    return with_defaults({str(key): value for key, value in found.items()})
