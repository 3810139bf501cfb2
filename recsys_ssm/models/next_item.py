"""Train a model that ranks every item of the catalogue as the next one of a history.

``items (B, L) → tokenizer → (B, L, D) → backbone → (B, L, D) → inner product with the items' own embeddings``
(SASRec, Kang and McAuley 2018; Mamba4Rec, Liu et al. 2024).

Legend: B rows, each of one or several histories; L positions, P of them with a next item; U users, I items,
D = d_model, K places.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from recsys_ssm.batches import MASK, NO_ITEM, START, EventTimes, TopItems
from recsys_ssm.data.sequences import COMMON_REPEATS
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema, as_frame, numeric_column
from recsys_ssm.instantiate import Configurable, Part, build, defaults_of, to_spec
from recsys_ssm.models.backbones.base import Backbone, Clock, gaps_before
from recsys_ssm.models.heads import NextItemHead
from recsys_ssm.models.histories import DEFAULT_METRICS, HistoryRecommender, item_text
from recsys_ssm.models.losses import NextItemLoss
from recsys_ssm.models.optim import configure_optimizers, parameter_groups, weight_decay
from recsys_ssm.models.recommender import RowName, category_rows
from recsys_ssm.models.tokenizers import FeatureTokenizer, HistoryTokenizer, ItemTokenizer
from recsys_ssm.ops import rank_products
from recsys_ssm.recommendations import Rankings
from recsys_ssm.text.embed import title_vectors

if TYPE_CHECKING:
    from recsys_ssm.batches import HistoryBatch, SequenceBatch
    from recsys_ssm.data.sequences import SequenceData


class NextItem(HistoryRecommender):
    """Rank the catalogue as the next item of a history: item embeddings, a backbone, inner products.

    Every argument but ``items`` and ``item_counts`` is plain data and is kept in the checkpoint, the catalogue's
    features and counts beside the weights: ``NextItem.load_from_checkpoint(path)`` needs neither Hydra nor the dataset.

    A part (backbone, tokenizer, head, loss) may be given as an object, a class, a ``functools.partial`` or a spec. A
    backbone object is used as it is, with its weights; other objects are built anew from their arguments.

    Args:
        item_ids: Names of the catalogue's items, in catalogue order (equal scores are ranked in it).
        max_length: Number of latest items of a history that the model sees.
        backbone: A :class:`Backbone`.
        objective: Positions that have a target: ``all``, or ``last``, the last position of each prefix, or ``masked``,
            items that are hidden at random (:func:`mask_items`). ``all`` needs a causal backbone; others would see the
            targets. ``masked`` needs one that is not causal; others would not see what follows a hidden item.
        start_token: A token stands before the first item of a history, as in the dataset.
        typical_gap: Median seconds between a user's events, where the dataset gives times; None: it does not.
        event_columns: Values of each column of the events that the dataset gives, in the order of their codes.
        query_time: Show the model the time of the next event, or the time that recommendations are asked for. Such a
            model answers another question, and ``metrics.json`` says so.
        mask_share: Share of the items to hide with ``objective="masked"``; BERT4Rec's is .2 for long histories, up to
            .6 for short ones.
        item_schema: :meth:`FeatureSchema.to_dict` of the items' features; None: ids alone.
        items: The catalogue's features, I rows. None: a checkpoint has to fill them before any use.
        item_vectors: (I, E) vectors of the items' titles, for a tokenizer with the option ``text``; None: there are
            none, or a checkpoint fills them.
        item_vector_size: E, which a checkpoint passes.
        item_counts: (I,) training interactions of each item.
        tokenizer: A :class:`HistoryTokenizer`; None: :class:`ItemTokenizer`.
        head: A :class:`NextItemHead`; None: inner products.
        loss: A :class:`NextItemLoss`; None: the softmax over all items.
        filter_seen: Leave out items that a user had already, in validation, test and :meth:`recommend`: a target that
            was seen before is then a miss. The test also reports the other choice. None: True, unless the dataset says
            that users often repeat items.
        skip: Probability of replacing a training target by the following item (:func:`later_targets`).
        decay: Parameters that the optimizer's weight decay applies to: ``matrices``, or the ``table`` of the items'
            embeddings alone.
        optimizer: Spec of a ``torch.optim`` optimizer; None: Adam with lr 1e-3.
        scheduler: Spec of a learning-rate scheduler, stepped each step; None: the rate stays.
        metrics: Ranking metrics of validation and test, as ``hr@10``.

    Raises:
        UserError: An option is unknown or of the wrong type, or the backbone would see its targets.

    Example:
        >>> import polars as pl
        >>> from recsys_ssm import Interactions, Mamba, NextItem
        >>> clicks = pl.DataFrame({"user_id": [u for u in range(30) for _ in range(5)],
        ...                        "item_id": [(u + i) % 12 for u in range(30) for i in range(5)],
        ...                        "timestamp": [i for _ in range(30) for i in range(5)]})
        >>> data = Interactions(interactions=clicks)
        >>> model = NextItem.for_data(data, backbone=Mamba(d_model=16, n_layers=1))
        >>> model.recommend([["3", "4"]], k=2)["rank"].to_list()
        [1, 2]
    """

    def __init__(
        self,
        *,
        item_ids: Sequence[str],
        max_length: int,
        backbone: Part,
        objective: str = "all",
        start_token: bool = False,
        typical_gap: float | None = None,
        event_columns: Mapping[str, Sequence[str]] | None = None,
        query_time: bool = False,
        mask_share: float = 0.2,
        item_schema: Mapping[str, Any] | None = None,
        items: Features | None = None,
        item_vectors: Tensor | None = None,
        item_vector_size: int | None = None,
        item_counts: Tensor | None = None,
        tokenizer: Part | None = None,
        head: Part | None = None,
        loss: Part | None = None,
        filter_seen: bool | None = None,
        skip: float = 0.0,
        decay: Literal["matrices", "table"] = "matrices",
        optimizer: Part | None = None,
        scheduler: Part | None = None,
        metrics: Sequence[str] = DEFAULT_METRICS,
    ) -> None:
        super().__init__()
        trained = backbone if isinstance(backbone, Configurable) else None
        backbone = to_spec(backbone, "backbone")
        tokenizer = to_spec(tokenizer, "tokenizer", ItemTokenizer)
        head = to_spec(head, "head", NextItemHead)
        loss = to_spec(loss, "loss", NextItemLoss)
        optimizer = to_spec(optimizer or {"lr": 1e-3}, "optimizer", torch.optim.Adam)
        scheduler = None if scheduler is None else to_spec(scheduler, "scheduler")
        if item_vectors is not None:
            item_vector_size = item_vectors.shape[1]
        elif item_vector_size is not None:
            item_vectors = torch.zeros(len(item_ids), item_vector_size)
        # Not to the logger: a catalogue may be large, and the composed config is logged already.
        self.save_hyperparameters(
            ignore=["items", "item_vectors", "item_counts", "trained"], logger=False
        )
        self.item_ids, self.max_length = list(item_ids), max_length
        n_items = len(self.item_ids)
        self.filter_seen = True if filter_seen is None else filter_seen
        self.skip = skip
        if not 0 <= skip < 1:
            raise UserError(f"model.skip={skip}: give a probability, from 0 to below 1")
        if skip and objective != "all":
            raise UserError(
                f"model.skip={skip}: with dataset.objective={objective} a target is not the next item of its position; "
                "give model.skip=0, or dataset.objective=all"
            )
        if decay not in ("matrices", "table"):
            raise UserError(f"model.decay={decay}: expected matrices or table")
        self.decay = decay
        if not 0 < mask_share < 1:
            raise UserError(f"model.mask_share={mask_share}: give a share between 0 and 1")
        self.objective, self.mask_share, self.start_token = objective, mask_share, start_token
        masked = objective == "masked"
        self.optimizer_spec, self.scheduler_spec = optimizer, scheduler

        self.backbone: Backbone = (
            trained if isinstance(trained, Backbone) else build(backbone, Backbone, "backbone")  # type: ignore[type-abstract]
        )
        if objective == "all" and not self.backbone.causal:
            raise UserError(
                f"backbone {type(self.backbone).__name__} sees the whole history, and with dataset.objective=all the "
                "history contains its targets; give dataset.objective=last or masked, or a causal backbone"
            )
        if masked and self.backbone.causal:
            raise UserError(
                f"backbone {type(self.backbone).__name__} is causal and does not see what follows a masked item; give "
                "dataset.objective=all or last, or a backbone that sees the whole history"
            )
        self.typical_gap, self.query_time = typical_gap, query_time
        self.event_columns = {name: list(values) for name, values in (event_columns or {}).items()}
        if typical_gap is not None and masked:
            raise UserError(
                "dataset.times=true: with dataset.objective=masked a hidden item shows when it happened; give "
                "dataset.objective=all or last"
            )
        schema = None if item_schema is None else FeatureSchema.from_dict(item_schema)
        self.item_schema = schema
        self.tokenizer: HistoryTokenizer = build(
            tokenizer,
            HistoryTokenizer,  # type: ignore[type-abstract]
            "tokenizer",
            n_items=n_items,
            d_model=self.backbone.d_model,
            schema=schema,
            max_length=max_length,
            **({"mask": True} if masked else {}),
            **({} if item_vectors is None else {"vectors": item_vectors}),
            **({"query_time": True} if query_time else {}),
            **self._column_sizes(),
        )
        self._check_times()
        self.head: NextItemHead = build(head, NextItemHead, "head")
        counts = torch.zeros(n_items, dtype=torch.int64) if item_counts is None else item_counts
        self.loss: NextItemLoss = build(
            loss, NextItemLoss, "loss", n_items=n_items, item_counts=counts
        )
        self.register_buffer("item_counts", counts)
        self.set_items(items, schema)
        self.item_numeric: Tensor
        self.item_categorical: Tensor

        self.val_loss = MeanMetric()
        self.set_metrics(metrics)
        self.test_rankings = Rankings()
        self._catalogue: Tensor | None = None

    @classmethod
    def arguments_from(cls, data: SequenceData) -> dict[str, Any]:
        """Return the constructor's arguments that come from a dataset.

        Raises:
            UserError: The dataset has no histories.
        """
        splits = data.splits
        if not hasattr(splits, "histories"):
            raise UserError(
                f"task=next_item needs a dataset of histories, and dataset {data.name} has users and items with "
                "features; leave task= to the dataset, or choose another dataset"
            )
        return {
            "item_ids": splits.item_ids,
            "max_length": data.max_length,
            "objective": data.objective,
            "start_token": getattr(data, "start_token", False),
            "typical_gap": getattr(splits, "typical_gap", None),
            "event_columns": getattr(splits, "event_columns", None) or None,
            "item_schema": None if splits.item_schema is None else splits.item_schema.to_dict(),
            "items": splits.items,
            "item_counts": splits.item_counts,
            "filter_seen": splits.repeat_share < COMMON_REPEATS,
        }

    @classmethod
    def arguments_for(cls, data: SequenceData, **options: Any) -> dict[str, Any]:
        """Return :meth:`arguments_from`, and the vectors of the items' titles where the tokenizer has ``text``.

        Raises:
            UserError: The dataset has no histories, or no titles, or the encoder cannot be used.
        """
        arguments = cls.arguments_from(data)
        tokenizer = to_spec(options.get("tokenizer"), "tokenizer", ItemTokenizer)
        if (source := tokenizer.get("text")) is not None:
            arguments["item_vectors"] = title_vectors(
                data.item_titles(),
                str(source),
                revision=tokenizer.get("text_revision"),
                size=tokenizer.get("text_size", defaults_of(ItemTokenizer)["text_size"]),
            )
        return arguments

    @property
    def features(self) -> Features | None:
        """Features of the catalogue, I rows; None if items have none."""
        if self.item_schema is None:
            return None
        self.check_items()
        return Features(self.item_numeric, self.item_categorical)

    def _column_sizes(self) -> dict[str, Any]:
        """Return the argument of tokenizers for the columns of events; empty without columns."""
        sizes = [len(values) + 1 for values in self.event_columns.values()]
        return {"column_sizes": sizes} if sizes else {}

    def _check_times(self) -> None:
        """Check that the dataset gives the times that parts of the model use.

        Raises:
            UserError: It gives none, or no part uses the time of the next event.
        """
        users = [
            option
            for option, part in (
                ("tokenizer.gap_buckets", self.tokenizer),
                (f"backbone={type(self.backbone).__name__}", self.backbone),
            )
            if part.uses_times
        ]
        if users and self.typical_gap is None:
            raise UserError(f"{users[0]} uses the times of events; give dataset.times=true")
        if self.query_time and not users:
            raise UserError(
                "model.query_time=true: no part of the model uses times; give tokenizer.gap_buckets, or a backbone "
                "with time_bias=true"
            )

    @property
    def sees_query_time(self) -> bool:
        """True if the model sees the time of the next event, or that at which recommendations are asked for."""
        return self.query_time

    def forward(
        self,
        item: Tensor,
        seq_idx: Tensor | None,
        position: Tensor,
        at: Tensor | None = None,
        times: EventTimes | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Return outputs (B, L, D) of histories, or (P, D) at the places ``at`` of the flattened (B·L).

        The rest is as in :class:`~recsys_ssm.batches.SequenceBatch`.
        """
        if self.tokenizer.position_from == "end":
            position = positions_from_end(item, seq_idx)
        given: dict[str, Any] = {}
        clock = None
        if times is not None and (self.tokenizer.uses_times or self.backbone.uses_times):
            # What the model may not see is taken away here, before any part of it.
            asked = times.next if self.query_time else times.event
            gap = gaps_before(times.event, seq_idx)
            if self.tokenizer.uses_times:
                given["gaps"] = (gap, asked - times.event)
            if self.backbone.uses_times:
                clock = Clock(times.event, asked, torch.log1p(gap / (self.typical_gap or 1)))
        if self.tokenizer.uses_columns:
            given["columns"] = columns
        tokens = self.tokenizer(item, position, self.features, **given)
        if clock is not None:
            return self.backbone(tokens, seq_idx, at, clock)
        return self.backbone(tokens, seq_idx, at)

    # Training

    def setup(self, stage: str) -> None:
        """Check that the dataset makes the samples of the model's objective.

        Raises:
            UserError: One of the two has masked items or start tokens, the other has not.
        """
        data = getattr(self.trainer, "datamodule", None)
        if (starts := getattr(data, "start_token", self.start_token)) != self.start_token:
            raise UserError(
                f"dataset.start_token={str(starts).lower()}: the model is for dataset.start_token="
                f"{str(self.start_token).lower()}; give the same to both"
            )
        if data is not None and hasattr(data, "splits"):
            self._check_context(data)
        objective = getattr(data, "objective", self.objective)
        if objective != self.objective and "masked" in (objective, self.objective):
            raise UserError(
                f"dataset.objective={objective}: the model is for dataset.objective={self.objective}; give the same to "
                "both"
            )

    def _check_context(self, data: SequenceData) -> None:
        """Check that a dataset gives the times and the columns of events that the model was built for."""
        given = getattr(data.splits, "event_columns", {})
        if {name: list(values) for name, values in given.items()} != self.event_columns:
            raise UserError(
                f"dataset.event_columns={', '.join(given) or 'none'}: the model is for "
                f"{', '.join(self.event_columns) or 'none'} with the values of its training; give the same to both"
            )
        uses_times = self.tokenizer.uses_times or self.backbone.uses_times
        if uses_times and getattr(data.splits, "context", (None,))[0] is None:
            raise UserError("dataset.times=false: the model uses times; give dataset.times=true")

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        if self.objective == "masked":
            item, target = mask_items(batch.item, batch.seq_idx, self.mask_share)
            batch = batch._replace(item=item, target=target)
        if self.skip:
            batch = batch._replace(target=later_targets(batch.target, batch.seq_idx, self.skip))
        loss, n_targets = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=n_targets)
        return loss

    def configure_optimizers(self) -> Any:
        groups = None
        if self.decay == "table":
            rate = weight_decay(self.optimizer_spec)
            groups = parameter_groups(self, rate, only=("tokenizer.embedding.weight",))
        return configure_optimizers(self, self.optimizer_spec, self.scheduler_spec, groups)

    def _loss(self, batch: SequenceBatch) -> tuple[Tensor, int]:
        # Padding, and positions nothing follows, never reach the catalogue.
        where_P = (batch.target.flatten() >= 0).nonzero().squeeze(1)
        x_PD = self(*batch[:3], where_P, batch.times, batch.columns)
        target_P = batch.target.flatten()[where_P]
        return self.loss(self.head.query(x_PD), self._items(), target_P), target_P.numel()

    def _items(self) -> Tensor:
        """Return the (I, D) vectors whose inner products with queries are scores."""
        return self.head.items(self.tokenizer.items(self.features))

    # Validation: windows for the loss, then users for the ranking

    def validation_step(
        self, batch: SequenceBatch | HistoryBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self.val_loss.update(*self._loss(batch))  # type: ignore[arg-type]
            return
        if not batch.target.numel():  # this process has none of the users
            return
        all_UK, unseen_UK = self.top(batch, self.val_metrics.max_k, seen_too=not self.filter_seen)  # type: ignore[arg-type]
        self.val_metrics.update_from_top(unseen_UK if all_UK is None else all_UK, batch.target)

    # Test

    def test_step(self, batch: HistoryBatch, batch_idx: int) -> None:
        if not batch.target.numel():  # this process has none of the users
            return
        all_UK, unseen_UK = self.top(batch, self.test_metrics.max_k)
        assert all_UK is not None
        top_UK, other_UK = (unseen_UK, all_UK) if self.filter_seen else (all_UK, unseen_UK)
        self.test_metrics.update_from_top(top_UK, batch.target)
        self.test_metrics_other.update_from_top(other_UK, batch.target)
        self.test_rankings.add(batch.user, top_UK, batch.target)

    def top(
        self, batch: HistoryBatch, k: int, *, seen_too: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """Return top-k catalogue indices (U, k): over all items (None unless ``seen_too``), and over unseen items.

        A target that was seen before is not among the unseen items: the same lists that :meth:`recommend` returns.
        """
        query_UD = self._queries(batch)
        return rank_products(query_UD, self._items(), k, batch.seen.pairs(), everything=seen_too)

    # Predictions

    def on_predict_start(self) -> None:
        """Compute the catalogue's vectors once."""
        self.check_items()
        with self.inference():
            self._catalogue = self._items()

    def predict_step(
        self, batch: HistoryBatch, batch_idx: int = 0, dataloader_idx: int = 0
    ) -> TopItems:
        """Return the best items to follow each user's history, as :attr:`selection` says.

        Users without an item get the most popular items, with scores that are NaN.
        """
        items_ID = self._catalogue if self._catalogue is not None else self._items()
        wanted = self.selection.filter_seen
        seen = batch.seen if (self.filter_seen if wanted is None else wanted) else None
        warm = batch.last >= 0
        if bool(warm.all()):
            return self.select(batch.user, self._queries(batch), items_ID, seen)
        popular_U1, popular_I1 = torch.ones(len(batch.user), 1), self._popularity().unsqueeze(1)
        found = self.select(
            batch.user, popular_U1.to(self.device), popular_I1.to(self.device), seen
        )
        found.score.fill_(torch.nan)
        rows = warm.nonzero().squeeze(1)
        if rows.numel():
            known = batch._replace(last=batch.last[rows])
            own = None if seen is None else seen.to("cpu").rows(rows.cpu())
            best = self.select(batch.user[rows], self._queries(known), items_ID, own)
            found.item[rows.cpu()], found.score[rows.cpu()] = best.item, best.score
        return found

    def on_predict_end(self) -> None:
        self._catalogue = None

    def pairs_of(self, batch: HistoryBatch, owner: Tensor, item: Tensor) -> Tensor:
        """Return the scores (n,) of items for users of a batch, NaN for a user without an item.

        Args:
            batch: U users.
            owner: (n,) numbers of users in the batch.
            item: (n,) catalogue indices.
        """
        items_ID = self._catalogue if self._catalogue is not None else self._items()
        warm = batch.last >= 0
        scores = torch.full((len(owner),), torch.nan)
        if bool(warm.any()):
            query_UD = self._queries(batch._replace(last=batch.last[warm]))
            row, kept = warm.cumsum(0) - 1, warm[owner]
            scores[kept] = self.pair_scores(query_UD, items_ID, row[owner[kept]], item[kept])
        return scores

    def _queries(self, batch: HistoryBatch) -> Tensor:
        """Return the (U, D) vectors whose products with the items' are the scores."""
        device = self.device
        self._check_shown(batch.times is not None, batch.columns is not None)
        if self.query_time and bool((batch.target < 0).any()):
            raise UserError(
                "model.query_time=true: it is not known when recommendations are asked for; call NextItem.recommend in "
                "Python with at="
            )
        item, seq_idx, position, last = (
            x.to(device) for x in (batch.item, batch.seq_idx, batch.position, batch.last)
        )
        times = None if batch.times is None else EventTimes(*(x.to(device) for x in batch.times))
        columns = None if batch.columns is None else batch.columns.to(device)
        return self.head.query(self(item, seq_idx, position, last, times, columns))

    def _check_shown(self, times: bool, columns: bool) -> None:
        """Check that the times and the columns of events are there where the model uses them.

        Raises:
            UserError: They are not.
        """
        uses_times = self.tokenizer.uses_times or self.backbone.uses_times
        if (uses_times and not times) or (self.tokenizer.uses_columns and not columns):
            raise UserError(
                "the model uses times or columns of events, which are not given here; call NextItem.recommend in "
                "Python with times= and columns="
            )

    def _popularity(self) -> Tensor:
        """Return numbers (I,) that order the items by their training interactions, exact in float32."""
        order = torch.argsort(self.item_counts.cpu(), descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel())
        return -place.float()

    # For the commands

    def fits(self, data: SequenceData) -> bool:
        """Return True if a dataset has the items and item features of the training."""
        splits = data.splits
        return splits.item_schema == self.item_schema and splits.item_ids == self.item_ids

    def row_names(self) -> dict[str, list[RowName]]:
        """Return the names of the rows of the items' embeddings, and of those of their features."""
        names: dict[str, list[RowName]] = {
            "tokenizer.embedding.weight": [
                ("padding", None),
                *(("item", item) for item in self.item_ids),
            ]
        }
        if isinstance(getattr(self.tokenizer, "features", None), FeatureTokenizer):
            names["tokenizer.features.embedding"] = category_rows(self.item_schema)
        return names

    def parameter_counts(self) -> dict[str, int]:
        """Count all parameters, and those without the embeddings of items and positions, as the papers do."""
        of_backbone = getattr(self.backbone, "position", None)
        tables = (self.tokenizer.embedding, self.tokenizer.position, of_backbone)
        total = sum(p.numel() for p in self.parameters())
        embeddings = sum(
            table.weight.numel() for table in tables if isinstance(table, torch.nn.Embedding)
        )
        if (mask := getattr(self.tokenizer, "mask", None)) is not None:
            embeddings += mask.numel()
        return {"total": total, "without_embeddings": total - embeddings}

    # Use

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        filter_seen: bool | None = None,
        times: Sequence[Sequence[float]] | None = None,
        at: float | Sequence[float] | None = None,
        columns: Mapping[str, Sequence[Sequence[str | None]]] | None = None,
    ) -> pl.DataFrame:
        """Return the ``k`` best items to follow each history. Safe to call from several threads.

        Args:
            histories: Item ids, the latest last; ids that the catalogue does not have are ignored. A history without
                a known item gets the most popular items, unless the model has a start token to read.
            k: Number of items.
            filter_seen: Leave out the items of the history. None: as in the test.
            times: Seconds of each event, as many as items; for models that use times.
            at: Seconds at which recommendations are asked for, one number or one for each history; for models that see
                this time (``query_time``).
            columns: Values of each event by column, as many as items; for models with columns of events. A value that
                the training did not have counts as empty.

        Returns:
            Columns ``user`` (row number in ``histories``), ``rank`` (from 1), ``item``, ``score`` (null for the most
            popular items).

        Raises:
            UserError: A history is not a list of item ids, or times, columns or ``at`` do not fit the model.
        """
        if type(k) is not int or k < 1:
            raise UserError(f"k={k}: give a whole number above 0")
        histories = list(histories)
        known = self.known_items(histories)
        context = self._context(histories, times, at, columns)
        found = self.best_or_popular(known, k, filter_seen=filter_seen, context=context)
        return self.as_table(*found).with_columns(pl.col("score").fill_nan(None))

    def score(self, histories: Sequence[Sequence[str]], pairs: Any) -> pl.DataFrame:
        """Return the scores of given items for given histories.

        Args:
            histories: As of :meth:`recommend`.
            pairs: Polars or pandas data frame with the columns ``user`` (row number in ``histories``) and ``item``.

        Returns:
            The rows of ``pairs`` with a column ``score``: null if the item is not in the catalogue, or if the history
            has no item of it.

        Raises:
            UserError: A history is not a list of item ids, a column is missing, or there is no such history.
        """
        known, frame = self.known_items(histories), as_frame(pairs, "pairs")
        for name in ("user", "item"):
            if name not in frame.columns:
                raise UserError(f"pairs: no column {name!r}; pass the columns user and item")
        user = torch.tensor(numeric_column(frame, "user", "pairs")).nan_to_num(-1).long()
        if user.numel() and not 0 <= int(user.min()) <= int(user.max()) < len(known):
            raise UserError(
                f"pairs: users from {int(user.min())} to {int(user.max())}, and {len(known)} histories; user is the "
                "row number of a history, from 0"
            )
        warm = torch.tensor([bool(history) or self.start_token for history in known])
        item, row = self.index_of(frame["item"]), torch.cumsum(warm, 0) - 1
        scored = (item >= 0) & warm[user]
        scores = torch.full((len(user),), torch.nan)
        if bool(scored.any()):
            query_UD = self._query([each for each in known if each or self.start_token])
            with self.inference():
                scores[scored] = self.pair_scores(
                    query_UD, self._items(), row[user[scored]], item[scored]
                )
        return frame.with_columns(pl.Series("score", scores.numpy()).fill_nan(None))

    def similar(self, items: Sequence[str], k: int = 10) -> pl.DataFrame:
        """Return the items whose embeddings have the largest cosines with those of given items.

        Args:
            items: Item ids.
            k: Number of items.

        Returns:
            Columns ``item`` (the given one), ``rank`` (from 1), ``similar``, ``score``.

        Raises:
            UserError: An item is not in the catalogue.
        """
        with self.inference():
            return self.similar_table(pl.Series(items, dtype=pl.String), self._items(), k)

    def candidates(
        self,
        histories: Sequence[Sequence[int]],
        k: int,
        *,
        filter_seen: bool,
        context: Sequence[_Context] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the ``k`` best items to follow each history: see :class:`HistoryRecommender`."""
        query_UD = self._query(histories, context)
        with self.inference():
            seen = None
            if filter_seen:
                lengths = torch.tensor([*map(len, histories)])
                user = torch.arange(len(histories)).repeat_interleave(lengths)
                item = torch.tensor([*itertools.chain.from_iterable(histories)], dtype=torch.long)
                seen = (user.to(self.device), item.to(self.device))
            return self.best_items(query_UD, self._items(), k, seen)

    def _context(
        self,
        histories: Sequence[Sequence[str]],
        times: Sequence[Sequence[float]] | None,
        at: float | Sequence[float] | None,
        columns: Mapping[str, Sequence[Sequence[str | None]]] | None,
    ) -> list[_Context]:
        """Return times and codes of the events of histories, without those of unknown items.

        Raises:
            UserError: They do not fit the model or the histories.
        """
        uses_times = self.tokenizer.uses_times or self.backbone.uses_times
        for name, value, wanted, why in (
            ("times", times, uses_times, "uses the times of events"),
            ("at", at, self.query_time, "sees the time that recommendations are asked for"),
            ("columns", columns, bool(self.event_columns), "has columns of events"),
        ):
            if wanted and value is None:
                raise UserError(f"recommend: the model {why}; pass {name}=")
            if value is not None and not wanted:
                raise UserError(f"recommend: no part of the model {why}; leave out {name}=")
        names = list(self.event_columns)
        if columns is not None and set(columns) != set(names):
            raise UserError(
                f"recommend: columns= has {', '.join(columns)}; pass {', '.join(names)}"
            )
        index = self.index_of_item()
        code = [
            {value: i for i, value in enumerate(values, 1)}
            for values in self.event_columns.values()
        ]
        asked = [at] * len(histories) if isinstance(at, int | float) else list(at or ())
        found = []
        for row, history in enumerate(histories):
            kept = [i for i, item in enumerate(history) if item_text(item) in index]
            parts: dict[str, Any] = {name: columns[name][row] for name in names} if columns else {}
            parts |= {} if times is None else {"times": times[row]}
            for name, cells in parts.items():
                if len(cells) != len(history):
                    raise UserError(
                        f"recommend: history {row} has {len(history)} items and {len(cells)} {name}; pass one for each"
                    )
            seconds = None if times is None else [int(parts["times"][i]) for i in kept]
            codes = [[code[c].get(str(parts[n][i]), 0) for c, n in enumerate(names)] for i in kept]
            if at is not None and len(asked) != len(histories):
                raise UserError(
                    f"recommend: {len(asked)} times in at= for {len(histories)} histories; pass one for each"
                )
            moment = int(asked[row]) if at is not None else seconds[-1] if seconds else 0
            found.append(_Context(seconds, moment, codes))
        return found

    def made_up_context(self, known: Sequence[Sequence[int]]) -> list[_Context]:
        """Return made-up times and codes of histories, for measurements of speed."""
        return [_Context([0] * len(h), 0, [[0] * len(self.event_columns)] * len(h)) for h in known]

    def _query(
        self, known: Sequence[Sequence[int]], context: Sequence[_Context] | None = None
    ) -> Tensor:
        """Return the (U, D) queries of histories of catalogue indices, none of them empty."""
        if context is None:
            self._check_shown(times=False, columns=False)
            context = self.made_up_context(known)
        before = [START] if self.start_token else []
        after = [MASK] if self.objective == "masked" else []
        shown = [[*before, *history, *after] for history in known]
        latest = [torch.tensor(history[-self.max_length :]) for history in shown]
        lengths_U = torch.tensor([history.numel() for history in latest])
        item_UL = torch.nn.utils.rnn.pad_sequence(latest, batch_first=True, padding_value=NO_ITEM)
        position_UL = torch.arange(item_UL.shape[1]).expand_as(item_UL)
        seq_idx_UL = torch.where(item_UL != NO_ITEM, 0, -1)
        position_UL = position_UL.where(item_UL != NO_ITEM, 0)
        last_U = torch.arange(len(latest)) * item_UL.shape[1] + lengths_U - 1
        times, columns = self._padded_context(context, item_UL.shape[1])
        with self.inference():
            x_UD = self(
                *(x.to(self.device) for x in (item_UL, seq_idx_UL, position_UL, last_U)),
                times,
                columns,
            )
            return self.head.query(x_UD)

    def _padded_context(
        self, context: Sequence[_Context], length: int
    ) -> tuple[EventTimes | None, Tensor | None]:
        """Return times and codes of histories whose latest positions are shown, as in a batch."""
        times = columns = None
        if self.tokenizer.uses_times or self.backbone.uses_times:
            event = torch.zeros(len(context), length, dtype=torch.long)
            after = torch.zeros_like(event)
            for row, (seconds, moment, _) in enumerate(context):
                following = [*(seconds or ()), moment]
                # A start token has the time of the first event.
                own = [*following[:1], *following[:-1]] if self.start_token else following[:-1]
                following = following if self.start_token else following[1:]
                own, following = own[-self.max_length :], following[-self.max_length :]
                event[row, : len(own)] = torch.tensor(own, dtype=torch.long)
                after[row, : len(own)] = torch.tensor(following, dtype=torch.long)
            times = EventTimes(event.to(self.device), after.to(self.device))
        if self.tokenizer.uses_columns:
            n = len(self.event_columns)
            columns = torch.zeros(len(context), length, n, dtype=torch.long)
            for row, (_, _, codes) in enumerate(context):
                own_codes = [*([[0] * n] if self.start_token else []), *codes][-self.max_length :]
                if own_codes:
                    columns[row, : len(own_codes)] = torch.tensor(own_codes)
            columns = columns.to(self.device)
        return times, columns


class _Context(NamedTuple):
    """Times and codes of the events of one history."""

    seconds: list[int] | None
    moment: int
    """Seconds at which recommendations are asked for."""
    codes: list[list[int]]


def positions_from_end(item: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Return how many items follow each position in its sequence, 0 at padding: (B, L) int64.

    Args:
        item: (B, L) catalogue indices.
        seq_idx: (B, L), as in :class:`~recsys_ssm.batches.SequenceBatch`; None: each row is one sequence.
    """
    L = item.shape[1]
    here_L = torch.arange(L, device=item.device)
    if seq_idx is None:
        return (L - 1 - here_L).expand_as(item)
    last = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1), value=True)
    end_BL = torch.where(last, here_L, L - 1).flip(1).cummin(1).values.flip(1)
    return (end_BL - here_L).masked_fill(seq_idx < 0, 0)


