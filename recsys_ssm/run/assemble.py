"""Assemble a run's objects from its config, test its model, and write what belongs in its folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import polars as pl
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from recsys_ssm.data.base import RecommenderData
from recsys_ssm.errors import UserError
from recsys_ssm.features import FeatureSchema
from recsys_ssm.instantiate import (
    check,
    defaults_of,
    import_target,
    instantiate,
    instantiate_all,
    plain,
    spec,
    takes,
)
from recsys_ssm.metrics import MetricName
from recsys_ssm.models.optim import configure_optimizers
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.run.callbacks import Cost
from recsys_ssm.run.checkpoint_io import HASHES, AtomicCheckpointIO
from recsys_ssm.run.checkpoints import newest_valid
from recsys_ssm.run.curves import plot_curves
from recsys_ssm.run.files import VALIDATIONS, versions, write_table, write_text
from recsys_ssm.run.loggers import wandb_logger

PARTS = ("tokenizer", "backbone", "head", "loss", "optimizer", "scheduler", "text")
"""Parts of a model: each is a group of options. A model is passed those that its class takes."""


def check_config(cfg: DictConfig) -> None:
    """Check every part of a config against the class it names, before any time is spent.

    Raises:
        UserError: An option is unknown or of the wrong type.
    """
    callbacks = [f"callbacks.{name}" for name in cfg.callbacks or {}]
    check(cfg, "dataset", "model", *PARTS, "trainer", *callbacks, *logger_options(cfg))
    if cfg.test not in ("best", "last", None):
        raise UserError(f"test={cfg.test}: expected best, last or null")
    if cfg.monitor_mode not in ("min", "max"):
        raise UserError(f"monitor_mode={cfg.monitor_mode}: expected min or max")
    if not (_is_int(cfg.seed) and 0 <= cfg.seed < 2**32):
        raise UserError(f"seed={cfg.seed}: give a whole number from 0 to {2**32 - 1}")
    accumulate = cfg.trainer.get("accumulate_grad_batches", 1)
    if not (_is_int(accumulate) and accumulate >= 1):
        raise UserError(f"trainer.accumulate_grad_batches={accumulate}: give at least 1")
    if cfg.metrics is not None:
        check_metrics(as_list(cfg.metrics))
    check_trainer(cfg)
    check_name(str(cfg.name), "name")
    if cfg.sweep is not None:
        check_name(str(cfg.sweep), "sweep")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_name(name: str, option: str) -> str:
    """Return a name if it is one of a file or folder, and not a path.

    Raises:
        UserError: It is not.
    """
    if not name or name.strip(".") == "" or any(part in name for part in ("/", "\\", "\0")):
        raise UserError(
            f"{option}={name}: not the name of a folder; leave out slashes and dots alone"
        )
    if len(name.encode()) > 200:
        raise UserError(f"{option}={name[:40]}…: {len(name)} characters; give at most 200")
    return name


def as_list(value: Any) -> list[str]:
    """Return the texts of an option that takes a list; one word without brackets is a list of one."""
    value = plain(value)
    if value is None:
        return []
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def check_trainer(cfg: DictConfig) -> None:
    """Check the trainer's options as Lightning does, and that checkpoints can be written, before data is read.

    Raises:
        UserError: Lightning refuses an option, or a folder for checkpoints cannot be written.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the trainer that is made later prints the same lines
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_trainer(cfg, [], [])
    finally:
        logger.setLevel(level)
    for name, node in (cfg.callbacks or {}).items():
        if node is not None and node.get("dirpath") is not None:
            check_writable(Path(str(node.dirpath)), f"callbacks.{name}.dirpath")


