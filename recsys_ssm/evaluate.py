"""Test a trained model again: ``python -m recsys_ssm.evaluate run=<folder of a run, or a checkpoint>``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf

from recsys_ssm.cli.command import command
from recsys_ssm.data.base import RecommenderData
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import find, make, plain
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.run.assemble import check_writable, test_model
from recsys_ssm.run.checkpoints import read_checkpoint
from recsys_ssm.run.files import versions, write_json
from recsys_ssm.run.table import print_results

log = logging.getLogger(__name__)

TWO_TOWER = "recsys_ssm.models.two_tower.TwoTower"
"""What a run is of whose config does not say so yet."""


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Test ``cfg.run`` on its dataset, which ``cfg.dataset`` may change (``conf/evaluate.yaml``).

    Raises:
        UserError: There is no such run or checkpoint, or it does not fit the dataset.
    """
    output = Path(cfg.output_dir)
    check_writable(output)
    checkpoint, run = find_run(cfg.run, cfg.checkpoint)
    trained = load_config(run)
    model = load_model(checkpoint, trained.head.get("_target_", TWO_TOWER))
    if cfg.metrics is not None:
        model.set_metrics(plain(cfg.metrics))

    data: RecommenderData[Any] = make(OmegaConf.merge(trained.dataset, cfg.dataset), "dataset")
    if not model.fits(data):
        raise UserError(
            f"run={cfg.run}: the dataset's columns, categories or items are not those of the training; "
            "evaluate on the data the run was trained with, or train again"
        )
    trainer = L.Trainer(
        accelerator=cfg.accelerator,
        devices=1,  # one process: no user is counted twice, and a test is short
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=output,
    )
    results = {
        "name": trained.name,
        "dataset": data.name,
        "generated": data.splits.generated,
        "notes": data.splits.notes,
        "versions": versions(),
        **test_model(trainer, model, data),
        "checkpoint": str(checkpoint),
        "published": plain(trained.get("published")) or {},
    }
    path = write_json(output / "metrics.json", results)
    print_results(results)
    log.info("metrics    %s", path)
    return results


def find_run(run: str, which: str) -> tuple[Path, Path]:
    """The checkpoint, and the folder of the run it belongs to.

    Raises:
        UserError: There is none.
    """
    path = Path(run)
    if path.is_file():
        return path, path.parent.parent
    if which not in ("best", "last"):
        raise UserError(f"checkpoint={which}: expected best or last")
    checkpoint = path / "checkpoints" / f"{which}.ckpt"
    if not checkpoint.is_file():
        raise UserError(
            f"run={run}: no {checkpoint.relative_to(path)} in it; give a run's folder or a .ckpt file"
        )
    return checkpoint, path


def load_config(run: Path) -> DictConfig:
    """What a run was made of, as its training wrote it.

    Raises:
        UserError: There is no such file.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such file; the run's config says which dataset to test on")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def load_model(checkpoint: Path, module: str) -> Recommender:
    """The model of a checkpoint, a LightningModule of the class ``module`` names.

    Raises:
        UserError: The file is no checkpoint of such a model.
    """
    read_checkpoint(checkpoint)
    try:
        return find(module, "head").load_from_checkpoint(
            checkpoint, map_location="cpu", weights_only=True
        )
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint}: no checkpoint of a {module.rpartition('.')[2]} model ({str(error).splitlines()[0]})"
        ) from error


main = command("evaluate")(evaluate)

if __name__ == "__main__":
    main()
