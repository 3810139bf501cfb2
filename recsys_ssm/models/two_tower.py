"""The two-tower LightningModule: features of users and of items, each through a tower, compared by inner product.

``features (B, F) → tokenizer → (B, F+1, D) → backbone → (B, F+1, D) → last token → MLP → (B, S)``, once for each side;
the score of a pair is the inner product (FT-Mamba, section II.C).

Legend: B pairs, U users, I items, D = d_model, S = size of the embedding that is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import polars as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.instantiate import Spec, build, check_arguments
from recsys_ssm.metrics import DEFAULT_METRICS, RankingMetrics, over_all_users, rank_top_k
from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.models.heads import LOSSES, LossName, TowerHead
from recsys_ssm.models.optim import configure_optimizers
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.models.tokenizers import FeatureTokenizer
from recsys_ssm.recommendations import Rankings

if TYPE_CHECKING:
    from recsys_ssm.batches import PairBatch, RankingBatch
    from recsys_ssm.data.two_tower import TwoTowerData

ENCODE_ROWS = 4096
"""Rows encoded at once when a whole table is: bounds memory, costs no speed."""


class Tower(nn.Module):
    """One side: features (B, F) to an embedding (B, S)."""

    def __init__(self, tokenizer: FeatureTokenizer, backbone: Backbone, head: TowerHead) -> None:
        super().__init__()
        self.tokenizer, self.backbone, self.head = tokenizer, backbone, head

    def forward(self, features: Features) -> Tensor:
        tokens_BLD = self.backbone(self.tokenizer(features))
        last_or_mean = tokens_BLD[:, -1] if self.backbone.pooling == "last" else tokens_BLD.mean(1)
        return self.head(last_or_mean)

    @torch.no_grad()
    def encode(self, features: Features) -> Tensor:
        """Embeddings of a whole table, in blocks."""
        blocks = [
            self(features.rows(slice(start, start + ENCODE_ROWS)))
            for start in range(0, max(features.n_rows, 1), ENCODE_ROWS)  # no row: one empty block
        ]
        return torch.cat(blocks)


class TwoTower(Recommender):
    """A tower for users, a tower for items, and how they are trained.

    Every argument but ``items`` is plain data and is kept in the checkpoint, the catalogue's features beside the
    weights: ``TwoTower.load_from_checkpoint(path)`` needs neither Hydra nor the dataset.

    Args:
        user_schema, item_schema: :meth:`FeatureSchema.to_dict` of each side.
        item_ids: What the catalogue's items are called, in catalogue order (equal scores are ranked in it).
        items: The catalogue's features, I rows.
        backbone: Spec of a :class:`Backbone`; it is built twice, once a tower.
        tokenizer: Arguments of :class:`FeatureTokenizer`.
        head: Arguments of :class:`TowerHead`, and ``loss``: ``mse``, ``bce`` or ``softmax``.
        optimizer: Spec of a ``torch.optim`` optimizer.
        scheduler: Spec of a learning-rate scheduler, stepped each step; none: the rate stays.
        metrics: Ranking metrics of validation and test, as ``hr@10``.

    Raises:
        UserError: An option is unknown or of the wrong type.
    """

    def __init__(
        self,
        *,
        user_schema: Mapping[str, Any],
        item_schema: Mapping[str, Any],
        item_ids: Sequence[str],
        backbone: Spec,
        items: Features | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        optimizer: Spec | None = None,
        scheduler: Spec | None = None,
        metrics: Sequence[str] = DEFAULT_METRICS,
    ) -> None:
        super().__init__()
        # Not to the logger: vocabularies may be large, and the composed config is logged already.
        self.save_hyperparameters(ignore=["items"], logger=False)
        self.user_schema = FeatureSchema.from_dict(user_schema)
        self.item_schema = FeatureSchema.from_dict(item_schema)
        self.item_ids = list(item_ids)
        head = dict(head or {})
        loss = head.pop("loss", "mse")
        check_arguments(_loss, {"loss": loss}, "head")
        self.loss = LOSSES[loss]
        self.optimizer_spec = optimizer or {"_target_": "torch.optim.Adam", "lr": 1e-4}
        self.scheduler_spec = scheduler

        self.user_tower = _tower(self.user_schema, tokenizer or {}, backbone, head)
        self.item_tower = _tower(self.item_schema, tokenizer or {}, backbone, head)
        catalogue = items or Features(
            torch.zeros(len(self.item_ids), len(self.item_schema.numeric)),
            torch.zeros(len(self.item_ids), len(self.item_schema.categorical), dtype=torch.long),
        )
        self.register_buffer("item_numeric", catalogue.numeric)
        self.register_buffer("item_categorical", catalogue.categorical)
        self.item_numeric: Tensor
        self.item_categorical: Tensor

        self.val_loss = MeanMetric()
        self.set_metrics(metrics)
        self.test_rankings = Rankings()
        self._item_embeddings: Tensor | None = None

    @classmethod
    def for_data(cls, data: TwoTowerData, **options: Any) -> Self:
        """A model for a dataset; ``options`` are the constructor's own (``backbone=…`` and so on).

        Raises:
            UserError: The dataset is not of users, items and their features.
        """
        splits = data.splits
        if not hasattr(splits, "user_schema"):
            raise UserError(
                f"head=two_tower needs users and items with features, and dataset {data.name} has sequences; "
                "leave head= to the dataset, or choose another dataset"
            )
        return cls(
            user_schema=splits.user_schema.to_dict(),
            item_schema=splits.item_schema.to_dict(),
            item_ids=splits.item_ids,
            items=splits.items,
            **options,
        )

    def set_metrics(self, metrics: Sequence[str]) -> None:
        """Which ranking metrics validation and test report."""
        self.val_metrics = RankingMetrics(metrics, n_items=len(self.item_ids))
        self.test_metrics = RankingMetrics(metrics, n_items=len(self.item_ids))

    @property
    def items(self) -> Features:
        """The catalogue, I rows."""
        return Features(self.item_numeric, self.item_categorical)

    def forward(self, user: Features, item: Features) -> Tensor:
        """Scores (B,) of B pairs."""
        return (self.user_tower(user) * self.item_tower(item)).sum(-1)

    # Training

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch.target.numel())
        return loss

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer_spec, self.scheduler_spec)

    def _loss(self, batch: PairBatch) -> Tensor:
        user, item = self.user_tower(batch.user), self.item_tower(batch.item)
        return self.loss(user, item, batch.target, batch.item_index)

    # Validation: pairs for the loss, then users for the ranking

    def on_validation_epoch_start(self) -> None:
        self._item_embeddings = self.item_tower.encode(self.items)

    def validation_step(
        self, batch: PairBatch | RankingBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self.val_loss.update(self._loss(batch), batch.target.numel())  # type: ignore[arg-type, union-attr]
        else:
            self._rank(batch, self.val_metrics)  # type: ignore[arg-type]

    def on_validation_epoch_end(self) -> None:
        self._item_embeddings = None
        values = {"loss": self.val_loss.compute(), **self.val_metrics.compute()}
        self.val_loss.reset()
        self.val_metrics.reset()
        self.log_dict({f"val/{name}": value.float() for name, value in values.items()})

    # Test

    def on_test_epoch_start(self) -> None:
        self.test_rankings.clear()
        self.test_metrics.reset()
        self._item_embeddings = self.item_tower.encode(self.items)

    def test_step(self, batch: RankingBatch, batch_idx: int) -> None:
        # As many as anyone of them likes: how often an item is recommended is held against how often it is liked.
        top_UK = self._rank(batch, self.test_metrics, int(batch.relevant.sum(dim=1).max()))
        self.test_rankings.add(batch.user_index, top_UK, batch.relevant)

    def on_test_epoch_end(self) -> None:
        """The values stay in ``test_metrics`` and ``test_rankings`` until the next test begins."""
        self._item_embeddings = None
        values = self.test_metrics.compute()
        self.log_dict({f"test/{name}": value.float() for name, value in values.items()})

    def _rank(self, batch: RankingBatch, metrics: RankingMetrics, k: int = 0) -> Tensor:
        """Add a batch to the metrics; its top ``k``, or as many as the metrics need."""
        assert self._item_embeddings is not None
        scores_UI = self.user_tower(batch.user) @ self._item_embeddings.T
        top_UK = rank_top_k(scores_UI, max(k, metrics.max_k), batch.seen)
        metrics.update_from_top(top_UK, batch.relevant)
        return top_UK

    # For the doors

    def fits(self, data: TwoTowerData) -> bool:
        """Whether a dataset has the columns, categories and items of the training."""
        splits = data.splits
        return splits.user_schema == self.user_schema and splits.item_ids == self.item_ids

    def test_results(self) -> dict[str, dict[str, float]]:
        """``metrics``, and ``metrics_all_users`` with zeros for users without a relevant item."""
        values = {name: float(value) for name, value in self.test_metrics.compute().items()}
        return {"metrics": values, "metrics_all_users": over_all_users(values)}

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of a tower's backbone, and of the whole."""
        return {
            "backbone_per_tower": sum(p.numel() for p in self.user_tower.backbone.parameters()),
            "total": sum(p.numel() for p in self.parameters()),
        }

    # Use

    @torch.no_grad()
    def predict(self, users: pl.DataFrame, items: pl.DataFrame | None = None) -> Tensor:
        """Scores of every user for every item.

        Args:
            users: One row a user, with the columns of ``user_schema``.
            items: One row an item, with the columns of ``item_schema``, new ones included; none: the catalogue.

        Returns:
            (U, I) float32 on the CPU.

        Raises:
            UserError: A column is absent or holds something that is no number where one belongs.
        """
        user_US = self._encode(self.user_tower, self.user_schema.encode(users, where="users"))
        if items is None:
            item_IS = self.item_embeddings()
        else:
            item_IS = self._encode(self.item_tower, self.item_schema.encode(items, where="items"))
        return (user_US @ item_IS.T).float().cpu()

    @torch.no_grad()
    def recommend(
        self,
        users: pl.DataFrame,
        k: int = 10,
        exclude: Tensor | None = None,
        *,
        item_embeddings: Tensor | None = None,
    ) -> pl.DataFrame:
        """The ``k`` best items of the catalogue for each user. Scores of all items are never held for all users.

        Args:
            users: One row a user, with the columns of ``user_schema``.
            k: How many.
            exclude: (U, I) bool, items not to recommend.
            item_embeddings: What :meth:`item_embeddings` gives, where many calls are to share it.

        Returns:
            Columns ``user`` (row number in ``users``), ``rank`` (from 1), ``item``, ``score``.

        Raises:
            UserError: As :meth:`predict`, or ``exclude`` has another shape.
        """
        user_US = self._encode(self.user_tower, self.user_schema.encode(users, where="users"))
        item_IS = self.item_embeddings() if item_embeddings is None else item_embeddings
        pairs = None
        if exclude is not None:
            if exclude.shape != (len(user_US), len(item_IS)):
                raise UserError(
                    f"exclude is {tuple(exclude.shape)}: expected {len(user_US)} users by {len(item_IS)} items"
                )
            user, item = exclude.to(self.device).nonzero(as_tuple=True)
            pairs = user, item
        return self.as_table(*self.best_items(user_US, item_IS, k, pairs))

    def item_embeddings(self) -> Tensor:
        """Of the catalogue, (I, S), on the model's device."""
        return self._encode(self.item_tower, self.items)

    def _encode(self, tower: Tower, features: Features) -> Tensor:
        """A table's embeddings, without dropout."""
        training = self.training
        self.eval()
        found = tower.encode(features.to(self.device))
        self.train(training)
        return found


def _tower(
    schema: FeatureSchema, tokenizer: Mapping[str, Any], backbone: Spec, head: Mapping[str, Any]
) -> Tower:
    mixer: Backbone = build(backbone, Backbone, "backbone")  # type: ignore[type-abstract]
    sizes = {
        "n_numeric": len(schema.numeric),
        "cardinalities": [field.n_codes for field in schema.categorical],
        "d_model": mixer.d_model,
    }
    tokenizer = {"d_model": mixer.d_model, **tokenizer}
    if tokenizer["d_model"] != mixer.d_model:
        raise UserError(
            f"tokenizer.d_model={tokenizer['d_model']}, backbone.d_model={mixer.d_model}: give both the same"
        )
    check_arguments(FeatureTokenizer, tokenizer, "tokenizer", given=sizes)
    check_arguments(TowerHead, head, "head", given=["d_model"])
    return Tower(
        FeatureTokenizer(**{**tokenizer, **sizes}), mixer, TowerHead(d_model=mixer.d_model, **head)
    )


def _loss(loss: LossName) -> None:
    """Signature a head's loss is checked against."""