def check_intervals(cfg: DictConfig, data: RecommenderData[Any]) -> None:
    """Check that an epoch has as many batches as one validation waits for.

    Raises:
        UserError: It has fewer: no validation would ever be run.
    """
    interval = cfg.trainer.get("val_check_interval")
    if not _is_int(interval) or cfg.trainer.get("check_val_every_n_epoch", 1) is None:
        return
    n_batches = len(data.train_dataloader())
    if interval > n_batches:
        raise UserError(
            f"trainer.val_check_interval={interval}: an epoch has {n_batches} batches; give at most so many, or "
            "trainer.check_val_every_n_epoch=null to count over the epochs"
        )


LARGEST_K = 10_000
"""Most places of a ranking metric: the ranking of every test user has so many."""


def check_metrics(names: Sequence[str]) -> None:
    """Check the names of ranking metrics, before memory is spent on their rankings.

    Raises:
        UserError: A name is unknown, or its ``k`` is too large.
    """
    if not names:
        raise UserError("metrics=[]: none; give at least one, as metrics=hr@10")
    for name in names:
        if MetricName.parse(name).k > LARGEST_K:
            raise UserError(
                f"metrics={name}: ranks more than {LARGEST_K:,} items for each user; give a smaller number behind @"
            )


def make_data(cfg: DictConfig) -> RecommenderData[Any]:
    """Build the dataset that a config describes."""
    data: RecommenderData[Any] = instantiate(cfg.dataset, "dataset")
    return data


def make_model(cfg: DictConfig, data: RecommenderData[Any], **given: Any) -> Recommender:
    """Build the model that a config describes, for a dataset.

    Args:
        cfg: The config.
        data: The dataset.
        given: Further arguments of the model.

    Raises:
        UserError: An option is wrong, or model and dataset do not fit.
    """
    module: type[Recommender] = import_target(cfg.model["_target_"], "model")
    parts = {name: spec(cfg.get(name), name) for name in PARTS if takes(module, name)}
    metrics = ranking_metrics(cfg, defaults_of(module)["metrics"])
    model: Recommender = instantiate(
        cfg.model, "model", **module.arguments_for(data, **parts), **parts, **given, metrics=metrics
    )
    if chosen := getattr(
        model, "optimizer_spec", None
    ):  # a wrong rate is found before the training
        configure_optimizers(model, chosen, None)
    return model


def ranking_metrics(cfg: DictConfig, default: list[str]) -> list[str]:
    """Return the configured metrics and the monitored one: checkpoints and early stopping follow it."""
    names = default if cfg.metrics is None else as_list(cfg.metrics)
    part, _, monitored = cfg.monitor.partition("/")
    is_metric = part == "val" and "@" in monitored
    return [*names, *([monitored] if is_metric and monitored not in names else [])]


def make_callbacks(cfg: DictConfig) -> list[L.Callback]:
    """Build the configured callbacks, without those that need a logger or a progress bar that is not there."""
    idle: list[type[L.Callback]] = []
    if not logger_options(cfg):
        idle.append(LearningRateMonitor)
    if cfg.trainer.get("enable_progress_bar") is False:
        idle.append(ProgressBar)
    callbacks = instantiate_all(cfg.callbacks, "callbacks")
    return [callback for callback in callbacks if not isinstance(callback, tuple(idle))]


def logger_options(cfg: DictConfig) -> list[str]:
    """Return the names of the logger nodes: ``logger``, or ``logger.<name>`` for each of several."""
    if cfg.logger is None or cfg.logger.get("_target_", ...) is None:
        return []
    if "_target_" in cfg.logger:
        return ["logger"]
    return [f"logger.{name}" for name, node in cfg.logger.items() if node is not None]


def make_loggers(
    cfg: DictConfig, data: RecommenderData[Any], folder: Path, name: str
) -> list[Logger]:
    """Build the configured loggers; each is passed the folder, the run's name and tags as its class takes them."""
    tags = [*as_list(cfg.tags), *([str(cfg.sweep)] if cfg.sweep else [])]
    tags += ["generated"] if data.splits.generated else []
    given = {"save_dir": str(folder), "name": name, "run_name": name}
    made = []
    for option in logger_options(cfg):
        node = OmegaConf.select(cfg, option)
        target = import_target(node["_target_"], option)
        taken: dict[str, Any] = {k: v for k, v in given.items() if takes(target, k)}
        if target is wandb_logger:
            taken["tags"] = tags
        made.append(instantiate(node, option, **taken))
    return made


