"""Read runs from W&B's server, and log a report's tables and figures to it."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import wandb
from matplotlib.image import imread

from recsys_ssm.errors import UserError
from recsys_ssm.reports.collect import make_run
from recsys_ssm.reports.document import Document, Image, Table
from recsys_ssm.reports.runs import Problem, Run, number
from recsys_ssm.run.loggers import STEP, Mode, results_of_summary, wandb_mode
from recsys_ssm.run.published import backbone_class

PREFIX = "wandb:"


def read_runs(source: str, api: Any = None) -> tuple[list[Run], list[Problem]]:
    """Read the finished runs of a project on W&B's server.

    Args:
        source: ``wandb:entity/project`` or ``wandb:entity/project/group``.
        api: a ``wandb.Api``; made if None.

    Raises:
        UserError: There is no such project, or the server does not answer.
    """
    entity, _, rest = source.removeprefix(PREFIX).partition("/")
    project, _, group = rest.partition("/")
    if not entity or not project:
        raise UserError(f"sweep={source}: expected {PREFIX}entity/project or …/project/group")
    runs, problems = [], []
    try:
        api = api or wandb.Api(timeout=30)
        found = api.runs(f"{entity}/{project}", filters={"group": group} if group else None)
        for run in found:
            place = Path(f"{PREFIX}{entity}", project, run.id)
            if not backbone_class(run.config):
                continue  # a report, or a run of another program
            results = results_of_summary(dict(run.summary))
            if run.state != "finished" or not results.get("metrics"):
                problems.append(Problem(place, f"not finished: {run.state}"))
                continue
            dataset = run.config["dataset"]["name"]
            results = {"name": run.name, "seed": run.config["seed"], "dataset": dataset} | results
            runs.append(make_run(place, results, dict(run.config), _history(run)))
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise UserError(f"sweep={source}: {str(error).splitlines()[0]}") from error
    return runs, problems


def _history(run: Any) -> list[dict[str, Any]]:
    """Return validation metrics by step."""
    records = []
    for row in run.scan_history():
        values = {name: value for name, value in row.items() if name.startswith("val/")}
        if values and math.isfinite(number(row.get(STEP))):
            records.append({"step": int(row[STEP]), **values})
    return records


def log_report(document: Document, project: str, folder: Path, mode: Mode = "auto") -> None:
    """Log the report's tables as W&B tables and its figures as images, in a W&B run of its own.

    Args:
        document: the report.
        project: ``project`` or ``entity/project``.
        folder: where ``wandb/`` goes.
        mode: as for the logger of a training: offline without a key or a network.
    """
    entity, _, name = project.rpartition("/")
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=name,
        entity=entity or None,
        job_type="report",
        name=document.title,
        dir=str(folder),
        mode=wandb_mode(mode),
        settings=wandb.Settings(quiet=True),
    )
    try:
        for block in document.blocks:
            if isinstance(block, Table):
                rows = [[cell.replace("**", "") for cell in row] for row in block.rows]
                table = wandb.Table(columns=list(block.head), data=rows)
                run.log({f"tables/{block.label or 'table'}": table})
            elif isinstance(block, Image):
                pixels = imread(io.BytesIO(block.png), format="png")
                run.log({f"figures/{block.name}": wandb.Image(pixels, caption=block.caption)})
    finally:
        run.finish()
