"""Check that a run resumes with the options and the data of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from recsys_ssm.errors import UserError
from recsys_ssm.run.settings import flatten

KEY = "recsys_ssm"
"""Where a checkpoint stores the record of its run."""

# Options that a checkpoint fixes: the others take effect when a run is resumed.
_FIXED = re.compile(
    r"(seed|monitor|monitor_mode"
    r"|(dataset|model|tokenizer|head|loss|backbone|optimizer|scheduler|text|retrieved_by)\..*"
    r"|callbacks\.(checkpoint|early_stopping)\.(monitor|mode|patience|min_delta)|callbacks\.ema\..*)"
)
# Of these, the ones that may change: places, speed, the length of the training. Other data is found by its content.
_FREE = re.compile(
    r"dataset\.(name|root|cache_dir|interactions|users|items|titles|title_names|download|source|eval_batch_size|num_workers)(\..*)?"
    r"|scheduler\.total_steps|model\.metrics"
)


class RunRecord(L.Callback):
    """Store the run's options, the identity of its data and the number of its processes in every checkpoint.

    A run that resumes with another number of processes goes on at the same place of the epoch: see :func:`rescale`.

    Args:
        config: The run's config, plain and resolved.
        identity: Hashes of the data: see :meth:`recsys_ssm.data.base.RecommenderData.identity`.
    """

    def __init__(self, config: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        self.record = {"options": fixed_options(config), "data": dict(identity)}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = {**self.record, "processes": trainer.world_size}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        record, data = checkpoint.get(KEY), trainer.datamodule  # type: ignore[attr-defined]
        before = record.get("processes") if isinstance(record, Mapping) else None
        if isinstance(before, int) and before != trainer.world_size and data is not None:
            n_batches = len(data.train_dataloader())
            rescale(checkpoint["loops"]["fit_loop"], before, trainer.world_size, n_batches)


def rescale(loop: dict[str, Any], before: int, now: int, n_batches: int) -> None:
    """Move a checkpoint's place in the epoch to that of another number of processes.

    All processes together have read ``before`` times as many batches as each of them. Where that does not divide, some
    pairs or rows are read twice, and none is left out.

    Args:
        loop: State of Lightning's loop, changed in place.
        before: Processes of the checkpoint.
        now: Processes that resume.
        n_batches: Batches of each of these in an epoch.
    """
    progress = loop["epoch_loop.batch_progress"]
    for loader in loop["state_dict"].get("combined_loader", []):
        place = min(loader["position"] * before // now, n_batches - 1)
        loader["position"] = place
    ready = progress["current"]["ready"]
    done = n_batches if progress["is_last_batch"] else min(ready * before // now, n_batches - 1)
    # A checkpoint written within a step counts that batch as ready but not as completed.
    progress["current"] = {
        name: max(0, done + count - ready) for name, count in progress["current"].items()
    }


def fixed_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a resumed run cannot change, as ``option -> value``."""
    return {
        key: value
        for key, value in flatten(config)
        if _FIXED.fullmatch(key) and not _FREE.fullmatch(key)
    }


def check_resume(
    checkpoint: Mapping[str, Any],
    config: Mapping[str, Any],
    identity: Mapping[str, str],
    path: Path,
) -> None:
    """Check a config and its data against the record in a checkpoint (checkpoints without one pass).

    Raises:
        UserError: An option or the data differs (the message names the first difference), or the checkpoint holds
            weights alone.
    """
    if "optimizer_states" not in checkpoint or "loops" not in checkpoint:
        raise UserError(
            f"ckpt_path={path}: holds weights alone (save_weights_only=true), so a training cannot resume from it; "
            "begin a new run without ckpt_path"
        )
    record = checkpoint.get(KEY)
    if not isinstance(record, Mapping):
        return
    check_identity(record, identity, f"ckpt_path={path}")
    before, now = record["options"], fixed_options(config)
    changed = [key for key in before if key in now and before[key] != now[key]]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{key}={now[key]}: the checkpoint was trained with {before[key]}{more}, and a resumed run keeps that; "
            "leave the option as it was, or begin a new run without ckpt_path"
        )


def check_identity(record: Mapping[str, Any], identity: Mapping[str, str], option: str) -> None:
    """Check the data's identity against that of a checkpoint.

    Raises:
        UserError: Items, users or split differ.
    """
    known = record.get("data", {})
    different = [name for name, value in identity.items() if known.get(name, value) != value]
    if different:
        raise UserError(
            f"{option}: the data's {' and '.join(different)} are not those of the training (the files or the options "
            "of the dataset have changed); give the same data, or train again"
        )
