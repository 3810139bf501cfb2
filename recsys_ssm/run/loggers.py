"""Make loggers for a run, and send them its results: W&B without prompts or waiting, CSV, or any of Lightning's."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import matplotlib.image
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from recsys_ssm.errors import UserError

log = logging.getLogger(__name__)

NETWORK_TIMEOUT_S = 3.0

Mode = Literal["auto", "online", "offline", "disabled"]


def wandb_logger(
    *,
    save_dir: str,
    name: str,
    project: str = "recsys_ssm",
    entity: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    tags: list[str] | None = None,
    mode: Mode = "auto",
    log_model: bool = False,
    monitor: str | None = None,
    monitor_mode: Literal["min", "max"] = "max",
) -> WandbLogger:
    """Make Lightning's W&B logger; ``save_dir`` keeps the run's id, so that a resumed run is the same W&B run.

    Args:
        save_dir: Where ``wandb/`` goes: the run's folder.
        name: The run's name.
        project, entity, group, job_type, tags: As in ``wandb.init``; ``WANDB_PROJECT``, ``WANDB_ENTITY``,
            ``WANDB_RUN_GROUP``, ``WANDB_JOB_TYPE``, ``WANDB_NAME`` and ``WANDB_TAGS`` win over them.
        mode: ``auto``: what ``WANDB_MODE`` says; else online if there is a key and W&B's server answers within three
            seconds, and offline if not.
        log_model: Upload checkpoints as artifacts (online only).
        monitor, monitor_mode: The metric whose best value stands in the run's summary, and what is best.
    """
    mode = wandb_mode(mode)
    if bad := set(project) & set("/\\#?%:"):
        raise UserError(
            f"logger.project={project}: W&B allows no {' '.join(sorted(bad))} in it; give the name alone, "
            "and the team with logger.entity"
        )
    if log_model and mode != "online":
        raise UserError(
            f"logger.log_model=true needs W&B online, and it is {mode}: log in with `wandb login`, "
            "or leave log_model=false"
        )
    env = os.environ.get
    id_file = Path(save_dir) / "wandb_run_id.txt"
    if not id_file.exists():
        id_file.write_text(env("WANDB_RUN_ID") or secrets.token_hex(4))
    env_tags = env("WANDB_TAGS")
    logger = WandbLogger(
        name=env("WANDB_NAME", name),
        save_dir=save_dir,
        id=id_file.read_text(),
        project=env("WANDB_PROJECT", project),
        entity=env("WANDB_ENTITY", entity or "") or None,
        group=env("WANDB_RUN_GROUP", "".join(_shortened([group or ""], 128))) or None,
        job_type=env("WANDB_JOB_TYPE", job_type or "") or None,
        tags=env_tags.split(",") if env_tags else _shortened(tags or [], 64),
        log_model=log_model,
        mode=mode,
        resume="allow",
        settings=wandb.Settings(quiet=True, silent=True),  # the lines of a run are ours
    )
    # Lightning hands on a setting that W&B has dropped, and W&B would warn of it in every run.
    logger._wandb_init.pop("anonymous", None)
    define_metrics(logger.experiment, monitor, monitor_mode)
    if mode == "online":
        log.info("W&B: %s", logger.experiment.url)
    return logger


def _shortened(texts: Sequence[str], limit: int) -> list[str]:
    """Cut texts to the length that W&B takes; a hash at the end keeps them different."""
    cut = []
    for text in texts:
        if len(text) > limit:
            log.info("W&B takes %d characters at most: %s is shortened", limit, text)
            text = f"{text[: limit - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        cut.append(text)
    return cut


STEP = "trainer/global_step"
"""Lightning's name of the training step: the axis of all curves."""


def define_metrics(run: Any, monitor: str | None, monitor_mode: Literal["min", "max"]) -> None:
    """Draw curves over the training step; keep the best loss and monitored metric in the summary."""
    best = {"train/loss": "min", "val/loss": "min"} | ({monitor: monitor_mode} if monitor else {})
    for name in ("train/*", "val/*"):
        run.define_metric(name, step_metric=STEP)
    for name, summary in best.items():
        run.define_metric(name, step_metric=STEP, summary=f"{summary},last")


