"""Train the two-tower models of several seeds as one batched computation.

The parameters of K models are stacked, (K, …). One model's forward pass runs over them and over K batches under
:func:`torch.vmap`, and the sum of the K losses is differentiated. No term mixes seeds, and an optimizer that works
element by element does not mix them either, so each seed is trained as it would be alone. A step takes as many operator
calls as a single model's, each over K times the data.

With dropout a seed draws other numbers than its single run, because the seeds share a generator: the distribution is
the same, the digits are not. Without dropout, and in float64, the two agree to rounding.

Legend: K seeds, B pairs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from recsys_ssm.batched_seeds.attention import register_attention_rule
from recsys_ssm.errors import UnknownMonitorError, UserError
from recsys_ssm.models.losses import InBatchSoftmax
from recsys_ssm.models.optim import configure_optimizers, parameter_groups, weight_decay
from recsys_ssm.models.two_tower import TwoTower

if TYPE_CHECKING:
    from recsys_ssm.batches import PairBatch, RankingBatch

ELEMENTWISE = frozenset(
    {
        "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    }
)  # fmt: skip
"""Optimizers of ``torch.optim`` that update each element from that element's gradients alone."""

FUSED = frozenset({"Adagrad", "Adam", "AdamW", "SGD"})
"""Optimizers that PyTorch has as one fused operator on the CPU."""


class BatchableSoftmax(InBatchSoftmax):
    """Compute :class:`InBatchSoftmax` with shapes that do not depend on the targets, as ``vmap`` needs them."""

    def forward(self, user: Tensor, item: Tensor, target: Tensor, item_index: Tensor) -> Tensor:
        return self.with_static_shapes(user, item, target, item_index)


class _Trained(nn.Module):
    """Hold the trained part of a model and its loss, under the model's own parameter names."""

    def __init__(self, model: TwoTower) -> None:
        super().__init__()
        self.user_tower, self.item_tower = model.user_tower, model.item_tower
        self.loss = model.loss
        if type(model.loss) is InBatchSoftmax:
            self.loss = BatchableSoftmax(relevant_above=model.loss.relevant_above)

    def forward(self, batch: PairBatch) -> Tensor:
        user, item = self.user_tower(batch.user), self.item_tower(batch.item)
        return self.loss(user, item, batch.target, batch.item_index)


