"""Train, test, report: ``python -m recsys_ssm.train dataset=spotify backbone=mamba``."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from omegaconf import DictConfig, OmegaConf

from recsys_ssm import ops
from recsys_ssm.callbacks import History
from recsys_ssm.checkpoints import check_fits, read_checkpoint
from recsys_ssm.cli import check, door, make, make_all, plain, spec
from recsys_ssm.data.base import RankingLoader, TwoTowerData
from recsys_ssm.errors import UserError
from recsys_ssm.metrics import RankingMetrics, over_all_users
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.results import plot_curves, print_results, versions, write_json, write_text

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
    ckpt_path = find_checkpoint(cfg.ckpt_path, output)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    log.info(ops.describe_backends())

    data: TwoTowerData = make(cfg.dataset, "dataset")
    name = cfg.name + ("-generated" if data.sets.generated else "")
    for note in data.sets.notes:
        log.info("%s: %s", data.name, note)
    model = TwoTower.for_data(
        data,
        tokenizer=plain(cfg.tokenizer),
        backbone=spec(cfg.backbone, "backbone"),
        head=plain(cfg.head),
        optimizer=spec(cfg.optimizer, "optimizer"),
        scheduler=spec(cfg.scheduler, "scheduler"),
        metrics=plain(cfg.metrics),
    )
    log.info("%s: %s", name, count_parameters(model))
    config = {**plain(cfg), "name": name, "versions": versions()}
    write_text(output / "config.yaml", OmegaConf.to_yaml(config))

    if ckpt_path is not None:
        check_fits(read_checkpoint(ckpt_path), model, ckpt_path)

    history = History(every_n_steps=cfg.trainer.get("log_every_n_steps") or 50)
    logger = None
    failed = True
    try:
        logger = make(
            cfg.logger, "logger", save_dir=str(output), name=name, **logger_tags(cfg, data)
        )
        trainer: L.Trainer = make(
            cfg.trainer,
            "trainer",
            callbacks=[*make_callbacks(cfg), history],
            logger=logger or False,
        )
        if logger is not None:
            logger.log_hyperparams(config)

        start = time.perf_counter()
        try:
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stop
        results: dict[str, Any] = {
            "name": name,
            "dataset": data.name,
            "generated": data.sets.generated,
            "seed": cfg.seed,
            "steps": trainer.global_step,
            "train_seconds": time.perf_counter() - start,
            "parameters": parameters(model),
            "notes": data.sets.notes,
            "versions": versions(),
        }
        if cfg.test is not None:
            results |= test_checkpoint(trainer, model, data, cfg.test)
            results["published"] = plain(cfg.published) or {}
        if trainer.is_global_zero:
            report(results, history, output, cfg)
            if logger is not None:
                log_results(logger, results, output)
        failed = False
        return results
    finally:
        finish(logger, failed)


def test_checkpoint(
    trainer: L.Trainer, model: TwoTower, data: TwoTowerData, which: str
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


def test_model(trainer: L.Trainer, model: TwoTower, data: TwoTowerData) -> dict[str, Any]:
    """Test metrics of the model as it is, and of what is simpler than it, on the same users."""
    trainer.test(model, datamodule=data, verbose=False)
    values = {name: float(value) for name, value in model.test_metrics.compute().items()}
    return {
        "metrics": values,
        "metrics_all_users": over_all_users(values),
        "baselines": evaluate_baselines(data, [str(name) for name in model.test_metrics.names]),
    }


def evaluate_baselines(data: TwoTowerData, metrics: list[str]) -> dict[str, dict[str, float]]:
    """Test metrics of the dataset's baselines: random, popularity, an oracle where there is one."""
    sets = data.sets
    results = {}
    for name, scores in sets.baselines.items():
        # Every process sees all users here: there is nothing to add up.
        ranking = RankingMetrics(metrics, n_items=len(sets.item_ids), sync_on_compute=False)
        for batch in RankingLoader(
            sets.users, sets.test_ranking, len(sets.item_ids), batch_size=data.eval_batch_size
        ):
            ranking.update(scores(batch.user_index), batch.relevant, batch.seen)
        results[name] = {metric: float(value) for metric, value in ranking.compute().items()}
    return results


def report(results: dict[str, Any], history: History, output: Path, cfg: DictConfig) -> None:
    """Table on the terminal, ``metrics.json``, the curves, and where each of them is."""
    written = {
        "metrics": write_json(output / "metrics.json", results),
        "config": output / "config.yaml",
        "curves": plot_curves(
            history.records,
            output / "curves.png",
            monitor=cfg.monitor,
            mode=cfg.monitor_mode,
            title=results["name"],
        ),
        "checkpoint": results.get("checkpoint"),
    }
    print_results(results)
    for what, path in written.items():
        if path is not None:
            log.info("%-10s %s", what, path)


def log_results(logger: Any, results: dict[str, Any], output: Path) -> None:
    """Test metrics, baselines and published figures as W&B summary values, the curves as an image."""
    if not isinstance(logger, L.pytorch.loggers.WandbLogger):
        return
    run = logger.experiment
    for group in ("metrics", "metrics_all_users", "published"):
        for metric, value in (results.get(group) or {}).items():
            run.summary[f"{group.replace('metrics', 'test')}/{metric}"] = value
    for name, values in results.get("baselines", {}).items():
        for metric, value in values.items():
            run.summary[f"{name}/{metric}"] = value
    run.summary["generated"] = results["generated"]
    run.summary["train_seconds"] = results["train_seconds"]
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


def logger_tags(cfg: DictConfig, data: TwoTowerData) -> dict[str, Any]:
    """Arguments only the W&B logger takes."""
    if not str(cfg.logger.get("_target_")).endswith("wandb_logger"):
        return {}
    return {"tags": [*cfg.tags, *(["generated"] if data.sets.generated else [])]}


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


def check_writable(folder: Path) -> None:
    """Make the folder if it is not there; fail before the training, not after it."""
    probe = folder / ".write_test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output_dir={folder}: cannot write there ({error.strerror}); choose another folder"
        ) from error


def parameters(model: TwoTower) -> dict[str, int]:
    """Trainable parameters of a tower's backbone and of the whole."""
    return {
        "backbone_per_tower": sum(p.numel() for p in model.user_tower.backbone.parameters()),
        "total": sum(p.numel() for p in model.parameters()),
    }


def count_parameters(model: TwoTower) -> str:
    counts = parameters(model)
    return f"{counts['total']:,} parameters, {counts['backbone_per_tower']:,} of them in each tower's backbone"


main = door("train")(train)

if __name__ == "__main__":
    main()
