"""Optimizers and learning-rate schedules from specs."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import Spec, build, defaults_of, find

NO_DECAY = ("A_log", "D", "dt_bias", "bias")
"""Last part of the names of parameters that weight decay would harm: the recurrence's own and biases."""


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to ``min_factor`` of the rate.

    Args:
        optimizer: Whose rate it is.
        warmup_steps: Steps until the full rate; a tenth of ``total_steps`` if that is shorter.
        total_steps: Steps until the lowest. In a config -1 means all of the training's, by its steps or its epochs.
        min_factor: Lowest rate over full rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 100,
        total_steps: int = -1,
        min_factor: float = 0.0,
    ) -> None:
        if total_steps < 1:
            raise UserError(
                f"scheduler.total_steps={total_steps}: give at least 1, or set trainer.max_steps or trainer.max_epochs"
            )
        if warmup_steps >= total_steps:  # a short training warms up for a tenth of its steps
            warmup_steps = total_steps // 10

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            done = min((step - warmup_steps) / max(1, total_steps - warmup_steps), 1.0)
            return min_factor + (1 - min_factor) * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, factor)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters by weight decay: matrices decay; norms, biases and the recurrence's own do not.

    Without weight decay there is one group.
    """
    if not weight_decay:
        return [{"params": list(module.parameters())}]
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in module.named_parameters():
        spared = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY
        groups[spared]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def weight_decay(optimizer: Spec) -> float:
    """Return the spec's weight decay, or the default of its class."""
    target = find(optimizer["_target_"], "optimizer") if "_target_" in optimizer else object
    return float(optimizer.get("weight_decay", defaults_of(target).get("weight_decay", 0.0)))


def configure_optimizers(
    module: L.LightningModule,
    optimizer: Spec,
    scheduler: Spec | None,
    groups: list[dict[str, Any]] | None = None,
) -> Any:
    """Return the value for ``LightningModule.configure_optimizers``.

    Args:
        module: The module whose parameters are trained.
        optimizer: The optimizer's class and options.
        scheduler: The learning-rate schedule's, or None.
        groups: Parameter groups in place of :func:`parameter_groups`.

    Raises:
        UserError: The specs name no optimizer or scheduler, or an option they do not have.
    """
    if groups is None:
        groups = parameter_groups(module, weight_decay(optimizer))
    made = build(optimizer, Optimizer, "optimizer", params=groups)
    if scheduler is None:
        return made
    if scheduler.get("total_steps") == -1:
        scheduler = {**scheduler, "total_steps": _training_steps(module)}
    schedule = build(scheduler, LRScheduler, "scheduler", optimizer=made)
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _training_steps(module: L.LightningModule) -> int:
    steps: int | float = -1
    if getattr(module, "_trainer", None):
        steps = module.trainer.estimated_stepping_batches
        # Lightning has set the training loader up to count its batches, and would not set it up again
        # when a checkpoint is restored: the loader's position would be lost.
        module.trainer.fit_loop._combined_loader = None
    if steps == float("inf") or steps < 1:
        raise UserError(
            "scheduler.total_steps=-1: the training has no end to count to; "
            "set trainer.max_steps, trainer.max_epochs or scheduler.total_steps"
        )
    return int(steps)
