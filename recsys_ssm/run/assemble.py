"""What the doors share of a run: what it is made of, and what it leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import polars as pl
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from omegaconf import DictConfig, OmegaConf

from recsys_ssm.data.base import RecommenderData
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import import_target, make_all, plain, spec
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.run.callbacks import Cost
from recsys_ssm.run.curves import plot_curves
from recsys_ssm.run.files import versions, write_table, write_text


def make_model(cfg: DictConfig, data: RecommenderData[Any]) -> Recommender:
    """The model ``cfg`` describes, for a dataset.

    Raises:
        UserError: An option is wrong, or head and dataset do not fit.
    """
    head = plain(cfg.head)
    module: type[Recommender] = import_target(head.pop("_target_"), "head")
    del head["metrics"]  # only what cfg.metrics is by default
    return module.for_data(
        data,
        tokenizer=plain(cfg.tokenizer),
        backbone=spec(cfg.backbone, "backbone"),
        head=head,
        optimizer=spec(cfg.optimizer, "optimizer"),
        scheduler=spec(cfg.scheduler, "scheduler"),
        metrics=ranking_metrics(cfg),
    )


def ranking_metrics(cfg: DictConfig) -> list[str]:
    """The metrics asked for, and the monitored one: checkpoints and early stopping follow it."""
    names: list[str] = plain(cfg.metrics)
    part, _, monitored = cfg.monitor.partition("/")
    is_metric = part == "val" and "@" in monitored
    return [*names, *([monitored] if is_metric and monitored not in names else [])]


def make_callbacks(cfg: DictConfig) -> list[L.Callback]:
    """The configured callbacks, without those that the trainer's or the logger's choice leaves nothing to do."""
    idle: list[type[L.Callback]] = []
    if spec(cfg.logger, "logger") is None:
        idle.append(LearningRateMonitor)
    if not cfg.trainer.get("enable_progress_bar", True):
        idle.append(ProgressBar)
    callbacks = make_all(cfg.callbacks, "callbacks")
    return [callback for callback in callbacks if not isinstance(callback, tuple(idle))]


def callback_options(cfg: DictConfig) -> list[str]:
    return [f"callbacks.{name}" for name in cfg.callbacks or {}]


def logger_tags(cfg: DictConfig, data: RecommenderData[Any]) -> dict[str, Any]:
    """Arguments only the W&B logger takes."""
    if not str(cfg.logger.get("_target_")).endswith("wandb_logger"):
        return {}
    sweep = [cfg.sweep] if cfg.sweep else []
    return {"tags": [*cfg.tags, *sweep, *(["generated"] if data.splits.generated else [])]}


def finish(logger: Any, failed: bool) -> None:
    """End the W&B run, whatever happened: the next job of a sweep must not write into it."""
    if isinstance(logger, L.pytorch.loggers.WandbLogger):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))


def find_checkpoint(ckpt_path: str | None, output: Path) -> Path | None:
    """Where a run goes on from; ``last`` is the checkpoint in its own folder.

    Raises:
        UserError: There is no such file.
    """
    if ckpt_path is None:
        return None
    path = output / "checkpoints" / "last.ckpt" if ckpt_path == "last" else Path(ckpt_path)
    if not path.is_file():
        raise UserError(
            f"ckpt_path=last: no earlier run of this name left a checkpoint under {output.parent}"
            if ckpt_path == "last"
            else f"ckpt_path={ckpt_path}: no such file"
        )
    return path


def check_writable(folder: Path, option: str = "output_dir") -> None:
    """Make the folder that ``option`` names if it is not there; fail before the training, not after it."""
    probe = folder / ".write_test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{option}={folder}: cannot write there ({error.strerror}); choose another folder"
        ) from error


def write_config(folder: Path, cfg: DictConfig, name: str) -> dict[str, Any]:
    """``config.yaml``, what the run in ``folder`` is made of; returns the same."""
    config = {**plain(cfg), "name": name, "versions": versions()}
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
    return config


def overrides() -> list[str]:
    """What the command line changed, in its own words."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def describe(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


def test_model(
    trainer: L.Trainer, model: Recommender, data: RecommenderData[Any]
) -> dict[str, Any]:
    """Test metrics of the model as it is, and of what is simpler than it, on the same users.

    Who was recommended what goes to ``test_users.parquet`` and ``items.parquet`` in the trainer's folder.
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
    return {
        **model.test_results(),
        "latency": model.latency(data),
        "baselines": data.baseline_metrics([str(name) for name in model.test_metrics.names]),
    }


def draw_curves(
    records: Sequence[dict[str, float]], folder: Path, cfg: DictConfig, title: str
) -> Path:
    """``curves.png`` of a history."""
    return plot_curves(
        records, folder / "curves.png", monitor=cfg.monitor, mode=cfg.monitor_mode, title=title
    )


def timed(records: list[dict[str, float]], cost: Cost) -> list[dict[str, float]]:
    """A history with the time of each validation.

    Beside the curves' values, not among them: these are the same for the same seed, times are not.
    """
    return [
        record | {"seconds": seconds}
        if "val/loss" in record and (seconds := cost.seconds.get(int(record["step"])))
        else record
        for record in records
    ]