def make_trainer(
    cfg: DictConfig, callbacks: list[L.Callback], loggers: Sequence[Logger], **given: Any
) -> L.Trainer:
    """Build the configured trainer.

    Raises:
        UserError: Lightning refuses one of its options.
    """
    try:
        trainer: L.Trainer = instantiate(
            cfg.trainer,
            "trainer",
            callbacks=callbacks,
            logger=loggers or False,
            **{"plugins": [AtomicCheckpointIO()], **given},
        )
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:  # a value Lightning refuses
        raise UserError(
            f"trainer: {_one_line(error)}; change the option, see Lightning's Trainer"
        ) from error
    return trainer


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def find_checkpoint(ckpt_path: str | None, output: Path) -> Path | None:
    """Return the checkpoint a run resumes from; ``last`` is the newest valid one in its own folder.

    Raises:
        UserError: There is no such file, or ``last`` was stopped before its first checkpoint.
    """
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        folder = output / "checkpoints"
        if (folder / "last.ckpt").is_file() or (folder / "best.ckpt").is_file():
            return newest_valid(folder)
        if (output / "config.yaml").is_file():
            raise UserError(
                f"ckpt_path=last: {output} stopped before its first checkpoint; run the command without ckpt_path, or "
                "name the checkpoint of an older run: ckpt_path=<file>"
            )
        raise UserError(
            f"ckpt_path=last: no earlier run of this name under {output.parent}; check name= and output_root=, "
            "or leave ckpt_path out"
        )
    if not Path(ckpt_path).is_file():
        raise UserError(f"ckpt_path={ckpt_path}: no such file; give a .ckpt file, or last")
    return Path(ckpt_path)


def check_writable(folder: Path, option: str = "output_dir") -> None:
    """Create the folder that ``option`` names and check that it can be written, before the training."""
    probe = folder / ".write_test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{option}={folder}: cannot write there ({error.strerror}); choose another folder"
        ) from error


# Files that a run writes.
_FILES = (
    "config.yaml",
    "history.json",
    "metrics.json",
    "curves.png",
    "test_users.parquet",
    "items.parquet",
    VALIDATIONS,
)
_CHECKPOINTS = ("best.ckpt", "last.ckpt")


def check_places(folder: Path) -> None:
    """Check that no folder stands where a run writes a file.

    Raises:
        UserError: One does: the run could be trained, and its result not be kept.
    """
    kept = folder / "checkpoints"
    names = [each + end for each in _CHECKPOINTS for end in ("", HASHES)]
    for path in (*(folder / each for each in _FILES), *(kept / each for each in names)):
        if path.is_dir():
            raise UserError(
                f"cannot write {path}: a folder where a file of the run is written; move it away, or begin a new run"
            )


def full_config(cfg: DictConfig, name: str) -> dict[str, Any]:
    """Return the run's full config as plain data, with its name and the versions of what it depends on."""
    return {**plain(cfg), "name": name, "versions": versions()}


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.yaml``, the run's full config."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config))


def overrides() -> list[str]:
    """Return the overrides of the command line."""
    task = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return [each.removeprefix("++") for each in task]


