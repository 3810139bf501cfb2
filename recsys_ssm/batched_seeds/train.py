"""Train K seeds in one batched run and write one run folder for each seed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from omegaconf import DictConfig, OmegaConf, open_dict
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recsys_ssm import ops
from recsys_ssm.batched_seeds.attention import register_attention_rule
from recsys_ssm.batched_seeds.data import SeedsData
from recsys_ssm.batched_seeds.model import Seeds
from recsys_ssm.data.two_tower import TwoTowerData
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import import_target, instantiate, plain, spec
from recsys_ssm.metrics import COUNTS
from recsys_ssm.models.training import StepSeed
from recsys_ssm.models.two_tower import TwoTower
from recsys_ssm.reports.statistics import estimate
from recsys_ssm.run import assemble
from recsys_ssm.run.callbacks import Cost
from recsys_ssm.run.checkpoint_io import AtomicCheckpointIO
from recsys_ssm.run.checkpoints import check_fits, read_checkpoint
from recsys_ssm.run.files import versions, write_json
from recsys_ssm.run.loggers import finish, log_summary
from recsys_ssm.run.published import published_results
from recsys_ssm.run.resume import KEY, RunRecord, check_resume

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """One seed: its options and its data."""

    seed: int
    cfg: DictConfig
    """The config of the seed's single run."""
    data: TwoTowerData

    @property
    def name(self) -> str:
        return str(self.cfg.name) + ("-generated" if self.data.splits.generated else "")

    @property
    def config(self) -> dict[str, Any]:
        return assemble.full_config(self.cfg, self.name)

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output_dir)


