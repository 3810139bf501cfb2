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

from recsys_ssm.batches import Ragged, Selection, TopItems
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.instantiate import Spec, defaults_of, find
from recsys_ssm.metrics import RankingMetrics
from recsys_ssm.models import training
from recsys_ssm.ops import rank_products
from recsys_ssm.recommendations import Rankings

_LOCK = threading.Lock()
"""Held while a model changes its mode."""

_PAIRS = 1 << 16
"""Pairs of a user and an item to score at once."""


RowName = tuple[str, str | None]
"""``("item", id)``, or a feature and one of its categories (None: missing), or ``("padding", None)``."""


def category_rows(schema: FeatureSchema | None) -> list[RowName]:
    """Return the names of the rows of a :class:`~recsys_ssm.models.tokenizers.FeatureTokenizer`'s ``embedding``."""
    fields = () if schema is None else schema.categorical
    return [(field.name, value) for field in fields for value in (None, *field.values)]


def _items_loaded(model: Any, incompatible: Any) -> None:
    """Note that a state had the features of the catalogue."""
    if not {"item_numeric", "item_categorical"} & set(incompatible.missing_keys):
        model._without_items = False


class Recommender(L.LightningModule, abc.ABC):
    """Define a LightningModule that commands can build for a dataset, train, test and report on."""

    item_ids: list[str]
    """Names of the catalogue's items, in catalogue order."""
    val_metrics: RankingMetrics
    test_metrics: RankingMetrics
    test_rankings: Rankings
    """Recommendations of the last test."""

    selection = Selection()
    """Items that ``predict_step`` may recommend, and how many."""
    optimizer_spec: Spec
    _n_inferring = 0
    _without_items = False

    @property
    def lr(self) -> float:
        """Learning rate of the optimizer, which Lightning's ``Tuner.lr_find(…, update_attr=True)`` sets."""
        spec = self.optimizer_spec
        rate = {**defaults_of(find(spec["_target_"], "optimizer")), **spec}.get("lr")
        if rate is None:
            raise AttributeError(f"optimizer {spec['_target_']} has no lr")
        return float(rate)

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optimizer_spec = {**self.optimizer_spec, "lr": rate}
        self.hparams["optimizer"] = self.optimizer_spec

    def set_items(self, items: Features | None, schema: FeatureSchema | None) -> None:
        """Keep the features of the catalogue as buffers. A checkpoint fills them where ``items`` is None.

        Raises:
            UserError: ``items`` has another shape than the catalogue by the schema.
        """
        n_items = len(self.item_ids)
        n_numeric, n_categorical = (
            (0, 0) if schema is None else (len(schema.numeric), len(schema.categorical))
        )
        if items is None:
            self._without_items = n_items > 0 and n_numeric + n_categorical > 0
            items = Features(
                torch.zeros(n_items, n_numeric),
                torch.zeros(n_items, n_categorical, dtype=torch.long),
            )
        found = tuple(items.numeric.shape), tuple(items.categorical.shape)
        if found != ((n_items, n_numeric), (n_items, n_categorical)):
            raise UserError(
                f"items has numeric and categorical features of shapes {found[0]} and {found[1]}; pass "
                f"{n_numeric} and {n_categorical} columns for the {n_items} items of item_ids"
            )
        self.register_buffer("item_numeric", items.numeric)
        self.register_buffer("item_categorical", items.categorical)
        self.register_load_state_dict_post_hook(_items_loaded)

    def check_items(self) -> None:
        """Check that the features of the catalogue are known.

        Raises:
            UserError: Neither the constructor nor a checkpoint gave them.
        """
        if self._without_items:
            raise UserError(
                f"{type(self).__name__} has an item_schema with features but no items; pass items=, the features of "
                f"the {len(self.item_ids)} items of item_ids, or build the model by for_data"
            )

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:
        """Load a model from a checkpoint, in evaluation mode: see :class:`lightning.LightningModule`."""
        model: Self = super().load_from_checkpoint(*args, **kwargs)
        model.eval()
        return model

    def on_fit_start(self) -> None:
        """Train in training mode, also a model that was loaded for use."""
        self.check_items()
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
    def arguments_for(cls, data: Any, **options: Any) -> dict[str, Any]:
        """Return the constructor's arguments that come from a dataset, of which some depend on the other options.

        Raises:
            UserError: The dataset is of another kind.
        """
        return cls.arguments_from(data)

    @classmethod
    def for_data(cls, data: Any, **options: Any) -> Self:
        """Build a model for a dataset; ``options`` are the constructor's own (``backbone=…`` and so on).

        Raises:
            UserError: The dataset is of another kind, or an option is wrong.
        """
        return cls(**{**cls.arguments_for(data, **options), **options})

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

    def row_names(self) -> dict[str, list[RowName]]:
        """Return the names of the rows of each parameter that has a row for each item or category.

        A model for another catalogue takes such rows over by name, and all other parameters as they are.
        """
        return {}

    @abc.abstractmethod
    def set_metrics(self, metrics: list[str]) -> None:
        """Set the ranking metrics that validation and test report."""

    @abc.abstractmethod
    def test_results(self) -> dict[str, dict[str, float]]:
        """Return the last test's ``metrics``, and the same by other conventions."""

    @abc.abstractmethod
    def parameter_counts(self) -> dict[str, int]:
        """Count parameters as the papers do."""

    @property
    def ids(self) -> pl.Series:
        """Names of the catalogue's items as a series, in catalogue order."""
        if not hasattr(self, "_ids"):
            self._ids = pl.Series("item", self.item_ids, dtype=pl.String)
        return self._ids

    def index_of(self, ids: pl.Series) -> Tensor:
        """Return the catalogue indices of item ids (n,), int64, -1 for an id that the catalogue does not have."""
        known = pl.DataFrame({"id": self.ids, "at": range(len(self.item_ids))})
        asked = pl.DataFrame({"id": ids.cast(pl.String)})
        at = asked.join(known, on="id", how="left", maintain_order="left")["at"]
        return torch.from_numpy(at.fill_null(-1).to_numpy().astype("int64"))

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

    def select(self, user: Tensor, query: Tensor, items: Tensor, seen: Ragged | None) -> TopItems:
        """Return the best items for a batch of users, of those that :attr:`selection` allows.

        Legend: U users, I items, D the length of their vectors, n pairs.

        Args:
            user: (U,) rows of the user table.
            query: (U, D).
            items: (I, D).
            seen: Items not to recommend to each user, where the selection does not ask for them; None: none.
        """
        chosen, user = self.selection, user.cpu()
        left_out = []
        if seen is not None:
            left_out.append(seen.to("cpu").pairs())
        if chosen.denied_pairs is not None:
            left_out.append(chosen.denied_pairs.rows(user).pairs())
        pairs = None
        if left_out:
            pairs = tuple(torch.cat(each) for each in zip(*left_out, strict=True))
        if chosen.allowed_pairs is not None:
            return self._of_pairs(user, query, items, pairs)  # type: ignore[arg-type]
        if chosen.allowed is None:
            on_device = (
                None if pairs is None else (pairs[0].to(self.device), pairs[1].to(self.device))
            )
            return TopItems(user, *self.best_items(query, items, chosen.k, on_device))
        if pairs is not None:
            place = torch.searchsorted(chosen.allowed, pairs[1]).clamp(max=len(chosen.allowed) - 1)
            kept = chosen.allowed[place] == pairs[1]
            pairs = pairs[0][kept].to(self.device), place[kept].to(self.device)
        top, score = self.best_items(query, items[chosen.allowed], chosen.k, pairs)
        return TopItems(user, torch.where(top < 0, -1, chosen.allowed[top.clamp(min=0)]), score)

    def _of_pairs(
        self, user: Tensor, query: Tensor, items: Tensor, left_out: tuple[Tensor, Tensor] | None
    ) -> TopItems:
        """Return the best of the items that are allowed for each user."""
        chosen, n_items = self.selection, len(self.item_ids)
        assert chosen.allowed_pairs is not None
        owner, item = chosen.allowed_pairs.rows(user).pairs()
        key = torch.unique(owner * n_items + item)
        if left_out is not None:
            key = key[~torch.isin(key, left_out[0] * n_items + left_out[1])]
        owner, item = key // n_items, key % n_items
        if chosen.allowed is not None:
            kept = torch.isin(item, chosen.allowed)
            owner, item = owner[kept], item[kept]
        score = self.pair_scores(query, items, owner, item)
        order = torch.argsort(score, descending=True, stable=True)  # items ascend: ties by item
        order = order[torch.argsort(owner[order], stable=True)]
        owner, item, score = owner[order], item[order], score[order]
        counts = torch.bincount(owner, minlength=len(user))
        place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        kept = place < chosen.k
        k = min(chosen.k, n_items)
        top, scores = torch.full((len(user), k), -1), torch.full((len(user), k), torch.nan)
        top[owner[kept], place[kept]] = item[kept]
        scores[owner[kept], place[kept]] = score[kept]
        return TopItems(user, top, scores)

    @staticmethod
    def pair_scores(query: Tensor, items: Tensor, owner: Tensor, item: Tensor) -> Tensor:
        """Return the products (n,) of ``query[owner]`` and ``items[item]``, float32 on the CPU, in blocks."""
        found = [
            (query[u.to(query.device)] * items[i.to(items.device)]).sum(1).float().cpu()
            for u, i in zip(owner.split(_PAIRS), item.split(_PAIRS), strict=True)
        ]
        return torch.cat(found) if found else torch.zeros(0)

    def neighbours(
        self, vectors: Tensor, catalogue: Tensor, k: int, own: Tensor | None
    ) -> TopItems:
        """Return the catalogue's items of the largest cosines with each vector.

        Args:
            vectors: (U, D).
            catalogue: (I, D).
            k: Places.
            own: (U,) the catalogue index of each vector's own item, which is left out, -1 if it has none.
        """
        query, items = (
            torch.nn.functional.normalize(x.float(), dim=1) for x in (vectors, catalogue)
        )
        pairs = None
        if own is not None:
            has_own = (own >= 0).nonzero().squeeze(1)
            pairs = has_own.to(self.device), own[has_own].to(self.device)
        return TopItems(torch.arange(len(vectors)), *self.best_items(query, items, k, pairs))

    def similar_table(self, items: pl.Series, catalogue: Tensor, k: int) -> pl.DataFrame:
        """Return the neighbours of items of the catalogue (I, D) as columns ``item``, ``rank``, ``similar``, ``score``.

        Raises:
            UserError: An item is not in the catalogue.
        """
        own = self.index_of(items)
        if bool((own < 0).any()):
            missing = items.filter(pl.Series((own < 0).numpy()))
            more = f" (nor are {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise UserError(
                f"items: {missing[0]!r:.60} is not in the catalogue{more}; pass ids of items that were in the training"
            )
        found = self.neighbours(catalogue[own], catalogue, k, own)
        table = self.as_table(found.item, found.score).rename({"item": "similar"})
        return table.select(
            items.gather(table["user"].to_numpy()).alias("item"), "rank", "similar", "score"
        )

    def as_table(self, top: Tensor, scores: Tensor) -> pl.DataFrame:
        """Return a result of :meth:`best_items` as columns ``user`` (row), ``rank`` (from 1), ``item``, ``score``."""
        user, place = (top >= 0).nonzero(as_tuple=True)
        return pl.DataFrame(
            {
                "user": user.numpy(),
                "rank": place.numpy() + 1,
                "item": self.ids.gather(top[user, place].numpy()),
                "score": scores[user, place].numpy(),
            }
        )

    def latency(self, data: Any) -> dict[str, float]:
        """Measure the seconds of a call that ranks the catalogue, by number of users; empty: not measured."""
        return {}