class Seeds(L.LightningModule):
    """Train K two-tower models at once.

    ``state_dict`` has the names of a single model, with stacked tensors. The checkpoint also holds the best state of
    each seed so far. The first instance registers the ``vmap`` rule of PyTorch's CPU attention for the process.

    Args:
        models: One model for each seed, of the same architecture. Do not use them afterwards.
        seeds: Their seeds.
        monitor: Validation metric that chooses the best state of a seed, as ``val/ndcg@10``.
        mode: ``max`` if the best value is the largest, ``min`` if it is the smallest.

    Raises:
        UserError: The models differ in shape, or the optimizer would mix them.
    """

    user_tower: nn.Module
    item_tower: nn.Module
    item_numeric: Tensor
    item_categorical: Tensor

    def __init__(
        self,
        models: Sequence[TwoTower],
        seeds: Sequence[int],
        *,
        monitor: str = "val/ndcg@10",
        mode: Literal["min", "max"] = "max",
    ) -> None:
        super().__init__()
        register_attention_rule()
        _check_same(models, seeds)
        _check_elementwise(models[0].optimizer_spec)
        _check_loss(models[0].loss)
        self.seeds, self.monitor, self.mode = list(seeds), monitor, mode
        # One model serves validation and test. As a submodule its parameters would be trained, so it is in a tuple.
        self._single = (models[0],)
        self._trained = (_Trained(models[0]),)
        stacked = _stack([_Trained(model) for model in models])
        self.user_tower = stacked.get_submodule("user_tower")
        self.item_tower = stacked.get_submodule("item_tower")
        for name in ("item_numeric", "item_categorical"):
            self.register_buffer(name, torch.stack([getattr(model, name) for model in models]))
        self._batched = self._nonempty()
        self.losses = torch.full((len(models),), math.nan)
        """Losses (K,) of the last training step."""
        self.validated: list[dict[str, float]] = []
        """Figures of the last validation, for each seed."""
        self.best_values = [math.nan] * len(models)
        self.best_steps = [0] * len(models)
        self._best: dict[str, Tensor] = {}
        self._at_seed: int | None = None

    @property
    def single(self) -> TwoTower:
        """The model that validation loads each seed's state into."""
        return self._single[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Seeds:
        """Move to a device or a precision, together with the single model."""
        super()._apply(fn, recurse)
        self.single._apply(fn)
        self._batched = self._nonempty()
        return self

    def train(self, mode: bool = True) -> Seeds:
        super().train(mode)
        self.single.train(mode)
        return self

    def _nonempty(self) -> dict[str, Tensor]:
        """Return the parameters for ``vmap``, without empty ones (an embedding without categories)."""
        return {name: value for name, value in self.named_parameters() if value.numel()}

    # Training

    def forward(self, batch: PairBatch) -> Tensor:
        """Return the losses (K,) of a stacked batch."""

        def loss(parameters: dict[str, Tensor], batch: PairBatch) -> Tensor:
            return functional_call(self._trained[0], parameters, (batch,))

        return torch.vmap(loss, randomness="different")(self._batched, batch)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        losses_K = self(batch)
        self.losses = losses_K.detach()
        self.log("train/loss", self.losses.mean(), prog_bar=True, batch_size=batch.target.shape[1])
        return losses_K.sum()

    def configure_optimizers(self) -> Any:
        optimizer = dict(self.single.optimizer_spec)
        is_fused = str(optimizer["_target_"]).rpartition(".")[2] in FUSED
        is_open = optimizer.get("foreach") is None and optimizer.get("fused") is None
        if is_fused and is_open and self.device.type == "cpu":
            optimizer["fused"] = True  # one pass over K models' parameters in place of ten
        groups = self._parameter_groups(weight_decay(optimizer))
        return configure_optimizers(self, optimizer, self.single.scheduler_spec, groups)

    def _parameter_groups(self, decay: float) -> list[dict[str, Any]]:
        """Group the stacked parameters as a single model's."""
        stacked = dict(self.named_parameters())
        names = {id(single): name for name, single in self._trained[0].named_parameters()}
        return [
            {**group, "params": [stacked[names[id(single)]] for single in group["params"]]}
            for group in parameter_groups(self._trained[0], decay)
        ]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each seed's gradient by its own norm."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norms_K = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        factor_K = (gradient_clip_val / (norms_K + 1e-6)).clamp(max=1)  # as clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factor_K.view(-1, *[1] * (gradient.ndim - 1)))

    # Validation: the single model, with one seed's state after the other

    def on_validation_epoch_start(self) -> None:
        self.validated = []
        self._at_seed = None

    def validation_step(
        self, batch: PairBatch | RankingBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        number, part = divmod(dataloader_idx, 2)
        if number != self._at_seed:
            self._end_seed()
            self._at_seed = number
            self.single.load_state_dict(self.state_of(number))
            self.single.on_validation_epoch_start()
        self.single.validation_step(batch, batch_idx, part)

    def on_validation_epoch_end(self) -> None:
        self._end_seed()
        values = {}
        for name in self.validated[0]:
            each = [found[name] for found in self.validated]
            values[f"{name}/mean"] = sum(each) / len(each)
            values |= {
                f"{name}/seed{seed}": value for seed, value in zip(self.seeds, each, strict=True)
            }
        self.log_dict(values)
        if not self.trainer.sanity_checking:
            self._keep_best()

    def _end_seed(self) -> None:
        if self._at_seed is None:
            return
        found: dict[str, float] = {}
        # The single model does not belong to a trainer, so its log_dict collects the figures.
        single: Any = self.single
        single.log_dict = lambda values: found.update(
            {name: float(value) for name, value in values.items()}
        )
        single.on_validation_epoch_end()
        del single.log_dict
        self.validated.append(found)

    def _keep_best(self) -> None:
        """Keep the best state of each seed, like ModelCheckpoint: the first of equal values; NaN is the worst."""
        for number, found in enumerate(self.validated):
            if self.monitor not in found:
                raise UnknownMonitorError(self.monitor, found)
            value, best = found[self.monitor], self.best_values[number]
            better = value < best if self.mode == "min" else value > best
            if not self.best_steps[number] or better or (math.isnan(best) and value == value):
                self.best_values[number] = value
                self.best_steps[number] = self.global_step
                for name, tensor in self.state_of(number).items():
                    if name not in self._best:
                        shape = (len(self.seeds), *tensor.shape)
                        self._best[name] = torch.zeros(shape, dtype=tensor.dtype)
                    self._best[name][number].copy_(tensor)

    # States

    def state_of(self, number: int) -> dict[str, Tensor]:
        """Return the ``state_dict`` of the ``number``-th seed's model as it is now (views)."""
        own, shared = self.state_dict(), _tower_buffers(self)
        return {
            name: own[name] if name in shared else own[name][number]
            for name in self.single.state_dict()
        }

    def best_of(self, number: int) -> dict[str, Tensor]:
        """Return the ``state_dict`` of the seed's best validation; before the first one, :meth:`state_of`."""
        if not self.best_steps[number]:
            return self.state_of(number)
        return {name: tensor[number] for name, tensor in self._best.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seeds"] = {
            "seeds": self.seeds,
            "best": self._best,
            "best_values": self.best_values,
            "best_steps": self.best_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["seeds"]
        self._best = kept["best"]
        self.best_values, self.best_steps = kept["best_values"], kept["best_steps"]


def _stack(modules: Sequence[nn.Module]) -> nn.Module:
    """Return a copy of the first module whose parameters are those of all modules, stacked."""
    stacked = copy.deepcopy(modules[0])
    parameters = [dict(module.named_parameters()) for module in modules]
    for name in parameters[0]:
        path, _, last = name.rpartition(".")
        value = torch.stack([own[name].detach() for own in parameters])
        setattr(stacked.get_submodule(path), last, nn.Parameter(value))
    return stacked


def _tower_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the towers' buffers (places of features in a table, ranges of columns), which the seeds share."""
    return {name: value for name, value in model.named_buffers() if "_tower." in name}


def _check_same(models: Sequence[TwoTower], seeds: Sequence[int]) -> None:
    def shapes(model: TwoTower) -> dict[str, Any]:
        buffers = {name: value.tolist() for name, value in _tower_buffers(model).items()}
        return {name: tuple(x.shape) for name, x in model.state_dict().items()} | buffers

    first = shapes(models[0])
    for model, seed in zip(models, seeds, strict=True):
        own = shapes(model)
        for name in first:
            if own.get(name) != first[name]:
                raise UserError(
                    f"seeds: {name} is {first[name]!s:.60} with seed {seeds[0]} and "
                    f"{own.get(name)!s:.60} with seed {seed} "
                    "(the seeds' data differ in columns, categories, ranges or items); train them one by one"
                )


def _check_loss(loss: nn.Module) -> None:
    for option in ("logq", "negatives"):
        if value := getattr(loss, option, None):
            raise UserError(
                f"loss.{option}={str(value).lower()} is not batched over seeds; train the seeds one by one"
            )


def _check_elementwise(optimizer: Mapping[str, Any]) -> None:
    target = str(optimizer["_target_"])
    package, _, name = target.rpartition(".")
    if not package.startswith("torch.optim") or name not in ELEMENTWISE:
        raise UserError(
            f"optimizer={target}: it does not update element by element, so it would mix the seeds; choose one of "
            f"torch.optim's {', '.join(sorted(ELEMENTWISE))}, or train the seeds one by one"
        )
