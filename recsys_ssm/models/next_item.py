"""The next-item LightningModule: a history through a backbone, its outputs against every item of the catalogue.

``items (B, L) → tokenizer → (B, L, D) → backbone → (B, L, D) → inner product with the items' own embeddings``
(SASRec, Kang and McAuley 2018; Mamba4Rec, Liu et al. 2024).

Legend: B rows, each of one or several histories; L positions, P of them with a next item; U users, I items,
D = d_model, K places.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.instantiate import Spec, build, check_arguments
from recsys_ssm.metrics import RankingMetrics
from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.models.heads import NextItemLoss
from recsys_ssm.models.optim import configure_optimizers
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.models.tokenizers import ItemTokenizer
from recsys_ssm.ops import rank_products
from recsys_ssm.recommendations import Rankings

if TYPE_CHECKING:
    from recsys_ssm.batches import HistoryBatch, SequenceBatch
    from recsys_ssm.data.sequences import SequenceData

DEFAULT_METRICS: tuple[str, ...] = (
    *(f"{family}@{k}" for family in ("hr", "ndcg", "mrr") for k in (1, 5, 10, 20)),
    "coverage@10",
    "popularity@10",
)


class NextItem(Recommender):
    """Item embeddings, a backbone, and how they are trained.

    Every argument but ``items`` and ``item_counts`` is plain data and is kept in the checkpoint, the catalogue's
    features and counts beside the weights: ``NextItem.load_from_checkpoint(path)`` needs neither Hydra nor the dataset.

    Args:
        item_ids: What the catalogue's items are called, in catalogue order (equal scores are ranked in it).
        max_length: Items of a history, the latest, that are seen.
        backbone: Spec of a :class:`Backbone`.
        objective: What the data's batches hold: ``all``, a target at every position, or ``last``, at the last of each
            prefix. A backbone that is not causal sees the targets of ``all`` and is refused.
        item_schema: :meth:`FeatureSchema.to_dict` of the items' features; none: ids alone.
        items: The catalogue's features, I rows.
        item_counts: (I,) training interactions of each item.
        tokenizer: Arguments of :class:`ItemTokenizer`.
        head: Arguments of :class:`NextItemLoss`, and three more. ``filter_seen``: whether validation leaves out what a
            user had already (the test always reports both). ``temperature``: None, the score is the inner product; a
            number, it is the cosine divided by it, so that no item scores high by its length alone. ``skip``: how
            likely a target of the training is passed over for the one after it (:func:`later_targets`).
        optimizer: Spec of a ``torch.optim`` optimizer.
        scheduler: Spec of a learning-rate scheduler, stepped each step; none: the rate stays.
        metrics: Ranking metrics of validation and test, as ``hr@10``.

    Raises:
        UserError: An option is unknown or of the wrong type, or the backbone would see what it is to predict.
    """

    def __init__(
        self,
        *,
        item_ids: Sequence[str],
        max_length: int,
        backbone: Spec,
        objective: str = "all",
        item_schema: Mapping[str, Any] | None = None,
        items: Features | None = None,
        item_counts: Tensor | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        optimizer: Spec | None = None,
        scheduler: Spec | None = None,
        metrics: Sequence[str] = DEFAULT_METRICS,
    ) -> None:
        super().__init__()
        # Not to the logger: a catalogue may be large, and the composed config is logged already.
        self.save_hyperparameters(ignore=["items", "item_counts"], logger=False)
        self.item_ids, self.max_length = list(item_ids), max_length
        n_items = len(self.item_ids)
        head = dict(head or {})
        own: dict[str, Any] = {
            name: head.pop(name) for name in ("filter_seen", "temperature", "skip") if name in head
        }
        check_arguments(_scoring, own, "head", given=None)
        self.filter_seen: bool = own.get("filter_seen", True)
        self.temperature: float | None = own.get("temperature")
        if self.temperature is not None and self.temperature <= 0:
            raise UserError(f"head.temperature={self.temperature}: give a number above 0, or null")
        self.skip: float = own.get("skip", 0.0)
        if not 0 <= self.skip < 1:
            raise UserError(f"head.skip={self.skip}: give a probability, from 0 to below 1")
        if self.skip and objective == "last":
            raise UserError(
                f"head.skip={self.skip}: with dataset.objective=last a sample has one target, and what follows is not "
                "there; give head.skip=0, or dataset.objective=all"
            )
        self.optimizer_spec = optimizer or {"_target_": "torch.optim.Adam", "lr": 1e-3}
        self.scheduler_spec = scheduler

        self.backbone: Backbone = build(backbone, Backbone, "backbone")  # type: ignore[type-abstract]
        if objective == "all" and not self.backbone.causal:
            raise UserError(
                f"backbone {type(self.backbone).__name__} sees the whole history, and with dataset.objective=all that "
                "is what it is to predict; give dataset.objective=last, or a causal backbone"
            )
        schema = None if item_schema is None else FeatureSchema.from_dict(item_schema)
        self.item_schema = schema
        sizes = {"n_items": n_items, "d_model": self.backbone.d_model, "schema": schema}
        check_arguments(ItemTokenizer, tokenizer or {}, "tokenizer", given=sizes)
        self.tokenizer = ItemTokenizer(**{**(tokenizer or {}), **sizes})
        counts = torch.zeros(n_items, dtype=torch.int64) if item_counts is None else item_counts
        given: dict[str, Any] = {"n_items": n_items, "item_counts": counts}
        check_arguments(NextItemLoss, head, "head", given=given)
        self.loss = NextItemLoss(**head, **given)
        self.register_buffer("item_counts", counts)
        self.item_counts: Tensor
        catalogue = items
        if catalogue is None:
            n_numeric, n_categorical = (
                (0, 0) if schema is None else (len(schema.numeric), len(schema.categorical))
            )
            catalogue = Features(
                torch.zeros(n_items, n_numeric),
                torch.zeros(n_items, n_categorical, dtype=torch.long),
            )
        self.register_buffer("item_numeric", catalogue.numeric)
        self.register_buffer("item_categorical", catalogue.categorical)
        self.item_numeric: Tensor
        self.item_categorical: Tensor

        self.val_loss = MeanMetric()
        self.set_metrics(metrics)
        self.test_rankings = Rankings()

    @classmethod
    def for_data(cls, data: SequenceData, **options: Any) -> Self:
        """A model for a dataset; ``options`` are the constructor's own (``backbone=…`` and so on).

        Raises:
            UserError: The dataset is not of sequences.
        """
        splits = data.splits
        if not hasattr(splits, "histories"):
            raise UserError(
                f"head=next_item needs a dataset of sequences, and dataset {data.name} has users and items with "
                "features; leave head= to the dataset, or choose another dataset"
            )
        return cls(
            item_ids=splits.item_ids,
            max_length=data.max_length,
            objective=data.objective,
            item_schema=None if splits.item_schema is None else splits.item_schema.to_dict(),
            items=splits.items,
            item_counts=splits.item_counts,
            **options,
        )

    def set_metrics(self, metrics: Sequence[str]) -> None:
        """Which ranking metrics validation and test report."""

        def made() -> RankingMetrics:
            return RankingMetrics(metrics, n_items=len(self.item_ids), item_counts=self.item_counts)

        self.val_metrics, self.test_metrics, self.test_metrics_unfiltered = made(), made(), made()

    @property
    def features(self) -> Features | None:
        """The catalogue's features, I rows."""
        if self.item_schema is None:
            return None
        return Features(self.item_numeric, self.item_categorical)

    def forward(
        self, item: Tensor, seq_idx: Tensor | None, position: Tensor, at: Tensor | None = None
    ) -> Tensor:
        """Outputs of histories: (B, L, D), or (P, D) at the places ``at`` of the flattened (B·L).

        The rest is as in :class:`~recsys_ssm.batches.SequenceBatch`.
        """
        return self.backbone(self.tokenizer(item, position, self.features), seq_idx, at)

    # Training

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        if self.skip:
            batch = batch._replace(target=later_targets(batch.target, batch.seq_idx, self.skip))
        loss, n_targets = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=n_targets)
        return loss

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer_spec, self.scheduler_spec)

    def _loss(self, batch: SequenceBatch) -> tuple[Tensor, int]:
        # Padding, and positions nothing follows, never reach the catalogue.
        where_P = (batch.target.flatten() >= 0).nonzero().squeeze(1)
        x_PD = self(batch.item, batch.seq_idx, batch.position, where_P)
        target_P = batch.target.flatten()[where_P]
        return self.loss(self._query(x_PD), self._items(), target_P), target_P.numel()

    def _query(self, x_PD: Tensor) -> Tensor:
        """What is multiplied with the items for their scores."""
        if self.temperature is None:
            return x_PD
        return F.normalize(x_PD, dim=-1) / self.temperature

    def _items(self) -> Tensor:
        """(I, D)."""
        items_ID = self.tokenizer.items(self.features)
        return items_ID if self.temperature is None else F.normalize(items_ID, dim=-1)

    # Validation: windows for the loss, then users for the ranking

    def validation_step(
        self, batch: SequenceBatch | HistoryBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self.val_loss.update(*self._loss(batch))  # type: ignore[arg-type]
            return
        k, seen_too = self.val_metrics.max_k, not self.filter_seen
        everything_UK, new_UK = self.top(batch, k, seen_too=seen_too)  # type: ignore[arg-type]
        self.val_metrics.update_from_top(
            new_UK if everything_UK is None else everything_UK, batch.target
        )

    def on_validation_epoch_end(self) -> None:
        values = {"loss": self.val_loss.compute(), **self.val_metrics.compute()}
        self.val_loss.reset()
        self.val_metrics.reset()
        self.log_dict({f"val/{name}": value.float() for name, value in values.items()})

    # Test

    def on_test_epoch_start(self) -> None:
        self.test_rankings.clear()
        self.test_metrics.reset()
        self.test_metrics_unfiltered.reset()

    def test_step(self, batch: HistoryBatch, batch_idx: int) -> None:
        everything_UK, top_UK = self.top(batch, self.test_metrics.max_k)
        assert everything_UK is not None
        self.test_metrics_unfiltered.update_from_top(everything_UK, batch.target)
        self.test_metrics.update_from_top(top_UK, batch.target)
        self.test_rankings.add(batch.user, top_UK, batch.target)

    def on_test_epoch_end(self) -> None:
        """The values stay in the metrics and ``test_rankings`` until the next test begins."""
        values = self.test_metrics.compute()
        self.log_dict({f"test/{name}": value.float() for name, value in values.items()})

    def top(
        self, batch: HistoryBatch, k: int, *, seen_too: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """The ``k`` best items of each user, (U, k) catalogue indices: of all, and of those new to him.

        The held-out item is ranked in both, should he have had it before. Without ``seen_too`` the first is None.
        """
        x_UD = self(batch.item, batch.seq_idx, batch.position, batch.last)
        user = torch.arange(batch.target.numel(), device=self.device)
        user = user.repeat_interleave(batch.seen.lengths)
        new = batch.seen.values != batch.target[user]
        seen = (user[new], batch.seen.values[new])
        return rank_products(self._query(x_UD), self._items(), k, seen, everything=seen_too)

    # For the doors

    def fits(self, data: SequenceData) -> bool:
        """Whether a dataset has the items, and what is known of them, of the training."""
        splits = data.splits
        return splits.item_schema == self.item_schema and splits.item_ids == self.item_ids

    def test_results(self) -> dict[str, dict[str, float]]:
        """``metrics``, of items new to the user; ``metrics_unfiltered``, where what he had may come again."""
        return {
            name: {key: float(value) for key, value in metric.compute().items()}
            for name, metric in (
                ("metrics", self.test_metrics),
                ("metrics_unfiltered", self.test_metrics_unfiltered),
            )
        }

    def parameter_counts(self) -> dict[str, int]:
        """All of them, and without the embeddings of items and positions, as the papers count."""
        tables = (self.tokenizer.embedding, self.tokenizer.position)
        total = sum(p.numel() for p in self.parameters())
        embeddings = sum(table.weight.numel() for table in tables if table is not None)
        return {"total": total, "without_embeddings": total - embeddings}

    @torch.no_grad()
    def latency(self, data: SequenceData, repeat: int = 20) -> dict[str, float]:
        """Median seconds a call takes to rank the catalogue, by the number of users in it: 1 and 256."""
        self.eval()
        found = {}
        users = next(iter(data.test_dataloader()))
        histories = [
            [self.item_ids[i] for i in users.seen.values[start:stop].tolist()]
            for start, stop in zip(users.seen.offsets[:-1], users.seen.offsets[1:], strict=True)
        ]
        for n_users in (1, 256):
            asked = (histories * (n_users // len(histories) + 1))[:n_users]
            times = []
            for _ in range(repeat):
                start_s = time.perf_counter()
                self._top(asked, 10, filter_seen=True)
                times.append(time.perf_counter() - start_s)
            found[f"users_{n_users}"] = sorted(times)[repeat // 2]
        return found

    # Use

    def recommend(
        self, histories: Sequence[Sequence[str]], k: int = 10, *, filter_seen: bool = True
    ) -> pl.DataFrame:
        """The ``k`` best items to follow each history.

        Args:
            histories: Item ids, the latest last; those the catalogue does not have are passed over.
            k: How many.
            filter_seen: Leave out the items of the history.

        Returns:
            Columns ``user`` (row number in ``histories``), ``rank`` (from 1), ``item``, ``score``.

        Raises:
            UserError: A history has no item of the catalogue.
        """
        training = self.training
        self.eval()
        top_UK, scores_UK = self._top(histories, k, filter_seen)
        self.train(training)
        return self.as_table(top_UK, scores_UK)

    @torch.no_grad()
    def _top(
        self, histories: Sequence[Sequence[str]], k: int, filter_seen: bool
    ) -> tuple[Tensor, Tensor]:
        """Catalogue indices, -1 where no item is left, and their scores: (U, k) each, on the CPU."""
        index = self._index()
        known = [[index[item] for item in history if item in index] for history in histories]
        if empty := [row for row, history in enumerate(known) if not history]:
            raise UserError(
                f"history {empty[0]} has no item of the catalogue: there is nothing to go on"
            )
        latest = [torch.tensor(history[-self.max_length :]) for history in known]
        lengths_U = torch.tensor([history.numel() for history in latest])
        item_UL = torch.nn.utils.rnn.pad_sequence(latest, batch_first=True, padding_value=-1)
        position_UL = torch.arange(item_UL.shape[1]).expand_as(item_UL)
        seq_idx_UL = torch.where(item_UL >= 0, 0, -1)
        position_UL = position_UL.where(item_UL >= 0, 0)
        last_U = torch.arange(len(latest)) * item_UL.shape[1] + lengths_U - 1
        x_UD = self(*(x.to(self.device) for x in (item_UL, seq_idx_UL, position_UL, last_U)))
        query_UD, items_ID = self._query(x_UD), self._items()
        seen = None
        if filter_seen:
            user = torch.arange(len(known)).repeat_interleave(torch.tensor([*map(len, known)]))
            item = torch.tensor([*itertools.chain.from_iterable(known)])
            seen = (user.to(self.device), item.to(self.device))
        return self.best_items(query_UD, items_ID, k, seen)

    def _index(self) -> dict[str, int]:
        if not hasattr(self, "_index_of"):
            self._index_of = {item: i for i, item in enumerate(self.item_ids)}
        return self._index_of


def later_targets(target: Tensor, seq_idx: Tensor, skip: float) -> Tensor:
    """Targets some of which lie further ahead: what a user does after the next event is worth predicting as well.

    A position's target is passed over for the following one with probability ``skip``, that again with the same
    probability, and so on; a sequence's last target is passed over for none. Where histories are short and what
    comes next is a matter of chance, the model learns more of an item's surroundings, and less of the order in them
    (the idea of PinnerFormer's "all action" losses, Pancha et al. 2022, arXiv 2205.04507, drawn anew in each epoch).

    Args:
        target: (B, L) int64, -1 where nothing is predicted.
        seq_idx: (B, L), as in :class:`~recsys_ssm.batches.SequenceBatch`.
        skip: From 0 to below 1.

    Returns:
        (B, L) int64, -1 where ``target`` is.
    """
    if not skip:
        return target
    B, L = target.shape
    here_L = torch.arange(L, device=target.device)
    has_one = target >= 0
    goes_on = (seq_idx[:, 1:] == seq_idx[:, :-1]) & has_one[:, 1:] & has_one[:, :-1]
    last = F.pad(~goes_on, (0, 1), value=True)
    end_BL = torch.where(last, here_L, L - 1).flip(1).cummin(1).values.flip(1)
    ahead_BL = target.new_empty(B, L).geometric_(1 - skip) - 1
    return target.gather(1, torch.minimum(here_L + ahead_BL, end_BL))


def _scoring(filter_seen: bool, temperature: float | None, skip: float) -> None:
    """Signature the head's options beside the loss's are checked against."""