class SeedHistories(L.Callback):
    """Record the same as :class:`recsys_ssm.run.callbacks.History`, with one list of records for each seed.

    Args:
        n_seeds: Number of seeds.
        every_n_steps: Steps between two records of the training loss.
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
        """Average the records over the seeds."""
        return [_means(of_all) for of_all in zip(*self.records, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"records": self.records}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = state_dict["records"]


def train_seeds(cfg: DictConfig) -> dict[str, Any]:
    """Train ``cfg.seeds`` seeds at once, from ``cfg.seed`` on. Test each, write its folder, and report the means.

    Returns:
        The means over the seeds, as written to ``metrics.json`` in the run's folder. Each seed's own figures are in
        its folder.

    Raises:
        UserError: An option, a file or a checkpoint is wrong, or these seeds cannot be trained at once.
    """
    assemble.check_config(cfg)
    check_seeds(cfg)
    output = Path(cfg.output_dir)
    assemble.check_writable(output)
    assemble.check_places(output)
    register_attention_rule()
    ckpt_path = assemble.find_checkpoint(cfg.ckpt_path, output)
    ops.set_backend(cfg.ops.backend)
    log.info(ops.describe_backends())
    parts, model = prepare(cfg, output)
    first, n_seeds = parts[0], len(parts)
    name = name_of_seeds(first.name, cfg.seed, n_seeds)
    for note in first.data.splits.notes:
        log.info("%s: %s", first.data.name, note)
    counts = model.single.parameter_counts()
    log.info("%s: parameters of each %s", name, assemble.describe(counts))
    config = assemble.full_config(cfg, name)
    identity = {
        f"{what} of seed {part.seed}": value
        for part in parts
        for what, value in part.data.identity().items()
    }
    if ckpt_path is not None:
        checkpoint = read_checkpoint(ckpt_path)
        check_fits(checkpoint, model, ckpt_path)
        check_resume(checkpoint, config, identity, ckpt_path)
    assemble.write_config(output, config)
    for part in parts:
        part.folder.mkdir(exist_ok=True)
        assemble.write_config(part.folder, part.config)

    # Progress bars and loggers show the mean.
    shown = cfg.copy()
    shown.monitor = f"{cfg.monitor}/mean"
    every = cfg.trainer.get("log_every_n_steps") or 50
    histories, cost = SeedHistories(n_seeds, every_n_steps=every), Cost()
    callbacks = [
        callback
        for callback in assemble.make_callbacks(shown)
        # The model keeps the best state of each seed. The best mean is not the best of any seed.
        if not (isinstance(callback, ModelCheckpoint) and callback.monitor is not None)
    ]
    loggers: list[Any] = []
    failed = True
    try:
        loggers = assemble.make_loggers(shown, first.data, output, name)
        callbacks += [StepSeed(cfg.seed), RunRecord(config, identity), histories, cost]
        trainer = assemble.make_trainer(shown, callbacks, loggers)
        check_one_process(trainer)
        for logger in loggers:
            logger.log_hyperparams(config)
        start = time.perf_counter()
        try:
            data = SeedsData([part.data for part in parts])
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        except SystemExit as stop:  # Lightning raises it for Ctrl-C
            raise KeyboardInterrupt from stop
        common = {
            "generated": first.data.splits.generated,
            "dataset": first.data.name,
            "steps": trainer.global_step,
            "train_seconds": time.perf_counter() - start,
            "cost": {**cost.summary(model.device), "seeds_at_once": n_seeds},
            "parameters": counts,
            "overrides": [each for each in assemble.overrides() if not each.startswith("seeds=")],
            "versions": versions(),
        }
        each = []
        for number, part in enumerate(parts):
            save_checkpoints(part, model, number, trainer)
            records = assemble.timed(histories.records[number], cost)
            each.append(finish_seed(part, model, number, records, common))
        results = {
            **common,
            "name": name,
            "seeds": model.seeds,
            "notes": first.data.splits.notes,
            "data": first.data.sources,
            **published_results(plain(cfg)),
            **summarise(each),
        }
        write_json(output / "history.json", assemble.timed(histories.means(), cost))
        curves = assemble.draw_curves(histories.means(), output, cfg, f"{name}, mean")
        path = write_json(output / "metrics.json", results)
        print_seeds(results)
        log.info("%-10s %s", "metrics", path)
        log.info("%-10s %s to %s", "each seed", parts[0].folder, parts[-1].folder.name)
        log_summary(loggers, seeds_summary(results, each), results["steps"], [curves])
        failed = False
        return results
    finally:
        finish(loggers, failed)


# Before the training


def name_of_seeds(name: str, seed: Any, n_seeds: Any) -> str:
    """Return the name of a run of several seeds: ``…-seeds0-3`` in place of ``…-seed0``.

    The names of single runs never equal it, so that ``ckpt_path=last`` keeps them apart.
    """
    if not (isinstance(seed, int) and isinstance(n_seeds, int) and n_seeds >= 1):
        return name  # check_seeds reports the mistake
    return f"{name.removesuffix(f'-seed{seed}')}-seeds{seed}-{seed + n_seeds - 1}"


def check_seeds(cfg: DictConfig) -> None:
    """Check that the options fit seeds that are trained at once.

    Raises:
        UserError: An option does not.
    """
    n_seeds = cfg.seeds
    if not isinstance(n_seeds, int) or n_seeds < 1:
        raise UserError(f"seeds={n_seeds}: not a number of seeds; give 1 or more")
    instead = f"python -m recsys_ssm.train --multirun 'seed=range({n_seeds})'"
    model = import_target(cfg.model["_target_"], "model")
    if not (isinstance(model, type) and issubclass(model, TwoTower)):
        raise UserError(
            f"seeds={n_seeds}: only two-tower models can be trained at once, and {model.__name__} is not one; "
            f"use {instead}"
        )
    for option, node in (cfg.callbacks or {}).items():
        values = spec(node, f"callbacks.{option}")
        kind = import_target(values["_target_"], option) if values else object
        if issubclass(kind, EarlyStopping):
            raise UserError(
                f"callbacks.{option}: it would stop all {n_seeds} seeds when one of them or their mean stalls; "
                f"set it to null, or use {instead}"
            )
        if issubclass(kind, WeightAveraging):
            raise UserError(
                f"callbacks.{option}: the best weights of each seed are kept without averages; "
                f"set it to null, or use {instead}"
            )


def check_one_process(trainer: L.Trainer) -> None:
    """Check that the trainer runs on one device.

    Raises:
        UserError: It runs on several.
    """
    if trainer.world_size > 1:
        raise UserError(
            f"trainer.devices: {trainer.world_size} devices, but seeds are trained at once on one; "
            "set trainer.devices=1"
        )


def prepare(cfg: DictConfig, output: Path) -> tuple[list[Part], Seeds]:
    """Build each seed's options, data and model as its single run would."""
    parts, models = [], []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        own = cfg.copy()
        with open_dict(own):
            own.seed, own.ckpt_path = seed, None
            del own.seeds
            own.output_dir = str(output / f"seed{seed}")
        L.seed_everything(seed, workers=True, verbose=False)
        part = Part(seed, own, cast(TwoTowerData, assemble.make_data(own)))
        model = assemble.make_model(own, part.data)
        assert isinstance(model, TwoTower)
        parts.append(part)
        models.append(model)
    return parts, Seeds(
        models, [part.seed for part in parts], monitor=cfg.monitor, mode=cfg.monitor_mode
    )


