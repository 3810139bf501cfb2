"""Train, test, report: ``python -m recsys_ssm.train dataset=spotify backbone=mamba``."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import polars as pl
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from omegaconf import DictConfig, OmegaConf

from recsys_ssm import ops
from recsys_ssm.callbacks import Cost, History, StepSeed
from recsys_ssm.checkpoints import check_fits, read_checkpoint
from recsys_ssm.cli import check, door, make, make_all, plain, spec
from recsys_ssm.data.base import RecommenderData
from recsys_ssm.errors import UnknownMonitorError, UserError
from recsys_ssm.loggers import run_summary
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.results import (
    plot_curves,
    print_results,
    versions,
    write_json,
    write_table,
    write_text,
)
from recsys_ssm.specs import import_target

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """One run, as ``cfg`` (``conf/train.yaml``) says; what it found is returned and written to its folder.

    Raises:
        UserError: An option, a file or a checkpoint is not what it has to be.
    """
    check(
        cfg,
        "dataset",
        "backbone",
        "optimizer",
        "scheduler",
        "trainer",
        "logger",
        *callback_options(cfg),
    )
    if cfg.test not in ("best", "last", None):
        raise UserError(f"test={cfg.test}: expected best, last or null")
    output = Path(cfg.output_dir)
    check_writable(output)
    if cfg.train.seeds != 1:
        from recsys_ssm.train_seeds import train_seeds  # which builds on this door

        return train_seeds(cfg)
    ckpt_path = find_checkpoint(cfg.ckpt_path, output)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    log.info(ops.describe_backends())

    data: RecommenderData[Any] = make(cfg.dataset, "dataset")
    name = cfg.name + ("-generated" if data.sets.generated else "")
    for note in data.sets.notes:
        log.info("%s: %s", data.name, note)
    model = make_model(cfg, data)
    counts = model.parameter_counts()
    log.info("%s: parameters %s", name, describe(counts))
    config = write_config(output, cfg, name)

    if ckpt_path is not None:
        check_fits(read_checkpoint(ckpt_path), model, ckpt_path)

    history, cost = History(every_n_steps=cfg.trainer.get("log_every_n_steps") or 50), Cost()
    logger = None
    failed = True
    try:
        logger = make(
            cfg.logger, "logger", save_dir=str(output), name=name, **logger_tags(cfg, data)
        )
        trainer: L.Trainer = make(
            cfg.trainer,
            "trainer",
            callbacks=[*make_callbacks(cfg), StepSeed(cfg.seed), history, cost],
            logger=logger or False,
        )
        if logger is not None:
            logger.log_hyperparams(config)

        start = time.perf_counter()
        try:
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stop
        except RuntimeError as error:  # Lightning has no type of its own for this one
            if "Early stopping conditioned on metric" not in str(error):
                raise
            raise UnknownMonitorError(cfg.monitor, trainer.callback_metrics) from error
        results: dict[str, Any] = {
            "name": name,
            "dataset": data.name,
            "generated": data.sets.generated,
            "seed": cfg.seed,
            "steps": trainer.global_step,
            "train_seconds": time.perf_counter() - start,
            "cost": cost.summary(model.device),
            "parameters": counts,
            "overrides": overrides(),
            "notes": data.sets.notes,
            "versions": versions(),
        }
        if cfg.test is not None:
            results |= test_checkpoint(trainer, model, data, cfg.test)
            results["published"] = plain(cfg.published) or {}
        if trainer.is_global_zero:
            report(results, history, cost, output, cfg)
            if logger is not None:
                log_results(logger, results, output)
        failed = False
        return results
    finally:
        finish(logger, failed)


def write_config(folder: Path, cfg: DictConfig, name: str) -> dict[str, Any]:
    """``config.yaml``, what the run in ``folder`` is made of; returns the same."""
    config = {**plain(cfg), "name": name, "versions": versions()}
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
    return config


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


def test_checkpoint(
    trainer: L.Trainer, model: Recommender, data: RecommenderData[Any], which: str
) -> dict[str, Any]:
    """Load the best or last checkpoint and test it, once."""
    kept = {
        "last" if callback.monitor is None else "best": callback.best_model_path
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
    }
    path = kept.get(which)
    if path:
        model.load_state_dict(read_checkpoint(Path(path))["state_dict"])
    else:
        log.warning("no %s checkpoint was kept: the final weights are tested", which)
    return {"checkpoint": path or None, **test_model(trainer, model, data)}


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
            {"item": data.sets.item_ids, "train_count": data.item_counts().numpy()}
        )
        write_table(folder / "items.parquet", items)
    return {
        **model.test_results(),
        "latency": model.latency(data),
        "baselines": data.baseline_metrics([str(name) for name in model.test_metrics.names]),
    }


def report(
    results: dict[str, Any], history: History, cost: Cost, output: Path, cfg: DictConfig
) -> None:
    """Table on the terminal, ``metrics.json``, the curves, and where each of them is."""
    write_json(output / "history.json", timed(history.records, cost))
    curves = draw_curves(history.records, output, cfg, results["name"])
    written = {
        # Last of the files: a sweep takes a run that has it for finished.
        "metrics": write_json(output / "metrics.json", results),
        "config": output / "config.yaml",
        "curves": curves,
        "checkpoint": results.get("checkpoint"),
    }
    print_results(results)
    for what, path in written.items():
        if path is not None:
            log.info("%-10s %s", what, path)


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


def log_results(logger: Any, results: dict[str, Any], output: Path) -> None:
    """What the run found as W&B summary values, the curves as an image."""
    if not isinstance(logger, L.pytorch.loggers.WandbLogger):
        return
    logger.experiment.summary.update(run_summary(results))
    if (output / "curves.png").exists():
        logger.log_image("curves", [str(output / "curves.png")])


def callback_options(cfg: DictConfig) -> list[str]:
    return [f"callbacks.{name}" for name in cfg.callbacks or {}]


def make_callbacks(cfg: DictConfig) -> list[L.Callback]:
    """The configured callbacks, without those that the trainer's or the logger's choice leaves nothing to do."""
    idle: list[type[L.Callback]] = []
    if spec(cfg.logger, "logger") is None:
        idle.append(LearningRateMonitor)
    if not cfg.trainer.get("enable_progress_bar", True):
        idle.append(ProgressBar)
    callbacks = make_all(cfg.callbacks, "callbacks")
    return [callback for callback in callbacks if not isinstance(callback, tuple(idle))]


def finish(logger: Any, failed: bool) -> None:
    """End the W&B run, whatever happened: the next job of a sweep must not write into it."""
    if isinstance(logger, L.pytorch.loggers.WandbLogger):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))


def logger_tags(cfg: DictConfig, data: RecommenderData[Any]) -> dict[str, Any]:
    """Arguments only the W&B logger takes."""
    if not str(cfg.logger.get("_target_")).endswith("wandb_logger"):
        return {}
    sweep = [cfg.sweep] if cfg.sweep else []
    return {"tags": [*cfg.tags, *sweep, *(["generated"] if data.sets.generated else [])]}


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


def overrides() -> list[str]:
    """What the command line changed, in its own words."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def describe(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())


main = door("train")(train)

if __name__ == "__main__":
    main()
