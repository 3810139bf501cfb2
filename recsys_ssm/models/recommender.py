"""What the doors ask of a model, whatever it recommends from."""

from __future__ import annotations

import abc
from typing import Any, Self

import lightning as L

from recsys_ssm.metrics import RankingMetrics
from recsys_ssm.rankings import Rankings


class Recommender(L.LightningModule, abc.ABC):
    """A LightningModule the doors can build for a dataset, test and report on; a head names it by ``_target_``."""

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

    def latency(self, data: Any) -> dict[str, float]:
        """Seconds a call takes to rank the catalogue, by the number of users in it; empty: not measured."""
        return {}
