"""Read checkpoints as plain data and tensors, and check that they fit a model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recsys_ssm.errors import UserError
from recsys_ssm.run.checkpoint_io import is_whole

log = logging.getLogger(__name__)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a Lightning checkpoint without executing code in it.

    Raises:
        UserError: The file is not such a checkpoint, or is damaged.
    """
    try:
        whole = is_whole(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a foreign file, which is refused below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        raise UserError(
            f"{path}: not a readable checkpoint ({_reason(error)}); give another one"
        ) from error
    if checkpoint is None:
        raise UserError(
            f"{path}: damaged, it differs from what was written; give another checkpoint"
        )
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(
            f"{path}: not a Lightning checkpoint: it has no state_dict; give another file"
        )
    return checkpoint


def newest_valid(folder: Path, names: Sequence[str] = ("last.ckpt", "best.ckpt")) -> Path:
    """Return the newest checkpoint of a folder that can be read; log the damaged ones that are passed over.

    Args:
        folder: A run's ``checkpoints``.
        names: Files to consider, the preferred one first.

    Raises:
        UserError: None of them is there, or none can be read.
    """
    there = [folder / name for name in names if (folder / name).is_file()]
    if not there:
        raise UserError(f"{folder}: no checkpoint in it; give the folder of another run")
    problems = []
    for path in there:
        try:
            read_checkpoint(path)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning("%s; %s is used", problem.partition(";")[0], path.name)
        return path
    raise UserError(problems[0])


def check_fits(checkpoint: dict[str, Any], model: nn.Module, path: Path) -> None:
    """Check that a checkpoint's weights have the names and shapes of a model's.

    Raises:
        UserError: Names or shapes differ; the message names the first difference.
    """
    have, want = checkpoint["state_dict"], model.state_dict()
    different = [
        f"{name} is {_shape(have.get(name))} there and {_shape(want.get(name))} here"
        for name in dict.fromkeys((*want, *have))
        if _shape(have.get(name)) != _shape(want.get(name))
    ]
    if different:
        raise UserError(
            f"{path}: a checkpoint of another architecture: {different[0]}"
            + (f", and {len(different) - 1} more" if len(different) > 1 else "")
            + "; give the dataset, backbone and sizes it was trained with"
        )


def _shape(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else str(tuple(tensor.shape))


def _reason(error: BaseException) -> str:
    """Return the first line of an error, without PyTorch's advice to read a file unsafely."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "it holds more than plain data" if "weights_only" in text.lower() else text[:200]
