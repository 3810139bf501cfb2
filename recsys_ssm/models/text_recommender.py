"""Define what the recommenders that read titles share: histories in, rankings and figures out.

Legend: U users, I items, K places, B rows of tokens, L tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from recsys_ssm.batches import TopItems
from recsys_ssm.data.sequences import COMMON_REPEATS
from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import Part, build, to_spec
from recsys_ssm.models.histories import (
    DEFAULT_METRICS,
    History,
    HistoryRecommender,
    histories_of,
)
from recsys_ssm.models.optim import configure_optimizers
from recsys_ssm.recommendations import Rankings
from recsys_ssm.text.weights import Source, Weights

if TYPE_CHECKING:
    from recsys_ssm.batches import HistoryBatch, SequenceBatch
    from recsys_ssm.data.sequences import SequenceData


class Sample(NamedTuple):
    """A history and the item that follows it."""

    history: History
    target: int


def samples_of(batch: SequenceBatch) -> list[Sample]:
    """Return the histories of a packed batch up to each place that has a target, and the targets."""
    rows, places = (batch.target >= 0).nonzero(as_tuple=True)
    begins = places - batch.position[rows, places]
    target = batch.target[rows, places].tolist()
    item = batch.item.tolist()
    return [
        Sample(item[row][begin : place + 1], one)
        for row, begin, place, one in zip(
            rows.tolist(), begins.tolist(), places.tolist(), target, strict=True
        )
    ]


class TextRecommender(HistoryRecommender):
    """Rank a catalogue by its items' titles with a language model.

    A subclass says which language models it can use (``families``), makes one in its constructor, and implements
    :meth:`sample_loss`, :meth:`read` and :meth:`top`. The checkpoint holds titles, tokenizer and the model's config as
    plain data beside the weights, so it needs neither the dataset nor the folder that the weights came from.

    Args:
        item_ids: Names of the catalogue's items, in catalogue order (equal scores are ranked in it).
        item_titles: Title of each item.
        max_length: Number of latest items of a history that the model reads.
        text: A :class:`~recsys_ssm.text.weights.Weights`: where the language model comes from; None: a tiny one.
        language: Tokenizer and config of the language model, which a checkpoint passes; None: from ``text``.
        item_counts: (I,) training interactions of each item.
        title_tokens: Tokens of a title that are read; the rest of a longer title is left out.
        filter_seen: See :class:`~recsys_ssm.models.next_item.NextItem`.
        optimizer: Spec of a ``torch.optim`` optimizer; None: AdamW with lr 1e-3.
        scheduler: Spec of a learning-rate scheduler, stepped each step; None: the rate stays.
        metrics: Ranking metrics of validation and test, as ``hr@10``.

    Raises:
        UserError: An option is wrong, or the language model cannot be used.
    """

    latency_calls = 3
    families: ClassVar[tuple[str, ...]] = ()
    """Values of ``model_type`` in the ``config.json`` of language models that this recommender can use."""

    phrases: ClassVar[tuple[str, ...]] = ()
    """Fixed texts of the prompts, which the tokenizer of a tiny model is trained on as well."""

    def __init__(
        self,
        *,
        item_ids: Sequence[str],
        item_titles: Sequence[str],
        max_length: int,
        text: Part | None = None,
        language: Mapping[str, Any] | None = None,
        item_counts: Tensor | None = None,
        title_tokens: int = 32,
        filter_seen: bool | None = None,
        optimizer: Part | None = None,
        scheduler: Part | None = None,
        metrics: Sequence[str] = DEFAULT_METRICS,
    ) -> None:
        super().__init__()
        # Not to the logger: a catalogue may be large, and the composed config is logged already.
        self.save_hyperparameters(ignore=["item_counts", "retriever"], logger=False)
        text = to_spec(text, "text", Weights)
        optimizer = to_spec(optimizer or {"lr": 1e-3}, "optimizer", torch.optim.AdamW)
        scheduler = None if scheduler is None else to_spec(scheduler, "scheduler")
        self.hparams.update(text=text, optimizer=optimizer, scheduler=scheduler)
        self.optimizer_spec, self.scheduler_spec = optimizer, scheduler
        self.item_ids, self.item_titles = list(item_ids), list(item_titles)
        self.max_length = max_length
        self.filter_seen = True if filter_seen is None else filter_seen
        if len(self.item_titles) != len(self.item_ids):
            raise UserError(
                f"item_titles: {len(self.item_titles):,} titles for {len(self.item_ids):,} items; pass one for each"
            )
        if title_tokens < 1:
            raise UserError(f"model.title_tokens={title_tokens}: give at least 1")
        self.weights: Weights = build(text, Weights, "text")
        # As often as a fixed text needs to have tokens of its own.
        texts = [*self.item_titles, *self.phrases * max(10, len(self.item_titles) // 10)]
        self.source: Source = self.weights.resolve(texts, self.families, language)
        self.tokenizer = self.source.tokenizer
        # A blank before a title: it is how a title begins within a text.
        self.titles = self.tokenizer.encode_all(
            [f" {title}" for title in self.item_titles], most=title_tokens
        )
        n_items = len(self.item_ids)
        counts = torch.zeros(n_items, dtype=torch.int64) if item_counts is None else item_counts
        self.register_buffer("item_counts", counts)
        self.val_loss = MeanMetric()
        self.set_metrics(metrics)
        self.test_rankings = Rankings()

    def keep_language(self, config: Mapping[str, Any]) -> None:
        """Note the language model's config and tokenizer for the checkpoint; the constructor calls it."""
        self.hparams["language"] = self.source.to_dict(config)

    @classmethod
    def arguments_from(cls, data: SequenceData) -> dict[str, Any]:
        """Return the constructor's arguments that come from a dataset.

        Raises:
            UserError: The dataset has no histories, or its items have no titles.
        """
        splits = data.splits
        if not hasattr(splits, "histories") or not hasattr(data, "item_titles"):
            raise UserError(
                f"{cls.__name__} reads histories of items with titles, and dataset {data.name} has none; choose "
                "another dataset, as dataset=ml_100k"
            )
        return {
            "item_ids": splits.item_ids,
            "item_titles": data.item_titles(),
            "max_length": data.max_length,
            "item_counts": splits.item_counts,
            "filter_seen": splits.repeat_share < COMMON_REPEATS,
        }

    # To implement

    @abc.abstractmethod
    def sample_loss(self, samples: list[Sample], batch: SequenceBatch) -> tuple[Tensor, int]:
        """Return the mean loss of samples, and the number of what it is the mean of.

        Args:
            samples: Histories of at most ``max_length`` items, and their targets.
            batch: The batch that they are from.
        """

    @abc.abstractmethod
    def read(self, histories: list[History]) -> Any:
        """Return what the language model makes of U histories, whatever items are left out of the ranking."""

    @abc.abstractmethod
    def top(
        self, reading: Any, histories: list[History], k: int, *, filter_seen: bool
    ) -> tuple[Tensor, Tensor]:
        """Rank the catalogue.

        Args:
            reading: Result of :meth:`read`.
            histories: The whole histories, each of at least one item.
            k: Places, may be more than there are items.
            filter_seen: Leave out the items of a history.

        Returns:
            Catalogue indices, best first, -1 where no item is left, and their scores: (U, k) each, on the CPU.
        """

    def candidates(
        self, histories: Sequence[Sequence[int]], k: int, *, filter_seen: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the ``k`` best items to follow each history: see :class:`HistoryRecommender`."""
        asked = [list(history) for history in histories]
        with self.inference():
            return self.top(self.read(asked), asked, k, filter_seen=filter_seen)

    # Training

    def setup(self, stage: str) -> None:
        """Check that the dataset's samples are histories and next items.

        Raises:
            UserError: Items are masked.
        """
        if getattr(getattr(self.trainer, "datamodule", None), "objective", None) == "masked":
            raise UserError(
                f"dataset.objective=masked: {type(self).__name__} reads what comes before an item; give "
                "dataset.objective=last"
            )

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        loss, count = self.sample_loss(samples_of(batch), batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=max(count, 1))
        return loss

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer_spec, self.scheduler_spec)

    # Validation: windows for the loss, then users for the ranking

    def validation_step(
        self, batch: SequenceBatch | HistoryBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            loss, count = self.sample_loss(samples_of(batch), batch)  # type: ignore[arg-type]
            if count:
                self.val_loss.update(loss, count)
        elif batch.target.numel():  # this process may have none of the users
            self.validate_users(histories_of(batch.seen), batch.target)  # type: ignore[union-attr]

    def validate_users(self, histories: list[History], target: Tensor) -> None:
        """Rank for users of the validation."""
        top_UK, _ = self.top(
            self.read(histories), histories, self.val_metrics.max_k, filter_seen=self.filter_seen
        )
        self.val_metrics.update_from_top(top_UK.to(target.device), target)

    # Test

    def test_step(self, batch: HistoryBatch, batch_idx: int) -> None:
        if not batch.target.numel():  # this process has none of the users
            return
        histories, k = histories_of(batch.seen), self.test_metrics.max_k
        reading = self.read(histories)
        top_UK, other_UK = (
            self.top(reading, histories, k, filter_seen=each)[0].to(batch.target.device)
            for each in (self.filter_seen, not self.filter_seen)
        )
        self.test_metrics.update_from_top(top_UK, batch.target)
        self.test_metrics_other.update_from_top(other_UK, batch.target)
        self.test_rankings.add(batch.user, top_UK, batch.target)

    # Predictions

    def predict_step(
        self, batch: HistoryBatch, batch_idx: int = 0, dataloader_idx: int = 0
    ) -> TopItems:
        """Return the best items to follow each user's history, as :attr:`selection` says.

        Users without an item get the most popular items, with scores that are NaN.
        """
        chosen = self.selection
        known = histories_of(batch.seen)
        return TopItems(
            batch.user.cpu(),
            *self.best_or_popular(known, chosen.k, filter_seen=chosen.filter_seen),
        )

    # For the commands

    def fits(self, data: SequenceData) -> bool:
        """Return True if a dataset has the items of the training; titles are the checkpoint's own."""
        return data.splits.item_ids == self.item_ids
