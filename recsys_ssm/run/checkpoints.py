"""Reading checkpoints: plain data and tensors only, and a clear word when one does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from recsys_ssm.errors import UserError


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint, read without executing code in it.

    Raises:
        UserError: The file is no such checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the reader raise
        raise UserError(f"{path}: not a readable checkpoint ({_first_line(error)})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path}: not a Lightning checkpoint: it has no state_dict")
    return checkpoint


def check_fits(checkpoint: dict[str, Any], model: nn.Module, path: Path) -> None:
    """Hold a checkpoint's weights against a model's.

    Raises:
        UserError: Names or shapes differ; the first difference is named.
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
