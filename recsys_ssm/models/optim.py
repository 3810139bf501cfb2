"""Build optimizers and learning-rate schedules from specs."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import Spec, build, defaults_of, find

NO_DECAY = ("A_log", "D", "dt_bias", "bias")
"""Last part of the names of parameters without weight decay: biases and parameters of the recurrence."""


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to ``min_factor`` times the full rate.

    Args:
        optimizer: Optimizer whose rate is scheduled.
        warmup_steps: Steps until the full rate. A training that is not longer warms up for a tenth of its steps.
        total_steps: Steps until the lowest rate. In a config, -1 means all steps of the training.
        min_factor: Lowest rate divided by the full rate.
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


def parameter_groups(
    module: nn.Module, weight_decay: float, only: Container[str] | None = None
) -> list[dict[str, Any]]:
    """Split parameters into those that decay (matrices) and the rest (norms, biases, parameters of the recurrence).

    Without weight decay there is one group.

    Args:
        module: Module whose parameters are trained.
        weight_decay: Weight decay of the optimizer.
        only: Names of the parameters that decay; None: all matrices.
    """
    if not weight_decay:
        return [{"params": list(module.parameters())}]
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY
        spared = spared if only is None else name not in only
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
    """Return the result of ``LightningModule.configure_optimizers``.

    Args:
        module: Model to train.
        optimizer: Spec of the optimizer.
        scheduler: Spec of the learning-rate schedule; None: the rate stays.
        groups: Parameter groups; None: those of :func:`parameter_groups`.

    Raises:
        UserError: A spec does not name an optimizer or scheduler, or has an option that the class does not.
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
    """Return the number of steps that the module's trainer will take."""
    steps: int | float = -1
    if getattr(module, "_trainer", None):
        steps = module.trainer.estimated_stepping_batches
        # To count its batches, Lightning has set up the training loader. It would not set it up again when a
        # checkpoint is restored, and the loader's position would be lost.
        module.trainer.fit_loop._combined_loader = None
    if steps == float("inf") or steps < 1:
        raise UserError(
            "scheduler.total_steps=-1: the training has no fixed number of steps; "
            "set trainer.max_steps, trainer.max_epochs or scheduler.total_steps"
        )
    return int(steps)
