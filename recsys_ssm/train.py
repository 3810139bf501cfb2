"""Train, test and report one run: ``python -m recsys_ssm.train dataset=spotify backbone=mamba``."""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from recsys_ssm import ops
from recsys_ssm.cli.command import command
from recsys_ssm.data.base import RecommenderData
from recsys_ssm.errors import UnknownMonitorError, UserError
from recsys_ssm.instantiate import plain
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.models.training import StepSeed
from recsys_ssm.run import assemble
from recsys_ssm.run.callbacks import Cost, History, ValidationLog
from recsys_ssm.run.checkpoints import check_fits, read_checkpoint
from recsys_ssm.run.files import versions, write_json
from recsys_ssm.run.grow import begin_from, compare
from recsys_ssm.run.loggers import finish, log_results
from recsys_ssm.run.published import published_results
from recsys_ssm.run.resume import RunRecord, check_resume
from recsys_ssm.run.retriever import open_retriever
from recsys_ssm.run.table import print_results
from recsys_ssm.sweeps.jobs import check_siblings

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run what ``cfg`` (``conf/train.yaml``) describes; return the results and write them to the run's folder.

    Raises:
        UserError: An option, a file or a checkpoint is wrong.
    """
    assemble.check_config(cfg)
    output = Path(cfg.output_dir)
    assemble.check_writable(output)
    assemble.check_places(output)
    ckpt_path = assemble.find_checkpoint(cfg.ckpt_path, output)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    ops.set_backend(cfg.ops.backend)
    log.info(ops.describe_backends())

    data = assemble.make_data(cfg)
    assemble.check_intervals(cfg, data)
    if cfg.sweep is not None:
        check_siblings(output, data.sources)
    name = cfg.name + ("-generated" if data.splits.generated else "")
    n_notes = len(data.splits.notes)
    for note in data.splits.notes:
        log.info("%s: %s", data.name, note)
    for line in assemble.describe_features(data.splits):
        log.info("%s: %s", data.name, line)
    retriever = open_retriever(cfg, data)
    given = {} if retriever is None else {"retriever": retriever.model}
    model = assemble.make_model(cfg, data, **given)
    for note in data.splits.notes[n_notes:]:  # titles are read when a model asks for them
        log.info("%s: %s", data.name, note)
    log.info("%s: parameters %s", name, assemble.describe(model.parameter_counts()))
    growth = begin_from(cfg, data, model)
    if growth is not None:
        log.info("init       %s: %s", growth.run, growth)
    config = assemble.full_config(cfg, name)
    if retriever is not None:
        config["retrieved_by"] = retriever.options
    identity = data.identity()
    if ckpt_path is not None:
        checkpoint = read_checkpoint(ckpt_path)
        check_fits(checkpoint, model, ckpt_path)
        check_resume(checkpoint, config, identity, ckpt_path)
    assemble.write_config(output, config)

    history, cost = History(every_n_steps=cfg.trainer.get("log_every_n_steps") or 50), Cost()
    callbacks = [
        *assemble.make_callbacks(cfg),
        StepSeed(cfg.seed),
        RunRecord(config, identity),
        history,
        ValidationLog(output),
        cost,
    ]
    loggers: list[Any] = []
    failed = True
    try:
        loggers = assemble.make_loggers(cfg, data, output, name)
        trainer = assemble.make_trainer(cfg, callbacks, loggers)
        for logger in loggers:
            logger.log_hyperparams(config)
        seconds = fit(trainer, model, data, ckpt_path, cfg.monitor)
        if reason := assemble.why_stopped(trainer):
            log.info("%s: %s", name, reason)
        results: dict[str, Any] = {
            "name": name,
            "dataset": data.name,
            "generated": data.splits.generated,
            "seed": cfg.seed,
            "steps": trainer.global_step,
            "train_seconds": seconds,
            "cost": cost.summary(model.device),
            "parameters": model.parameter_counts(),
            "overrides": assemble.overrides(),
            "notes": data.splits.notes,
            "data": data.sources,
            "versions": versions(),
        }
        if cfg.test is not None:
            results |= test_checkpoint(trainer, model, data, cfg.test)
            results |= published_results(plain(cfg))
            if growth is not None:
                results["growth"] = compare(growth, model, data)
        if trainer.is_global_zero:
            curves = report(results, history, cost, output, cfg)
            log_results(loggers, results, [curves])
        failed = False
        return results
    finally:
        finish(loggers, failed)


def fit(
    trainer: L.Trainer,
    model: Recommender,
    data: RecommenderData[Any],
    ckpt_path: Path | None,
    monitor: str,
) -> float:
    """Train, from a checkpoint if one is given; return the seconds.

    Raises:
        KeyboardInterrupt: The user stopped the training.
        UserError: There are more processes than rows to train on.
        UnknownMonitorError: Validation computes no metric called ``monitor``.
    """
    start = time.perf_counter()
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit as stop:  # Lightning turns Ctrl-C into this
        raise KeyboardInterrupt from stop
    except RuntimeError as error:  # Lightning has no exception class for this one
        if "Early stopping conditioned on metric" not in str(error):
            raise
        raise UnknownMonitorError(monitor, trainer.callback_metrics) from error
    if trainer.global_step == 0 and trainer.max_steps != 0 and trainer.max_epochs != 0:
        raise UserError(
            f"trainer.devices={trainer.num_devices}: no step was trained, each process would have less than one row; "
            "give fewer processes, or more data"
        )
    return time.perf_counter() - start


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
        log.warning("no %s checkpoint was written: the final weights are tested", which)
    return {"checkpoint": path or None, **assemble.test_model(trainer, model, data)}


def report(
    results: dict[str, Any], history: History, cost: Cost, output: Path, cfg: DictConfig
) -> Path:
    """Print the table, write ``metrics.json`` and the curves, and log where each file is; return the curves."""
    write_json(output / "history.json", assemble.timed(history.records, cost))
    curves = assemble.draw_curves(history.records, output, cfg, results["name"])
    written = {
        # The last of the files: a sweep takes a run that has it for finished.
        "metrics": write_json(output / "metrics.json", results),
        "config": output / "config.yaml",
        "curves": curves,
        "checkpoint": results.get("checkpoint"),
    }
    print_results(results)
    if advice := assemble.still_improving(history.records, cfg, results["steps"]):
        log.warning(advice)
    for what, path in written.items():
        if path is not None:
            log.info("%-10s %s", what, path)
    log.info("%-10s %s, after %s", "run", output, assemble.duration(results["train_seconds"]))
    # Two towers recommend to people described in a table; next-item models know their users' histories.
    users = "" if "metrics_unfiltered" in results else " users=<table>"
    log.info("%-10s python -m recsys_ssm.recommend run=%s%s", "next", output, users)
    log.info("%-10s python -m recsys_ssm.report %s", "", output.parent)
    return curves


main = command("train")(train)

if __name__ == "__main__":
    main()
