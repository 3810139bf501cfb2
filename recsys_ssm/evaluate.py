"""Test a trained model again: ``python -m recsys_ssm.evaluate run=<folder of a run, or a checkpoint>``."""

from __future__ import annotations

from recsys_ssm.cli import threads  # noqa: F401 - before PyTorch loads OpenMP

# isort: split
import logging
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig

from recsys_ssm.cli.command import command
from recsys_ssm.errors import UserError
from recsys_ssm.run.assemble import as_list, check_metrics, check_writable, test_model
from recsys_ssm.run.files import versions, write_json
from recsys_ssm.run.published import published_results
from recsys_ssm.run.table import print_results
from recsys_ssm.run.trained import check_same_data, load_model, make_data, open_run

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Test ``cfg.run`` on the data that it was trained with (``conf/evaluate.yaml``).

    Raises:
        UserError: There is no such run or checkpoint, or its data is not that of the training.
    """
    output = Path(cfg.output_dir)
    check_writable(output)
    try:
        trainer = L.Trainer(
            accelerator=cfg.accelerator,
            devices=1,  # one process, so no user is counted twice
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=output,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"accelerator={cfg.accelerator}: {' '.join(str(error).split())[:200]}"
        ) from error
    run = open_run(str(cfg.run), cfg.checkpoint, cfg.output_root)
    model, record = load_model(run)
    if cfg.metrics is not None:
        metrics = as_list(cfg.metrics)
        check_metrics(metrics)
        model.set_metrics(metrics)

    data = make_data(run, cfg.dataset)
    check_same_data(run, record, data, cfg.dataset)
    if not model.fits(data):
        raise UserError(
            f"run={cfg.run}: the dataset's columns, categories or items differ from those of the training; "
            "evaluate on the data the run was trained with, or train again"
        )
    results = {
        "name": run.name,
        "dataset": data.name,
        "generated": data.splits.generated,
        "notes": data.splits.notes,
        "data": data.sources,
        "versions": versions(),
        **test_model(trainer, model, data),
        "checkpoint": str(run.checkpoint),
        **published_results(run.config),
    }
    path = write_json(output / "metrics.json", results)
    print_results(results)
    log.info("metrics    %s", path)
    return results


main = command("evaluate")(evaluate)

if __name__ == "__main__":
    main()
