"""What the doors ask of a model, whatever it recommends from."""

from __future__ import annotations

import abc
from typing import Any, Self

import lightning as L
import polars as pl
from torch import Tensor

from recsys_ssm.metrics import RankingMetrics
from recsys_ssm.ops import rank_products
from recsys_ssm.recommendations import Rankings


class Recommender(L.LightningModule, abc.ABC):
    """A LightningModule the doors can build for a dataset, test and report on; a head names it by ``_target_``."""

    item_ids: list[str]
    """What the catalogue's items are called, in catalogue order."""
    val_metrics: RankingMetrics
    test_metrics: RankingMetrics
    test_rankings: Rankings
    """What the last test recommended."""

    @classmethod
    @abc.abstractmethod
    def for_data(cls, data: Any, **options: Any) -> Self:
        """A model for a dataset; ``options`` are the constructor's own (``backbone=…`` and so on).

        Raises:
            UserError: The dataset is of another kind, or an option is wrong.
        """

    @abc.abstractmethod
    def fits(self, data: Any) -> bool:
        """Whether a dataset has the columns, categories and items of the training."""

    @abc.abstractmethod
    def set_metrics(self, metrics: list[str]) -> None:
        """Which ranking metrics validation and test report."""

    @abc.abstractmethod
    def test_results(self) -> dict[str, dict[str, float]]:
        """What the last test found: ``metrics``, and the same by other conventions."""

    @abc.abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Parameters as the papers count them."""

    def best_items(
        self, query: Tensor, items: Tensor, k: int, exclude: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """The items of the largest products: catalogue indices, -1 where none is left, and their scores.

        Arguments as of :func:`~recsys_ssm.ops.rank_products`; (U, k) each, on the CPU, k at most the catalogue's size.
        """
        _, top_UK = rank_products(
            query, items, min(k, len(self.item_ids)), exclude, everything=False
        )
        scores_UK = (items[top_UK.clamp(min=0)] * query.unsqueeze(1)).sum(2)
        return top_UK.cpu(), scores_UK.float().cpu()

    def as_table(self, top: Tensor, scores: Tensor) -> pl.DataFrame:
        """What :meth:`best_items` found: columns ``user`` (row number), ``rank`` (from 1), ``item``, ``score``."""
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
        """Seconds a call takes to rank the catalogue, by the number of users in it; empty: not measured."""
        return {}