# After the training


def save_checkpoints(part: Part, model: Seeds, number: int, trainer: L.Trainer) -> None:
    """Write a seed's ``best.ckpt`` and ``last.ckpt``.

    Both are models to load. Training resumes from the checkpoint of the whole run.
    """
    folder = part.folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    hyper_parameters = dict(assemble.make_model(part.cfg, part.data).hparams)
    states = {
        "best": (model.best_of(number), model.best_steps[number]),
        "last": (model.state_of(number), trainer.global_step),
    }
    record = RunRecord(part.config, part.data.identity()).record
    for which, (state, step) in states.items():
        checkpoint = {
            "state_dict": {name: tensor.cpu().clone() for name, tensor in state.items()},
            TwoTower.CHECKPOINT_HYPER_PARAMS_KEY: hyper_parameters,
            "global_step": step,
            "epoch": trainer.current_epoch,
            "pytorch-lightning_version": L.__version__,
            KEY: record,
        }
        AtomicCheckpointIO().save_checkpoint(checkpoint, folder / f"{which}.ckpt")


def finish_seed(
    part: Part,
    model: Seeds,
    number: int,
    records: list[dict[str, float]],
    common: dict[str, Any],
) -> dict[str, Any]:
    """Test the state of a seed that ``cfg.test`` names, and write the files of a single run."""
    results = {
        **common,
        "name": part.name,
        "seed": part.seed,
        "notes": part.data.splits.notes,
        "data": part.data.sources,
    }
    if part.cfg.test is not None:
        results |= {
            "checkpoint": str(part.folder / "checkpoints" / f"{part.cfg.test}.ckpt"),
            **published_results(plain(part.cfg)),
            **test_seed(part, model, number),
        }
    write_json(part.folder / "history.json", records)
    assemble.draw_curves(records, part.folder, part.cfg, part.name)
    write_json(part.folder / "metrics.json", results)
    return results


def test_seed(part: Part, model: Seeds, number: int) -> dict[str, Any]:
    """Test a seed as its single run would."""
    state = model.best_of(number) if part.cfg.test == "best" else model.state_of(number)
    single = assemble.make_model(part.cfg, part.data).to(model.item_numeric.dtype)
    single.load_state_dict(state)
    quiet = OmegaConf.merge(part.cfg.trainer, {"enable_progress_bar": False})
    lightning = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = lightning.level
    lightning.setLevel(logging.WARNING)  # the devices are in the log already
    try:
        trainer: L.Trainer = instantiate(quiet, "trainer", logger=False, enable_checkpointing=False)
        return assemble.test_model(trainer, single, part.data)
    finally:
        lightning.setLevel(level)


def summarise(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the test figures over the seeds, with half the widths of the 95 % intervals."""
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
    """Print mean and interval of each metric beside the published figures and the baselines' means."""
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
    """Return W&B summary values: ``test/hr@10/mean``, its interval, each seed's, and the baselines' means."""
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