def describe(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


def test_model(
    trainer: L.Trainer, model: Recommender, data: RecommenderData[Any]
) -> dict[str, Any]:
    """Test a model, and the baselines on the same users.

    Each test user's recommendations go to ``test_users.parquet`` and ``items.parquet`` in the trainer's folder.
    """
    trainer.test(model, datamodule=data, verbose=False)
    users = model.test_rankings.frame()
    if trainer.is_global_zero:
        folder = Path(trainer.default_root_dir)
        write_table(folder / "test_users.parquet", users)
        items = pl.DataFrame(
            {"item": data.splits.item_ids, "train_count": data.item_counts().numpy()}
        )
        write_table(folder / "items.parquet", items)
    results = model.test_results()
    baselines = data.baseline_metrics([str(name) for name in model.test_metrics.names])
    return {
        **results,
        "filter_seen": getattr(model, "filter_seen", None),
        "sees_query_time": bool(getattr(model, "sees_query_time", False)),
        "latency": model.latency(data),
        "baselines": {**baselines, **results.get("baselines", {})},
    }


def draw_curves(
    records: Sequence[dict[str, float]], folder: Path, cfg: DictConfig, title: str
) -> Path:
    """Draw a training history as ``curves.png``."""
    return plot_curves(
        records, folder / "curves.png", monitor=cfg.monitor, mode=cfg.monitor_mode, title=title
    )


def still_improving(
    records: Sequence[Mapping[str, float]], cfg: DictConfig, steps: int
) -> str | None:
    """Return advice if the last validation was the best one, so that a longer training may be better."""
    values = [(record[cfg.monitor], record["step"]) for record in records if cfg.monitor in record]
    if len(values) < 2:
        return None
    best = (min if cfg.monitor_mode == "min" else max)(values, key=lambda pair: pair[0])
    if best[1] != values[-1][1] or best[0] == values[-2][0]:
        return None
    option = "trainer.max_steps" if cfg.trainer.get("max_steps", -1) > 0 else "trainer.max_epochs"
    return (
        f"{cfg.monitor} was still improving when the training ended, at step {steps}: "
        f"resume it with ckpt_path=last and a larger {option}"
    )


def why_stopped(trainer: L.Trainer) -> str | None:
    """Return at which step and why a training ended before its last step; None if it did not."""
    for callback in trainer.early_stopping_callbacks:
        monitor, best = callback.monitor, float(callback.best_score)
        reasons = {
            EarlyStoppingReason.PATIENCE_EXHAUSTED: f"{monitor} was not better than {best:.4f} in "
            f"{callback.wait_count} validations in a row (callbacks.early_stopping.patience)",
            EarlyStoppingReason.NON_FINITE_METRIC: f"{monitor} is not a finite number",
            EarlyStoppingReason.STOPPING_THRESHOLD: f"{monitor} reached stopping_threshold="
            f"{callback.stopping_threshold}",
            EarlyStoppingReason.DIVERGENCE_THRESHOLD: f"{monitor} reached divergence_threshold="
            f"{callback.divergence_threshold}",
        }
        reason = reasons.get(callback.stopping_reason)
        patient = callback.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
        if reason and not (patient and callback.wait_count < callback.patience):
            return f"early stopping at step {trainer.global_step}: {reason}"
    return None


def describe_features(splits: Any) -> list[str]:
    """Return a line for each side, users and items, on its features: columns, and the numbers of their values."""
    lines = []
    for side in ("user", "item"):
        schema: FeatureSchema | None = getattr(splits, f"{side}_schema", None)
        if schema is None or not schema.n_features:
            continue
        words = [f"{field.name} (number)" for field in schema.numeric]
        words += [f"{field.name} ({len(field.values):,} values)" for field in schema.categorical]
        more = len(words) - _SHOWN_FEATURES
        shown = ", ".join(words[:_SHOWN_FEATURES]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"features of {side}s: {shown}")
    return lines


_SHOWN_FEATURES = 12


def duration(seconds: float) -> str:
    """Return a duration for people: ``12 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def timed(records: list[dict[str, float]], cost: Cost) -> list[dict[str, float]]:
    """Return a history with the time of each validation.

    Times are added here since the history itself must be the same for the same seed.
    """
    return [
        record | {"seconds": seconds}
        if "val/loss" in record and (seconds := cost.seconds.get(int(record["step"])))
        else record
        for record in records
    ]
