"""Define the interface through which commands use a model."""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Self

import lightning as L
import polars as pl
import torch
from torch import Tensor

from recsys_ssm.metrics import RankingMetrics
from recsys_ssm.models import training
from recsys_ssm.ops import rank_products
from recsys_ssm.recommendations import Rankings

_LOCK = threading.Lock()
"""Held while a model changes its mode."""


class Recommender(L.LightningModule, abc.ABC):
    """Define a LightningModule that commands can build for a dataset, train, test and report on."""

    item_ids: list[str]
    """Names of the catalogue's items, in catalogue order."""
    val_metrics: RankingMetrics
    test_metrics: RankingMetrics
    test_rankings: Rankings
    """Recommendations of the last test."""

    _n_inferring = 0

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:
        """Load a model from a checkpoint, in evaluation mode: see :class:`lightning.LightningModule`."""
        model: Self = super().load_from_checkpoint(*args, **kwargs)
        model.eval()
        return model

    def on_fit_start(self) -> None:
        """Train in training mode, also a model that was loaded for use."""
        self.train()

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Put the model into evaluation mode without gradients; calls from several threads may overlap."""
        with _LOCK:
            if self._n_inferring == 0:
                self._was_training = self.training
                self.eval()
            self._n_inferring += 1
        try:
            with torch.no_grad():
                yield
        finally:
            with _LOCK:
                self._n_inferring -= 1
                if self._n_inferring == 0 and self._was_training:
                    self.train()

    @classmethod
    @abc.abstractmethod
    def arguments_from(cls, data: Any) -> dict[str, Any]:
        """Return the constructor's arguments that come from a dataset.

        Raises:
            UserError: The dataset is of another kind.
        """

    @classmethod
    def for_data(cls, data: Any, **options: Any) -> Self:
        """Build a model for a dataset; ``options`` are the constructor's own (``backbone=…`` and so on).

        Raises:
            UserError: The dataset is of another kind, or an option is wrong.
        """
        return cls(**{**cls.arguments_from(data), **options})

    def fit(self, data: Any, **options: Any) -> Self:
        """Train on a dataset and load the best checkpoint; see :func:`recsys_ssm.models.training.fit`."""
        training.fit(self, data, **options)
        return self

    def evaluate(self, data: Any, **options: Any) -> dict[str, float]:
        """Return the test metrics on a dataset; see :func:`recsys_ssm.models.training.evaluate`."""
        return training.evaluate(self, data, **options)

    @abc.abstractmethod
    def fits(self, data: Any) -> bool:
        """Return True if a dataset has the columns, categories and items of the training."""

    @abc.abstractmethod
    def set_metrics(self, metrics: list[str]) -> None:
        """Set the ranking metrics that validation and test report."""

    @abc.abstractmethod
    def test_results(self) -> dict[str, dict[str, float]]:
        """Return the last test's ``metrics``, and the same by other conventions."""

    @abc.abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Count parameters as the papers do."""

    def best_items(
        self, query: Tensor, items: Tensor, k: int, exclude: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the items of the largest products: catalogue indices (-1 where none is left) and their scores.

        Arguments as of :func:`~recsys_ssm.ops.rank_products`; (U, k) each, on the CPU, k at most the catalogue's size.
        """
        _, top_UK = rank_products(
            query, items, min(k, len(self.item_ids)), exclude, everything=False
        )
        scores_UK = (items[top_UK.clamp(min=0)] * query.unsqueeze(1)).sum(2)
        return top_UK.cpu(), scores_UK.float().cpu()

    def as_table(self, top: Tensor, scores: Tensor) -> pl.DataFrame:
        """Return a result of :meth:`best_items` as columns ``user`` (row), ``rank`` (from 1), ``item``, ``score``."""
        user, place = (top >= 0).nonzero(as_tuple=True)
        return pl.DataFrame(
            {
                "user": user.numpy(),
                "rank": place.numpy() + 1,
                "item": [self.item_ids[i] for i in top[user, place].tolist()],
                "score": scores[user, place].numpy(),
            }
        )

    def latency(self, data: Any) -> dict[str, float]:
        """Measure the seconds of a call that ranks the catalogue, by number of users; empty: not measured."""
        return {}