GROUPS = {
    "metrics": "test",
    "metrics_all_users": "test_all_users",
    "metrics_filtered": "test_filtered",
    "metrics_unfiltered": "test_unfiltered",
    "published": "published",
    "cost": "cost",
    "parameters": "parameters",
    "latency": "latency",
}
"""Names of the parts of ``metrics.json`` in a W&B summary; baselines have their own."""

_PLAIN = ("dataset", "generated", "seed", "steps", "train_seconds")


def run_summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a run's results to summary values: ``test/hr@10``, ``popularity/hr@10``, ``cost/seconds_per_step``."""
    groups = {GROUPS[part]: results.get(part) or {} for part in GROUPS}
    groups |= results.get("baselines") or {}
    flat = {f"{group}/{name}": v for group, values in groups.items() for name, v in values.items()}
    return flat | {name: results[name] for name in _PLAIN if name in results}


def results_of_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Invert :func:`run_summary`, without the values that Lightning and W&B added."""
    parts = {name: part for part, name in GROUPS.items()}
    results: dict[str, Any] = {name: summary[name] for name in _PLAIN if name in summary}
    for key, value in summary.items():
        group, slash, name = key.partition("/")
        if group in parts:
            results.setdefault(parts[group], {})[name] = value
        elif (
            slash
            and group not in ("train", "val", "trainer")
            and not group.startswith(("lr-", "_"))
        ):
            results.setdefault("baselines", {}).setdefault(group, {})[name] = value
    return results


def wandb_mode(mode: Mode) -> Literal["online", "offline", "disabled"]:
    """Resolve the mode ``auto``: see :func:`wandb_logger`."""
    if wanted := os.environ.get("WANDB_MODE"):
        if wanted not in ("online", "offline", "disabled", "dryrun", "run"):
            raise UserError(f"WANDB_MODE={wanted}: expected online, offline or disabled")
        mode = {"dryrun": "offline", "run": "online"}.get(wanted, wanted)  # type: ignore[assignment]
    if mode != "auto":
        return mode
    if not _api_key():
        log.info("W&B: no API key, so this run is logged offline; `wandb sync` uploads it later")
        return "offline"
    url = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=NETWORK_TIMEOUT_S).close()
    except OSError as error:
        log.warning(
            "W&B: %s does not answer (%s), so this run is logged offline", url.hostname, error
        )
        return "offline"
    return "online"


def _api_key() -> str | None:
    """Return W&B's key from its variable, its settings or ``.netrc``.

    Newer versions print on stderr that this property is deprecated; older ones have no other that never prompts.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        return wandb.api.api_key


def csv_logger(*, save_dir: str, name: str) -> CSVLogger:
    """Write ``csv/version_0/metrics.csv`` in the run's folder; a resumed run adds ``version_1``."""
    return CSVLogger(save_dir, name="csv")


def log_results(
    loggers: Sequence[Logger], results: Mapping[str, Any], pictures: Sequence[Path]
) -> None:
    """Send a run's results and pictures to every logger.

    W&B gets them as summary values and images. Other loggers get the numbers as metrics; pictures go to those that can
    show one (TensorBoard, MLflow, Comet, Neptune).
    """
    log_summary(loggers, run_summary(results), int(results.get("steps") or 0), pictures)


def log_summary(
    loggers: Sequence[Logger], summary: Mapping[str, Any], step: int, pictures: Sequence[Path]
) -> None:
    """Send summary values and pictures to every logger; see :func:`log_results`."""
    numbers = {
        name: float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(summary)
        else:
            logger.log_metrics(numbers, step=step)
        for picture in pictures:
            _log_picture(logger, picture)
        logger.save()


def _log_picture(logger: Logger, path: Path) -> None:
    """Send a PNG file to a logger that can show one."""
    kind = type(logger).__name__
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):  # W&B
        logger.log_image(path.stem, [str(path)])
    elif hasattr(experiment, "add_image"):  # TensorBoard
        experiment.add_image(path.stem, matplotlib.image.imread(path)[..., :3], dataformats="HWC")
    elif kind == "MLFlowLogger":
        experiment.log_artifact(getattr(logger, "run_id", None), str(path))
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(str(path), name=path.stem)
    elif kind == "NeptuneLogger":
        experiment[path.stem].upload(str(path))


def finish(loggers: Sequence[Logger], failed: bool) -> None:
    """End the W&B run in any case: the next job of a sweep must not write into it."""
    if any(isinstance(logger, WandbLogger) for logger in loggers) and wandb.run is not None:
        wandb.finish(exit_code=int(failed))
