"""Train two towers, one for users and one for items, whose embeddings are compared by inner product.

``features (B, F) → tokenizer → (B, F+1, D) → backbone → (B, F+1, D) → last token → MLP → (B, S)``, once for each side;
the score of a pair is the inner product (FT-Mamba, section II.C).

Legend: B pairs, U users, I items, D = d_model, S = size of the embedding that is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from recsys_ssm.batches import Ragged, TopItems
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema, as_frame
from recsys_ssm.instantiate import Part, build, find, takes, to_spec
from recsys_ssm.metrics import DEFAULT_METRICS, RankingMetrics, over_all_users, rank_top_k
from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.models.heads import TowerHead
from recsys_ssm.models.losses import MeanSquaredError, PairLoss
from recsys_ssm.models.optim import configure_optimizers
from recsys_ssm.models.recommender import Recommender, RowName, category_rows
from recsys_ssm.models.tokenizers import FeatureTokenizer, TableTokenizer
from recsys_ssm.recommendations import Rankings

if TYPE_CHECKING:
    from recsys_ssm.batches import PairBatch, RankingBatch, UserBatch
    from recsys_ssm.data.two_tower import TwoTowerData

ENCODE_ROWS = 4096
"""Rows encoded at once when a whole table is: bounds memory, costs no speed."""


class Tower(nn.Module):
    """Map one side's features (B, F) to an embedding (B, S)."""

    def __init__(self, tokenizer: TableTokenizer, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.tokenizer, self.backbone, self.head = tokenizer, backbone, head

    def forward(self, features: Features) -> Tensor:
        tokens_BLD = self.tokenizer(features)
        if self.tokenizer.across_rows:
            tokens_BLD = self.backbone(tokens_BLD.transpose(0, 1)).transpose(0, 1)
        else:
            tokens_BLD = self.backbone(tokens_BLD)
        pooling = self.tokenizer.pooling or self.backbone.pooling
        return self.head(tokens_BLD[:, -1] if pooling == "last" else tokens_BLD.mean(1))

    @torch.no_grad()
    def encode(self, features: Features) -> Tensor:
        """Return the embeddings of a whole table, computed in blocks."""
        blocks = [
            self(features.rows(slice(start, start + ENCODE_ROWS)))
            for start in range(0, max(features.n_rows, 1), ENCODE_ROWS)  # no row: one empty block
        ]
        return torch.cat(blocks)


class TwoTower(Recommender):
    """Rank items for users by the inner product of two towers' embeddings (FT-Mamba, section II.C).

    Every argument but ``items`` is plain data and is kept in the checkpoint, the catalogue's features beside the
    weights: ``TwoTower.load_from_checkpoint(path)`` needs neither Hydra nor the dataset.

    A part (backbone, tokenizer, head, loss) may be given as an object, a class, a ``functools.partial`` or a spec. An
    object is a template: each tower is built anew from its arguments, not from its weights.

    Args:
        user_schema, item_schema: :meth:`FeatureSchema.to_dict` of each side.
        item_ids: Names of the catalogue's items, in catalogue order (equal scores are ranked in it).
        items: The catalogue's features, I rows. None: a checkpoint has to fill them before any use.
        item_counts: (I,) positive training pairs of each item, for the metric ``popularity``. A trainer with a
            DataModule fills them in.
        backbone: A :class:`Backbone`.
        tokenizer: A :class:`TableTokenizer`; None: :class:`FeatureTokenizer`.
        head: Module built with ``d_model``; None: :class:`TowerHead`.
        loss: A :class:`PairLoss`; None: :class:`MeanSquaredError`.
        relevant_above: A pair with a target above this is relevant, for losses that tell relevant pairs from others.
        optimizer: Spec of a ``torch.optim`` optimizer; None: Adam with lr 1e-4.
        scheduler: Spec of a learning-rate scheduler, stepped each step; None: the rate stays.
        metrics: Ranking metrics of validation and test, as ``hr@10``.

    Raises:
        UserError: An option is unknown or of the wrong type.

    Example:
        >>> import polars as pl
        >>> from recsys_ssm import Mamba, TableData, TwoTower
        >>> sales = pl.DataFrame({"user_id": [u for u in range(40) for _ in range(4)],
        ...                       "item_id": [(u + i) % 9 for u in range(40) for i in range(4)]})
        >>> data = TableData(interactions=sales)
        >>> model = TwoTower.for_data(data, backbone=Mamba(d_model=16, n_layers=1))
        >>> model.parameter_counts()["backbone_per_tower"] > 0
        True
    """

    def __init__(
        self,
        *,
        user_schema: Mapping[str, Any],
        item_schema: Mapping[str, Any],
        item_ids: Sequence[str],
        backbone: Part,
        items: Features | None = None,
        item_counts: Tensor | None = None,
        tokenizer: Part | None = None,
        head: Part | None = None,
        loss: Part | None = None,
        relevant_above: float = 0.0,
        optimizer: Part | None = None,
        scheduler: Part | None = None,
        metrics: Sequence[str] = DEFAULT_METRICS,
    ) -> None:
        super().__init__()
        backbone = to_spec(backbone, "backbone")
        tokenizer = to_spec(tokenizer, "tokenizer", FeatureTokenizer)
        head = to_spec(head, "head", TowerHead)
        loss = to_spec(loss, "loss", MeanSquaredError)
        optimizer = to_spec(optimizer or {"lr": 1e-4}, "optimizer", torch.optim.Adam)
        scheduler = None if scheduler is None else to_spec(scheduler, "scheduler")
        # Not to the logger: vocabularies may be large, and the composed config is logged already.
        self.save_hyperparameters(ignore=["items", "item_counts"], logger=False)
        self.user_schema = FeatureSchema.from_dict(user_schema)
        self.item_schema = FeatureSchema.from_dict(item_schema)
        self.item_ids = list(item_ids)
        if loss.get("relevant_above", 0) is None:
            del loss["relevant_above"]
        given = {}
        kind = find(loss["_target_"], "loss", PairLoss)
        if "relevant_above" not in loss and takes(kind, "relevant_above"):
            given["relevant_above"] = relevant_above
        self.loss: PairLoss = build(loss, PairLoss, "loss", **given)  # type: ignore[type-abstract]
        self.optimizer_spec, self.scheduler_spec = optimizer, scheduler

        self.user_tower = _tower(self.user_schema, tokenizer, backbone, head)
        self.item_tower = _tower(self.item_schema, tokenizer, backbone, head)
        self.set_items(items, self.item_schema)
        self.item_numeric: Tensor
        self.item_categorical: Tensor
        counts = torch.zeros(len(self.item_ids), dtype=torch.int64)
        counts = counts if item_counts is None else item_counts
        self.register_buffer("item_counts", counts, persistent=False)
        self.item_counts: Tensor
        self.loss.set_item_counts(counts)

        self.val_loss = MeanMetric()
        self.set_metrics(metrics)
        self.test_rankings = Rankings()
        self._item_embeddings: Tensor | None = None

    @classmethod
    def arguments_from(cls, data: TwoTowerData) -> dict[str, Any]:
        """Return the constructor's arguments that come from a dataset.

        Raises:
            UserError: The dataset has no users and items with features.
        """
        splits = data.splits
        if not hasattr(splits, "user_schema"):
            raise UserError(
                f"task=two_tower needs users and items with features, and dataset {data.name} has histories; "
                "leave task= to the dataset, or choose another dataset"
            )
        return {
            "user_schema": splits.user_schema.to_dict(quantiles=True),
            "item_schema": splits.item_schema.to_dict(quantiles=True),
            "item_ids": splits.item_ids,
            "items": splits.items,
            "relevant_above": splits.relevant_above,
        }

    def set_metrics(self, metrics: Sequence[str]) -> None:
        """Set the ranking metrics that validation and test report."""

        def made() -> RankingMetrics:
            return RankingMetrics(metrics, n_items=len(self.item_ids), item_counts=self.item_counts)

        self.val_metrics, self.test_metrics = made(), made()

    @property
    def items(self) -> Features:
        """Features of the catalogue, I rows."""
        self.check_items()
        return Features(self.item_numeric, self.item_categorical)

    def forward(self, user: Features, item: Features) -> Tensor:
        """Return the scores (B,) of B pairs."""
        return (self.user_tower(user) * self.item_tower(item)).sum(-1)

    # Training

    def setup(self, stage: str) -> None:
        """Take the items' popularity from the trainer's dataset; a checkpoint does not have it."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "item_counts"):
            self.item_counts = data.item_counts().to(self.device)
            self.loss.set_item_counts(self.item_counts)
            for metrics in (self.val_metrics, self.test_metrics):
                metrics.set_item_counts(self.item_counts)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch.target.numel())
        return loss

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer_spec, self.scheduler_spec)

    def _loss(self, batch: PairBatch) -> Tensor:
        items, index = batch.item, batch.item_index
        if self.training and self.loss.negatives:
            drawn = torch.randint(len(self.item_ids), (self.loss.negatives,), device=index.device)
            more = self.items.rows(drawn)
            items = Features(
                torch.cat([items.numeric, more.numeric]),
                torch.cat([items.categorical, more.categorical]),
            )
            index = torch.cat([index, drawn])
        return self.loss(self.user_tower(batch.user), self.item_tower(items), batch.target, index)

    # Validation: pairs for the loss, then users for the ranking

    def on_validation_epoch_start(self) -> None:
        self._item_embeddings = self.item_tower.encode(self.items)

    def validation_step(
        self, batch: PairBatch | RankingBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self.val_loss.update(self._loss(batch), batch.target.numel())  # type: ignore[arg-type, union-attr]
        elif batch.user_index.numel():
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
        if not batch.user_index.numel():  # this process has none of the users
            return
        # As many as a user likes: reports compare how often an item is recommended and how often it is liked.
        places_U = batch.relevant.sum(dim=1).clamp(min=self.test_metrics.max_k)
        top_UK = self._rank(batch, self.test_metrics, int(places_U.max()))
        beyond_UK = torch.arange(top_UK.shape[1], device=top_UK.device) >= places_U.unsqueeze(1)
        self.test_rankings.add(batch.user_index, top_UK.masked_fill(beyond_UK, -1), batch.relevant)

    def on_test_epoch_end(self) -> None:
        """Log the metrics; ``test_metrics`` and ``test_rankings`` stay until the next test begins."""
        self._item_embeddings = None
        values = self.test_metrics.compute()
        self.log_dict({f"test/{name}": value.float() for name, value in values.items()})

    def _rank(self, batch: RankingBatch, metrics: RankingMetrics, k: int = 0) -> Tensor:
        """Add a batch to the metrics; return its top ``k``, or as many as the metrics need."""
        assert self._item_embeddings is not None
        scores_UI = self.user_tower(batch.user) @ self._item_embeddings.T
        top_UK = rank_top_k(scores_UI, max(k, metrics.max_k), batch.seen)
        metrics.update_from_top(top_UK, batch.relevant)
        return top_UK

    # Predictions

    def on_predict_start(self) -> None:
        """Compute the catalogue's embeddings once."""
        self._item_embeddings = self.item_tower.encode(self.items)

    def predict_step(
        self, batch: UserBatch | RankingBatch, batch_idx: int = 0, dataloader_idx: int = 0
    ) -> TopItems:
        """Return the best items for each user, as :attr:`selection` says."""
        items_IS = (
            self.item_embeddings() if self._item_embeddings is None else self._item_embeddings
        )
        seen = None if self.selection.filter_seen is False else batch.seen
        if isinstance(seen, Tensor):
            seen = Ragged.from_mask(seen.cpu())
        return self.select(batch.user_index, self.user_tower(batch.user), items_IS, seen)

    def on_predict_end(self) -> None:
        self._item_embeddings = None

    def pairs_of(self, batch: UserBatch, owner: Tensor, item: Tensor) -> Tensor:
        """Return the scores (n,) of items for users of a batch.

        Args:
            batch: U users.
            owner: (n,) numbers of users in the batch.
            item: (n,) catalogue indices.
        """
        items_IS = (
            self.item_embeddings() if self._item_embeddings is None else self._item_embeddings
        )
        return self.pair_scores(self._encode(self.user_tower, batch.user), items_IS, owner, item)

    # For the commands

    def fits(self, data: TwoTowerData) -> bool:
        """Return True if a dataset has the columns, categories and items of the training."""
        splits = data.splits
        return splits.user_schema == self.user_schema and splits.item_ids == self.item_ids

    def test_results(self) -> dict[str, dict[str, float]]:
        """Return ``metrics``, and ``metrics_all_users`` with zeros for users without a relevant item."""
        values = {name: float(value) for name, value in self.test_metrics.compute().items()}
        return {"metrics": values, "metrics_all_users": over_all_users(values)}

    def row_names(self) -> dict[str, list[RowName]]:
        """Return the names of the rows of both towers' categories, where the tokenizer has a row for each."""
        sides = {"user": self.user_schema, "item": self.item_schema}
        return {
            f"{side}_tower.tokenizer.embedding": category_rows(schema)
            for side, schema in sides.items()
            if hasattr(getattr(self, f"{side}_tower").tokenizer, "embedding")
        }

    def parameter_counts(self) -> dict[str, int]:
        """Count the parameters of a tower's backbone, and of the whole model."""
        return {
            "backbone_per_tower": sum(p.numel() for p in self.user_tower.backbone.parameters()),
            "total": sum(p.numel() for p in self.parameters()),
        }

    # Use

    def predict(self, users: Any, items: Any = None) -> Tensor:
        """Return the scores of every user for every item.

        Args:
            users: Polars or pandas data frame, one row a user, with the columns of ``user_schema``.
            items: The same for items, with the columns of ``item_schema``, new items included. None: the catalogue.

        Returns:
            (U, I) float32 on the CPU.

        Raises:
            UserError: A column is missing, or a numeric column holds a value that is not a number.
        """
        user_US = self._encode(
            self.user_tower, self.user_schema.encode(as_frame(users, "users"), where="users")
        )
        if items is None:
            item_IS = self.item_embeddings()
        else:
            item_IS = self._encode(
                self.item_tower, self.item_schema.encode(as_frame(items, "items"), where="items")
            )
        return (user_US @ item_IS.T).float().cpu()

    def recommend(
        self,
        users: Any,
        k: int = 10,
        exclude: Tensor | None = None,
        *,
        item_embeddings: Tensor | None = None,
    ) -> pl.DataFrame:
        """Return the ``k`` best items of the catalogue for each user. Scores are computed in blocks of items.

        Args:
            users: Polars or pandas data frame, one row a user, with the columns of ``user_schema``.
            k: Number of items.
            exclude: (U, I) bool, items not to recommend.
            item_embeddings: Result of :meth:`item_embeddings`, to share it between calls.

        Returns:
            Columns ``user`` (row number in ``users``), ``rank`` (from 1), ``item``, ``score``.

        Raises:
            UserError: As :meth:`predict`, or ``exclude`` has another shape.
        """
        user_US = self._encode(
            self.user_tower, self.user_schema.encode(as_frame(users, "users"), where="users")
        )
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

    def score(self, users: Any, items: Any) -> pl.DataFrame:
        """Return the score of each user for one item: row n of ``users`` and row n of ``items``.

        Args:
            users: Polars or pandas data frame with the columns of ``user_schema``.
            items: Item ids of the catalogue; or a data frame with the columns of ``item_schema``, new items included.

        Returns:
            Column ``score``, a row for each pair; null if an item id is not in the catalogue.

        Raises:
            UserError: As :meth:`predict`, or there are not as many users as items.
        """
        user_BS = self._encode(
            self.user_tower, self.user_schema.encode(as_frame(users, "users"), where="users")
        )
        if isinstance(items, Sequence | pl.Series):
            at = self.index_of(pl.Series(items, dtype=pl.String))
            item_IS = self.item_embeddings()
        else:
            frame = as_frame(items, "items")
            item_IS = self._encode(self.item_tower, self.item_schema.encode(frame, where="items"))
            at = torch.arange(len(item_IS))
        if len(at) != len(user_BS):
            raise UserError(f"{len(user_BS)} users and {len(at)} items; pass an item for each user")
        known = (at >= 0).nonzero().squeeze(1)
        scores = torch.full((len(at),), torch.nan)
        scores[known] = self.pair_scores(user_BS, item_IS, known, at[known])
        return pl.DataFrame({"score": pl.Series(scores.numpy()).fill_nan(None)})

    def similar(self, items: Any, k: int = 10) -> pl.DataFrame:
        """Return the items of the catalogue whose embeddings have the largest cosines with those of given items.

        Args:
            items: Item ids of the catalogue; or a data frame with the columns of ``item_schema``, for new items.
            k: Number of items.

        Returns:
            Columns ``item`` (the given one; the row number of a data frame), ``rank`` (from 1), ``similar``, ``score``.

        Raises:
            UserError: An item is not in the catalogue, or as :meth:`predict`.
        """
        catalogue = self.item_embeddings()
        if isinstance(items, Sequence | pl.Series):
            return self.similar_table(pl.Series(items, dtype=pl.String), catalogue, k)
        frame = as_frame(items, "items")
        vectors = self._encode(self.item_tower, self.item_schema.encode(frame, where="items"))
        found = self.neighbours(vectors, catalogue, k, None)
        table = self.as_table(found.item, found.score)
        return table.rename({"item": "similar", "user": "item"})

    def item_embeddings(self) -> Tensor:
        """Return the embeddings (I, S) of the catalogue, on the model's device."""
        return self._encode(self.item_tower, self.items)

    def _encode(self, tower: Tower, features: Features) -> Tensor:
        """Return a table's embeddings, without dropout."""
        with self.inference():
            return tower.encode(features.to(self.device))


def _tower(schema: FeatureSchema, tokenizer: Part, backbone: Part, head: Part) -> Tower:
    mixer: Backbone = build(to_spec(backbone, "backbone"), Backbone, "backbone")  # type: ignore[type-abstract]
    spec = to_spec(tokenizer, "tokenizer")
    if spec.get("d_model", mixer.d_model) != mixer.d_model:
        raise UserError(
            f"tokenizer.d_model={spec['d_model']}, backbone.d_model={mixer.d_model}: give both the same"
        )
    tokens: TableTokenizer = build(
        spec,
        TableTokenizer,  # type: ignore[type-abstract]
        "tokenizer",
        schema=schema,
        d_model=mixer.d_model,
    )
    return Tower(
        tokens, mixer, build(to_spec(head, "head"), nn.Module, "head", d_model=mixer.d_model)
    )
