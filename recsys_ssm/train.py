"""Train, test, report: ``python -m recsys_ssm.train dataset=spotify backbone=mamba``."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from recsys_ssm import ops
from recsys_ssm.batched_seeds.train import train_seeds
from recsys_ssm.cli.command import command
from recsys_ssm.data.base import RecommenderData
from recsys_ssm.errors import UnknownMonitorError, UserError
from recsys_ssm.instantiate import check, make, plain
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.run.assemble import (
    callback_options,
    check_writable,
    describe,
    draw_curves,
    find_checkpoint,
    finish,
    logger_tags,
    make_callbacks,
    make_model,
    overrides,
    test_model,
    timed,
    write_config,
)
from recsys_ssm.run.callbacks import Cost, History, StepSeed
from recsys_ssm.run.checkpoints import check_fits, read_checkpoint
from recsys_ssm.run.files import versions, write_json
from recsys_ssm.run.loggers import run_summary
from recsys_ssm.run.table import print_results

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
        return train_seeds(cfg)
    ckpt_path = find_checkpoint(cfg.ckpt_path, output)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    log.info(ops.describe_backends())

    data: RecommenderData[Any] = make(cfg.dataset, "dataset")
    name = cfg.name + ("-generated" if data.splits.generated else "")
    for note in data.splits.notes:
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
            "generated": data.splits.generated,
            "seed": cfg.seed,
            "steps": trainer.global_step,
            "train_seconds": time.perf_counter() - start,
            "cost": cost.summary(model.device),
            "parameters": counts,
            "overrides": overrides(),
            "notes": data.splits.notes,
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


def log_results(logger: Any, results: dict[str, Any], output: Path) -> None:
    """What the run found as W&B summary values, the curves as an image."""
    if not isinstance(logger, L.pytorch.loggers.WandbLogger):
        return
    logger.experiment.summary.update(run_summary(results))
    if (output / "curves.png").exists():
        logger.log_image("curves", [str(output / "curves.png")])


main = command("train")(train)

if __name__ == "__main__":
    main()