def mask_items(item: Tensor, seq_idx: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Hide some items, which become the targets (BERT4Rec, Sun et al. 2019, arXiv 1904.06690).

    Each item is hidden with probability ``share``. Where none of a sequence is, its last item is hidden, as in
    validation and test. The random numbers are PyTorch's, so they follow from a run's seed and step.

    Args:
        item: (B, L) int64, catalogue indices, -1 at padding.
        seq_idx: (B, L), as in :class:`~recsys_ssm.batches.SequenceBatch`.
        share: Between 0 and 1.

    Returns:
        The items, :data:`~recsys_ssm.batches.MASK` where one is hidden, and the targets, -1 elsewhere: (B, L) each.
    """
    # NOTE[DIFF] The authors' code also adds samples whose last item alone is hidden; here that is one of the draws.
    real = item >= 0
    hidden = (torch.rand(item.shape, device=item.device) < share) & real
    last = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1), value=True)
    count_BL = hidden.long().cumsum(1)
    before_BL = F.pad(count_BL, (1, 0))[:, :-1]
    first = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    at_start_BL = torch.where(first, before_BL, 0).cummax(1).values
    hidden |= last & real & (count_BL == at_start_BL)
    return item.masked_fill(hidden, MASK), item.masked_fill(~hidden, NO_ITEM)


def later_targets(target: Tensor, seq_idx: Tensor, skip: float) -> Tensor:
    """Replace some targets by later ones: events after the next one are worth predicting as well.

    A position's target is replaced by the following one with probability ``skip``, that again with the same
    probability, and so on; a sequence's last target stays. Where histories are short and the next item is a matter of
    chance, the model learns more about an item's surroundings and less about their order (the idea of PinnerFormer's
    "all action" losses, Pancha et al. 2022, arXiv 2205.04507, drawn anew in each epoch).

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
