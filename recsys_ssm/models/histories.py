"""Define what the recommenders that continue a history share: metrics under both rules for seen items, and their use.

Legend: U users, I items, K places.
"""

from __future__ import annotations

import abc
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from recsys_ssm.batches import Ragged
from recsys_ssm.errors import UserError
from recsys_ssm.metrics import RankingMetrics
from recsys_ssm.models.recommender import Recommender

if TYPE_CHECKING:
    from recsys_ssm.data.sequences import SequenceData

DEFAULT_METRICS: tuple[str, ...] = (
    *(f"{family}@{k}" for k in (1, 5, 10, 20) for family in ("hr", "ndcg", "mrr")),
    "coverage@10",
    "popularity@10",
)

History = list[int]
"""Catalogue indices of a user's items, the latest last."""


def histories_of(seen: Ragged) -> list[History]:
    """Return a batch's whole histories as lists."""
    values, bounds = seen.values.tolist(), seen.offsets.tolist()
    return [values[start:stop] for start, stop in itertools.pairwise(bounds)]


class HistoryRecommender(Recommender):
    """Rank a catalogue as the next item of a history.

    A subclass's constructor sets ``item_ids``, ``filter_seen``, ``val_loss`` and the buffer ``item_counts``, and it
    implements :meth:`candidates`.
    """

    filter_seen: bool
    """Leave out items that a user had already, in validation, test and :meth:`recommend`."""
    item_counts: Tensor
    """(I,) training interactions of each item."""
    val_loss: MeanMetric
    test_metrics_other: RankingMetrics
    """Metrics of the last test under the other choice of ``filter_seen``."""

    start_token: bool = False
    """Rank for a user without an item as well."""
    latency_calls: ClassVar[int] = 20
    """Calls of which :meth:`latency` takes the median."""

    def ranking_metrics(self, metrics: Sequence[str]) -> RankingMetrics:
        """Return ranking metrics over the catalogue."""
        return RankingMetrics(metrics, n_items=len(self.item_ids), item_counts=self.item_counts)

    def set_metrics(self, metrics: Sequence[str]) -> None:
        """Set the ranking metrics that validation and test report."""
        self.val_metrics, self.test_metrics, self.test_metrics_other = (
            self.ranking_metrics(metrics) for _ in range(3)
        )

    @abc.abstractmethod
    def candidates(
        self, histories: Sequence[Sequence[int]], k: int, *, filter_seen: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the ``k`` best items to follow each history.

        Args:
            histories: Catalogue indices, the latest last, at least one each unless there is a start token.
            k: Number of items.
            filter_seen: Leave out the items of the history.

        Returns:
            Catalogue indices (-1 where no item is left) and their scores: (U, k) each, on the CPU.
        """

    def made_up_context(self, known: Sequence[Sequence[int]]) -> Sequence[Any] | None:
        """Return a made-up context of histories, for measurements of speed; None: histories are enough."""
        return None

    # Validation and test

    def on_validation_epoch_end(self) -> None:
        values = {"loss": self.val_loss.compute(), **self.val_metrics.compute()}
        self.val_loss.reset()
        self.val_metrics.reset()
        self.log_dict({f"val/{name}": value.float() for name, value in values.items()})

    def on_test_epoch_start(self) -> None:
        self.test_rankings.clear()
        self.test_metrics.reset()
        self.test_metrics_other.reset()

    def on_test_epoch_end(self) -> None:
        """Log the metrics; they and ``test_rankings`` stay until the next test begins."""
        values = self.test_metrics.compute()
        self.log_dict({f"test/{name}": value.float() for name, value in values.items()})

    def test_results(self) -> dict[str, dict[str, float]]:
        """Return ``metrics`` under the model's ``filter_seen``, and the same under the other choice.

        ``metrics_unfiltered``: seen items allowed; ``metrics_filtered``: seen items left out.
        """

        def values(metrics: RankingMetrics) -> dict[str, float]:
            return {name: float(value) for name, value in metrics.compute().items()}

        headline, other = values(self.test_metrics), values(self.test_metrics_other)
        if self.filter_seen:
            return {"metrics": headline, "metrics_unfiltered": other}
        return {"metrics": headline, "metrics_unfiltered": headline, "metrics_filtered": other}

    def latency(self, data: SequenceData) -> dict[str, float]:
        """Measure the median seconds of a call that ranks the catalogue for 1 and for 256 users."""
        found = {}
        histories = histories_of(next(iter(data.test_dataloader())).seen)
        for n_users in (1, 256) if histories else ():
            asked = (histories * (n_users // len(histories) + 1))[:n_users]
            context = self.made_up_context(asked)
            beside: dict[str, Any] = {} if context is None else {"context": context}
            times = []
            for _ in range(self.latency_calls):
                start_s = time.perf_counter()
                self.candidates(asked, 10, filter_seen=self.filter_seen, **beside)
                times.append(time.perf_counter() - start_s)
            found[f"users_{n_users}"] = sorted(times)[self.latency_calls // 2]
        return found

    # Use

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        filter_seen: bool | None = None,
    ) -> pl.DataFrame:
        """Return the ``k`` best items to follow each history. Safe to call from several threads.

        Args:
            histories: Item ids, the latest last; ids that the catalogue does not have are ignored. A history without
                a known item gets the most popular items, unless the model has a start token to read.
            k: Number of items.
            filter_seen: Leave out the items of the history. None: as in the test.

        Returns:
            Columns ``user`` (row number in ``histories``), ``rank`` (from 1), ``item``, ``score`` (null for the most
            popular items).

        Raises:
            UserError: A history is not a list of item ids, or ``k`` is not a whole number above 0.
        """
        if type(k) is not int or k < 1:
            raise UserError(f"k={k}: give a whole number above 0")
        found = self.best_or_popular(self.known_items(histories), k, filter_seen=filter_seen)
        return self.as_table(*found).with_columns(pl.col("score").fill_nan(None))

    def best_or_popular(
        self,
        known: Sequence[Sequence[int]],
        k: int,
        *,
        filter_seen: bool | None,
        context: Sequence[Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return :meth:`candidates`, and the most popular items, with scores that are NaN, for empty histories.

        Args:
            known: Catalogue indices, the latest last.
            k: Places, of which there are no more than items.
            filter_seen: Leave out the items of the history. None: as in the test.
            context: What a subclass's :meth:`candidates` takes as ``context``, for each history; None: nothing.
        """
        filter_seen = self.filter_seen if filter_seen is None else filter_seen
        warm = [row for row, history in enumerate(known) if history or self.start_token]
        k = min(k, len(self.item_ids))
        top_UK, scores_UK = self.most_popular(len(known), k)
        if warm:
            asked = [known[row] for row in warm]
            beside: dict[str, Any] = (
                {} if context is None else {"context": [context[row] for row in warm]}
            )
            top, scores = self.candidates(asked, k, filter_seen=filter_seen, **beside)
            top_UK[warm], scores_UK[warm] = top, scores.float()
        return top_UK, scores_UK

    def most_popular(self, n_users: int, k: int) -> tuple[Tensor, Tensor]:
        """Return the catalogue indices of the most popular items for each user, and scores that are NaN: (U, K) each.

        Args:
            n_users: U.
            k: K, no more than there are items.
        """
        top_K = torch.argsort(self.item_counts.cpu(), descending=True, stable=True)[:k]
        top_UK = top_K.expand(n_users, -1).clone()
        return top_UK, torch.full(top_UK.shape, torch.nan)

    def known_items(self, histories: Sequence[Sequence[str]]) -> list[History]:
        """Return the catalogue indices of histories, without unknown items.

        Raises:
            UserError: A history is not a list of item ids.
        """
        histories = list(histories)
        index = self.index_of_item()
        for row, history in enumerate(histories):
            if isinstance(history, str) or not isinstance(history, Iterable):
                raise UserError(
                    f"history {row} is {history!r:.60}: expected a list of item ids; for one user pass [[…]]"
                )
        return [[index[i] for i in map(item_text, history) if i in index] for history in histories]

    def index_of_item(self) -> dict[str, int]:
        """Return the catalogue index of each item id."""
        if not hasattr(self, "_index_of"):
            self._index_of = {item: i for i, item in enumerate(self.item_ids)}
        return self._index_of


def item_text(item: object) -> str:
    """Return an item's id as the catalogue has it: a whole number stored as a float reads like an integer."""
    return str(int(item)) if isinstance(item, float) and item.is_integer() else str(item)
