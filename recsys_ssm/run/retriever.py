"""Open the run that retrieves candidates for a model that ranks them again (option ``retriever``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from recsys_ssm.data.base import RecommenderData
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import import_target, takes
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.run.resume import check_identity
from recsys_ssm.run.settings import settings
from recsys_ssm.run.trained import load_model, named_by, open_run


class Retriever(NamedTuple):
    """A trained model that retrieves candidates, and the options of its run that its figures depend on."""

    model: Recommender
    options: dict[str, Any]


def open_retriever(cfg: DictConfig, data: RecommenderData[Any]) -> Retriever | None:
    """Return the retriever that a config names; None if it names none.

    Args:
        cfg: The config.
        data: The dataset.

    Raises:
        UserError: The model takes no retriever; or there is no such run, or it has not finished, or it was trained on
            other data, so that it may have seen the items that are tested.
    """
    if cfg.retriever is None:
        return None
    target = cfg.model["_target_"]
    if not takes(import_target(target, "model"), "retriever"):
        raise UserError(
            f"retriever={cfg.retriever}: {target.rpartition('.')[2]} ranks the whole catalogue; leave it out"
        )
    with named_by("retriever"):
        run = open_run(str(cfg.retriever), root=cfg.output_root)
        if not (run.folder / "metrics.json").is_file() and not Path(cfg.retriever).is_file():
            raise UserError(
                f"run={cfg.retriever}: the run in {run.folder} has not finished; continue it with ckpt_path=last, or "
                "give a .ckpt file of it"
            )
        model, record = load_model(run)
    check_identity(record, data.identity(), f"retriever={cfg.retriever}")
    known = record.get("data")
    if not isinstance(known, Mapping) or "split" not in known:
        raise UserError(
            f"retriever={cfg.retriever}: its checkpoint does not say which items it was trained on; train it again"
        )
    return Retriever(model, settings(run.config))
