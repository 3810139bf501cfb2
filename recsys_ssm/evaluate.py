"""Test a trained model again: ``python -m recsys_ssm.evaluate run=<folder of a run, or a checkpoint>``."""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
import logging
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf

from recsys_ssm.cli.command import command
from recsys_ssm.data.base import RecommenderData
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import find, instantiate, plain
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.run.assemble import check_writable, test_model
from recsys_ssm.run.checkpoints import read_checkpoint
from recsys_ssm.run.files import versions, write_json
from recsys_ssm.run.published import published_results
from recsys_ssm.run.table import print_results

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Test the model of ``cfg.run`` on its dataset; ``cfg.dataset`` may change options of the dataset.

    Raises:
        UserError: There is no such run or checkpoint, or it does not fit the dataset.
    """
    output = Path(cfg.output_dir)
    check_writable(output)
    checkpoint, run = find_run(cfg.run, cfg.checkpoint)
    trained = load_config(run)
    model = load_model(checkpoint, model_class(trained, run))
    if cfg.metrics is not None:
        model.set_metrics(plain(cfg.metrics))

    data: RecommenderData[Any] = instantiate(
        OmegaConf.merge(trained.dataset, cfg.dataset), "dataset"
    )
    if not model.fits(data):
        raise UserError(
            f"run={cfg.run}: the dataset's columns, categories or items differ from those of the training; "
            "evaluate on the data the run was trained with, or train again"
        )
    trainer = L.Trainer(
        accelerator=cfg.accelerator,
        devices=1,  # one process, so no user is counted twice
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
        "data": data.sources,
        "versions": versions(),
        **test_model(trainer, model, data),
        "checkpoint": str(checkpoint),
        **published_results(OmegaConf.to_container(trained)),  # type: ignore[arg-type]
    }
    path = write_json(output / "metrics.json", results)
    print_results(results)
    log.info("metrics    %s", path)
    return results


def find_run(run: str, which: str) -> tuple[Path, Path]:
    """Return the checkpoint, and the folder of the run that it belongs to.

    Raises:
        UserError: There is no such checkpoint.
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
    """Load the config.yaml that training saved.

    Raises:
        UserError: There is no such file.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a folder in which a run left its config")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def model_class(trained: DictConfig, run: Path) -> str:
    """Return the dotted path of the model's class in a run's config.

    Raises:
        UserError: The config does not name a class.
    """
    path = OmegaConf.select(trained, "model._target_")
    if not isinstance(path, str):
        raise UserError(f"{run}: config.yaml does not name a model; give a run of this version")
    return path


def load_model(checkpoint: Path, module: str) -> Recommender:
    """Load the model of a checkpoint; ``module`` is the dotted path of its class.

    Raises:
        UserError: The file is not a checkpoint of such a model.
    """
    read_checkpoint(checkpoint)
    try:
        return find(module, "model").load_from_checkpoint(
            checkpoint, map_location="cpu", weights_only=True
        )
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint}: not a checkpoint of a {module.rpartition('.')[2]} model "
            f"({str(error).splitlines()[0]}); give the checkpoint of this run"
        ) from error


main = command("evaluate")(evaluate)

if __name__ == "__main__":
    main()
