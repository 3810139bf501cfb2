"""The training door's part for ``train.seeds=K``: K seeds at once, each ending in a folder like a single run's."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf, open_dict
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recsys_ssm import ops
from recsys_ssm.batched_seeds.data import SeedsData
from recsys_ssm.batched_seeds.model import Seeds
from recsys_ssm.cli.resolvers import name_of_seeds
from recsys_ssm.data.two_tower import TwoTowerData
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import import_target, make, plain, spec
from recsys_ssm.metrics import COUNTS
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.reports.statistics import estimate
from recsys_ssm.run.assemble import (
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
from recsys_ssm.run.callbacks import Cost, StepSeed
from recsys_ssm.run.checkpoints import check_fits, read_checkpoint
from recsys_ssm.run.files import versions, write_bytes, write_json
from recsys_ssm.run.published import published_results

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """One of the seeds."""

    seed: int
    cfg: DictConfig
    """As the seed's single run would have it."""
    data: TwoTowerData

    @property
    def name(self) -> str:
        return str(self.cfg.name) + ("-generated" if self.data.splits.generated else "")

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output_dir)


class SeedHistories(L.Callback):
    """What :class:`recsys_ssm.run.callbacks.History` keeps, of each seed by itself.

    Args:
        n_seeds: How many.
        every_n_steps: How often the training loss is kept.
    """

    def __init__(self, n_seeds: int, *, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.records: list[list[dict[str, float]]] = [[] for _ in range(n_seeds)]

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, Seeds)
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == 1:
            for records, loss in zip(self.records, pl_module.losses.tolist(), strict=True):
                records.append({"step": trainer.global_step, "train/loss": loss})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Seeds)
        if not trainer.sanity_checking:
            for records, found in zip(self.records, pl_module.validated, strict=True):
                records.append({"step": trainer.global_step, **found})

    def means(self) -> list[dict[str, float]]:
        """Over the seeds, record by record."""
        return [_means(of_all) for of_all in zip(*self.records, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = state_dict["records"]


def train_seeds(cfg: DictConfig) -> dict[str, Any]:
    """Train ``cfg.train.seeds`` seeds at once, from ``cfg.seed`` on; test each, write its folder, report their means.

    Returns:
        The means over the seeds; they go to ``metrics.json`` in the run's folder, each seed's to its own.

    Raises:
        UserError: An option, a file or a checkpoint is not what it has to be, or seeds cannot be trained at once.
    """
    check_seeds(cfg)
    output = Path(cfg.output_dir)
    ckpt_path = find_checkpoint(cfg.ckpt_path, output)
    log.info(ops.describe_backends())
    parts, model = prepare(cfg, output)
    first, n_seeds = parts[0], len(parts)
    name = name_of_seeds(first.name, cfg.seed, n_seeds)
    for note in first.data.splits.notes:
        log.info("%s: %s", first.data.name, note)
    counts = model.single.parameter_counts()
    log.info("%s: parameters of each %s", name, describe(counts))
    config = write_config(output, cfg, name)
    for part in parts:
        part.folder.mkdir(exist_ok=True)
        write_config(part.folder, part.cfg, part.name)
    if ckpt_path is not None:
        check_fits(read_checkpoint(ckpt_path), model, ckpt_path)

    # Bars and loggers show the mean.
    shown = cfg.copy()
    shown.monitor = f"{cfg.monitor}/mean"
    every = cfg.trainer.get("log_every_n_steps") or 50
    histories, cost = SeedHistories(n_seeds, every_n_steps=every), Cost()
    logger = None
    failed = True
    try:
        tags = logger_tags(shown, first.data)
        logger = make(shown.logger, "logger", save_dir=str(output), name=name, **tags)
        callbacks = [
            callback
            for callback in make_callbacks(shown)
            # Each seed's best is kept by the model; a mean's best would be no seed's.
            if not (isinstance(callback, ModelCheckpoint) and callback.monitor is not None)
        ]
        trainer: L.Trainer = make(
            shown.trainer,
            "trainer",
            callbacks=[*callbacks, StepSeed(cfg.seed), histories, cost],
            logger=logger or False,
        )
        check_one_process(trainer)
        if logger is not None:
            logger.log_hyperparams(config)
        start = time.perf_counter()
        try:
            data = SeedsData([part.data for part in parts])
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stop
        common = {
            "generated": first.data.splits.generated,
            "dataset": first.data.name,
            "steps": trainer.global_step,
            "train_seconds": time.perf_counter() - start,
            "cost": {**cost.summary(model.device), "seeds_at_once": n_seeds},
            "parameters": counts,
            "overrides": overrides(),
            "versions": versions(),
        }
        each = []
        for number, part in enumerate(parts):
            save_checkpoints(part, model, number, trainer)
            records = timed(histories.records[number], cost)
            each.append(finish_seed(part, model, number, records, common))
        results = {
            **common,
            "name": name,
            "seeds": model.seeds,
            "notes": first.data.splits.notes,
            **published_results(plain(cfg)),
            **summarise(each),
        }
        write_json(output / "history.json", timed(histories.means(), cost))
        draw_curves(histories.means(), output, cfg, f"{name}, mean")
        path = write_json(output / "metrics.json", results)
        print_seeds(results)
        log.info("%-10s %s", "metrics", path)
        log.info("%-10s %s to %s", "each seed", parts[0].folder, parts[-1].folder.name)
        if isinstance(logger, L.pytorch.loggers.WandbLogger):
            logger.experiment.summary.update(seeds_summary(results, each))
            logger.log_image("curves", [str(output / "curves.png")])
        failed = False
        return results
    finally:
        finish(logger, failed)


# Before the training


def check_seeds(cfg: DictConfig) -> None:
    """Hold the options against what seeds trained at once can do.

    Raises:
        UserError: They cannot.
    """
    n_seeds = cfg.train.seeds
    if not isinstance(n_seeds, int) or n_seeds < 1:
        raise UserError(f"train.seeds={n_seeds}: give how many seeds to train at once, 1 or more")
    instead = f"train.seeds=1, or a sweep: --multirun 'seed=range({n_seeds})'"
    head = import_target(cfg.head["_target_"], "head")
    if not (isinstance(head, type) and issubclass(head, TwoTower)):
        raise UserError(
            f"train.seeds={n_seeds}: only two-tower models are trained at once, and "
            f"{head.__name__} is none; give {instead}"
        )
    for option, node in (cfg.callbacks or {}).items():
        values = spec(node, f"callbacks.{option}")
        if values and issubclass(import_target(values["_target_"], option), EarlyStopping):
            raise UserError(
                f"callbacks.{option}: it would stop all {n_seeds} seeds where one of them or their mean stalls; "
                f"set it to null, or give {instead}"
            )


def check_one_process(trainer: L.Trainer) -> None:
    """Raises:
    UserError: The trainer runs on several devices.
    """
    if trainer.world_size > 1:
        raise UserError(
            f"train.seeds: {trainer.world_size} devices, and seeds are trained at once on one; "
            "give trainer.devices=1"
        )


def prepare(cfg: DictConfig, output: Path) -> tuple[list[Part], Seeds]:
    """Each seed's options and data, and the models: each built as its single run would build it."""
    parts, models = [], []
    for seed in range(cfg.seed, cfg.seed + cfg.train.seeds):
        own = cfg.copy()
        with open_dict(own):
            own.seed, own.train.seeds, own.ckpt_path = seed, 1, None
            own.output_dir = str(output / f"seed{seed}")
        L.seed_everything(seed, workers=True, verbose=False)
        part = Part(seed, own, make(own.dataset, "dataset"))
        model = make_model(own, part.data)
        assert isinstance(model, TwoTower)
        parts.append(part)
        models.append(model)
    return parts, Seeds(
        models, [part.seed for part in parts], monitor=cfg.monitor, mode=cfg.monitor_mode
    )


# After the training


def save_checkpoints(part: Part, model: Seeds, number: int, trainer: L.Trainer) -> None:
    """``best.ckpt`` and ``last.ckpt`` of a seed: models to load; training goes on from the whole run's."""
    folder = part.folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    hyper_parameters = dict(make_model(part.cfg, part.data).hparams)
    states = {
        "best": (model.best_of(number), model.best_steps[number]),
        "last": (model.state_of(number), trainer.global_step),
    }
    for which, (state, step) in states.items():
        content = io.BytesIO()
        torch.save(
            {
                "state_dict": {name: tensor.cpu().clone() for name, tensor in state.items()},
                TwoTower.CHECKPOINT_HYPER_PARAMS_KEY: hyper_parameters,
                "global_step": step,
                "epoch": trainer.current_epoch,
                "pytorch-lightning_version": L.__version__,
            },
            content,
        )
        write_bytes(folder / f"{which}.ckpt", content.getvalue())


def finish_seed(
    part: Part,
    model: Seeds,
    number: int,
    records: list[dict[str, float]],
    common: dict[str, Any],
) -> dict[str, Any]:
    """Test a seed's best state (or as ``cfg.test`` has it) and write what a single run writes."""
    results = {
        **common,
        "name": part.name,
        "seed": part.seed,
        "notes": part.data.splits.notes,
    }
    if part.cfg.test is not None:
        results |= {
            "checkpoint": str(part.folder / "checkpoints" / f"{part.cfg.test}.ckpt"),
            **published_results(plain(part.cfg)),
            **test_seed(part, model, number),
        }
    write_json(part.folder / "history.json", records)
    draw_curves(records, part.folder, part.cfg, part.name)
    write_json(part.folder / "metrics.json", results)
    return results


def test_seed(part: Part, model: Seeds, number: int) -> dict[str, Any]:
    """Test metrics of a seed, as its single run finds them."""
    state = model.best_of(number) if part.cfg.test == "best" else model.state_of(number)
    single = make_model(part.cfg, part.data).to(model.item_numeric.dtype)
    single.load_state_dict(state)
    quiet = OmegaConf.merge(part.cfg.trainer, {"enable_progress_bar": False})
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = lightning.level
    lightning.setLevel(logging.WARNING)  # the devices there are have been told
    try:
        trainer: L.Trainer = make(quiet, "trainer", logger=False, enable_checkpointing=False)
        return test_model(trainer, single, part.data)
    finally:
        lightning.setLevel(level)


def summarise(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of all they were tested for, and half the 95 % intervals' widths."""
    if "metrics" not in each[0]:
        return {}
    found: dict[str, Any] = {
        group: _means([results[group] for results in each])
        for group in ("metrics", "metrics_all_users")
    }
    found["half_widths"] = {
        name: estimate([results["metrics"][name] for results in each]).half_width
        for name in found["metrics"]
    }
    found["baselines"] = {
        name: _means([results["baselines"][name] for results in each])
        for name in each[0]["baselines"]
    }
    return found


def _means(of_all: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: estimate([values[name] for values in of_all]).mean for name in of_all[0]}


def print_seeds(results: dict[str, Any], console: Console | None = None) -> None:
    """The table at the end: mean and interval of each metric beside what was published and the baselines' means."""
    if "metrics" not in results:
        return
    console = console or Console(highlight=False)
    seeds = results["seeds"]
    title = results["name"] + (" (generated data)" if results["generated"] else "")
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, title=Text(title, "bold"), title_justify="left"
    )
    table.add_column("metric")
    columns: dict[str, dict[str, float]] = {
        f"mean of {len(seeds)}": results["metrics"],
        "± 95 %": results["half_widths"],
        **({results["published_label"]: results["published"]} if results["published"] else {}),
        **results["baselines"],
    }
    for head in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for metric in results["metrics"]:
        if metric not in COUNTS:
            table.add_row(metric, *_cells(metric, columns.values()))
    console.print(table, crop=False)
    console.print(
        Text(
            f"Means of seeds {seeds[0]} to {seeds[-1]}, and Student's interval of the mean; baselines on the same "
            "test users.",
            style="dim",
        ),
        crop=False,
    )


def _cells(metric: str, columns: Any) -> Iterator[str]:
    for values in columns:
        value = values.get(metric)
        yield "-" if value is None or value != value else f"{value:.4f}"


def seeds_summary(results: dict[str, Any], each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """W&B summary values: ``test/hr@10/mean``, its interval and each seed's, and the baselines' means."""
    summary: dict[str, Any] = {
        name: results[name] for name in ("generated", "train_seconds", "steps")
    }
    summary |= {f"cost/{name}": value for name, value in results["cost"].items()}
    for metric, mean in results.get("metrics", {}).items():
        summary[f"test/{metric}/mean"] = mean
        summary[f"test/{metric}/half_width"] = results["half_widths"][metric]
        summary |= {f"test/{metric}/seed{one['seed']}": one["metrics"][metric] for one in each}
    for baseline, values in results.get("baselines", {}).items():
        summary |= {f"{baseline}/{metric}": value for metric, value in values.items()}
    return summary
