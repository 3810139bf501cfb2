"""Make of a trained model the modules to export: ids in, best items out, with all that is in between.

Legend: B rows, L items of the longest history given, T tokens of a row, M the latest of them that the model sees, S the
length of a vector that is compared, I items, k places.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.batches import MASK, NO_ITEM, START
from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.models.recommender import Recommender
from recsys_ssm.models.tokenizers import ItemTokenizer
from recsys_ssm.models.two_tower import Tower, TwoTower


class Graph(nn.Module):
    """Module to export, with examples of its inputs and the names of inputs and outputs."""

    inputs: dict[str, Tensor]
    """Examples by name, for the trace."""
    axes: dict[str, dict[int, str]]
    """Axes of the inputs that may have any size, by input and place."""
    outputs: tuple[str, ...]
    """Names of the results."""
    title: str
    """Classes of the model's parts, for messages."""
    longest = 0
    """Items of a history that the model sees."""

    def sample(self, batch: int, length: int) -> dict[str, Tensor]:
        """Return inputs of these sizes by name, to check an exported graph with."""
        sizes = {"batch": batch, "length": length, "n_seen": length}
        found = {}
        for name, example in self.inputs.items():
            axes = self.axes.get(name, {})
            shape = [sizes[axes[i]] if i in axes else n for i, n in enumerate(example.shape)]
            found[name] = torch.zeros(shape, dtype=example.dtype) if axes else example
        return found


class NextItemGraph(Graph):
    """Rank the catalogue as the next item of histories of catalogue indices.

    ``history (B, L) int64, padded with -1 at the end; k ()  →  items (B, k) int64, -1 where no item is left; scores
    (B, k); vector (B, S)``. Equal scores are ranked in catalogue order. A history without an item gets the most popular
    items, with scores that are NaN.

    Args:
        model: The model; it is copied.
        filter_seen: Leave out the items of the history.
    """

    outputs = ("items", "scores", "vector")

    def __init__(self, model: NextItem, filter_seen: bool) -> None:
        super().__init__()
        model = _frozen(model)
        tokenizer = model.tokenizer
        if isinstance(tokenizer, ItemTokenizer) and not (
            tokenizer.features is None and tokenizer.projection is None
        ):
            # An item's token does not change any more: its row is the id's, features' and title's together.
            rows_ID = tokenizer.items(model.features)
            tokenizer.embedding.weight.copy_(F.pad(rows_ID, (0, 0, 1, 0)))
            tokenizer.features = tokenizer.projection = model.item_schema = None
            tokenizer.vectors = None
        self.model, self.filter_seen = model, filter_seen
        items_IS = model._items()
        rows = model.tokenizer.embedding.weight
        if rows.shape == (len(items_IS) + 1, items_IS.shape[1]) and torch.equal(rows[1:], items_IS):
            self.table = rows  # one copy in the file
        else:
            self.table = nn.Parameter(F.pad(items_IS, (0, 0, 1, 0)), requires_grad=False)
        order = torch.argsort(model.item_counts, descending=True, stable=True)
        place = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
        # Column 0 belongs to padding.
        self.register_buffer("popularity", F.pad(-place.float(), (1, 0), value=-torch.inf))
        self.popularity: Tensor
        self.inputs = {
            # Long enough for several chunks of an operator: a trace takes a loop of one for none.
            "history": F.pad(torch.zeros(3, 7, dtype=torch.long), (0, 30), value=NO_ITEM),
            "k": torch.tensor(min(10, len(items_IS))),
        }
        self.axes = {"history": {0: "batch", 1: "length"}}
        self.longest = model.max_length
        self.title = f"{type(model.tokenizer).__name__} or {type(model.backbone).__name__}"

    def sample(self, batch: int, length: int) -> dict[str, Tensor]:
        """Return histories of different lengths that begin with different items."""
        n_items = self.popularity.numel() - 1
        item = (torch.arange(batch).unsqueeze(1) * 7 + torch.arange(length) * 3) % n_items
        shorter = torch.arange(length) >= (length - torch.arange(batch)).clamp(min=1).unsqueeze(1)
        return {"history": item.masked_fill(shorter, NO_ITEM), "k": self.inputs["k"]}

    def forward(self, history: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, B = self.model, history.shape[0]
        # A trace assumes that an axis which is not 1 never is, also for slices of the row.
        history = F.pad(history, (0, 3), value=NO_ITEM)
        n_B = (history >= 0).sum(1)
        shown_BT, lengths_B = history, n_B
        if model.start_token:
            shown_BT, lengths_B = F.pad(shown_BT, (1, 0), value=START), lengths_B + 1
        if model.objective == "masked":
            shown_BT = F.pad(shown_BT, (0, 1), value=NO_ITEM)
            shown_BT = shown_BT.scatter(1, lengths_B.unsqueeze(1), MASK)
            lengths_B = lengths_B + 1
        T = shown_BT.shape[1]
        M = torch.sym_min(T, model.max_length)
        here_M = torch.arange(M, device=history.device)
        at_BM = (lengths_B - model.max_length).clamp(min=0).unsqueeze(1) + here_M
        item_BM = shown_BT.gather(1, at_BM.clamp(max=T - 1))
        item_BM = torch.where(at_BM < lengths_B.unsqueeze(1), item_BM, NO_ITEM)
        real_BM = item_BM != NO_ITEM
        position_BM = torch.where(real_BM, here_M, 0)
        causal = model.backbone.causal and model.tokenizer.position_from == "start"
        # No earlier position sees padding at the end.
        seq_idx_BM = None if causal else torch.where(real_BM, 0, -1)
        last_B = (real_BM.sum(1) - 1).clamp(min=0)
        at_B = torch.arange(B, device=history.device) * M + last_B
        vector_BS = model.head.query(model(item_BM, seq_idx_BM, position_BM, at_B))
        scores_BI = vector_BS @ self.table.t()
        cold_B1 = (n_B == 0).unsqueeze(1)
        if not model.start_token:
            scores_BI = torch.where(cold_B1, self.popularity, scores_BI)
        seen_BL = history + 1 if self.filter_seen else history[:, :1] * 0
        items_Bk, scores_Bk = _best(scores_BI, seen_BL.clamp(min=0), k)
        if not model.start_token:
            scores_Bk = torch.where(cold_B1, torch.nan, scores_Bk)
        return items_Bk, scores_Bk, vector_BS


class TowerGraph(Graph):
    """Encode rows of features: the scaling of numbers is part of it.

    ``numeric (B, Fn) float64, as in the table, NaN where a cell is empty; categorical (B, Fc) int64, the code of a
    value (1 + its place in the vocabulary, 0 for any other)  →  vector (B, S)``. An input without columns is left out.

    Args:
        tower: The tower; it is copied.
        schema: The features.
    """

    outputs: tuple[str, ...] = ("vector",)

    def __init__(self, tower: Tower, schema: FeatureSchema) -> None:
        super().__init__()
        self.tower = _frozen(tower)
        for name in ("mean", "std"):
            values = [getattr(field, name) for field in schema.numeric]
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64))
        self.mean: Tensor
        self.std: Tensor
        self.inputs, self.axes = {}, {}
        n_numeric, n_categorical = len(schema.numeric), len(schema.categorical)
        if n_numeric:
            self.inputs["numeric"] = torch.zeros(3, n_numeric, dtype=torch.float64)
        if n_categorical:
            self.inputs["categorical"] = torch.zeros(3, n_categorical, dtype=torch.long)
        if not self.inputs:
            raise UserError("a tower without features has nothing to read; export another model")
        self.axes = {name: {0: "batch"} for name in self.inputs}
        self.title = f"{type(tower.tokenizer).__name__} or {type(tower.backbone).__name__}"

    def encode(self, *inputs: Tensor) -> Tensor:
        """Return the vectors (B, S); the inputs are those of ``self.inputs``."""
        given = dict(zip(self.inputs, inputs, strict=False))
        any_input = inputs[0]
        if "numeric" in given:
            scaled = (given["numeric"] - self.mean) / self.std
            numeric = torch.where(scaled.isnan(), 0.0, scaled).float()
        else:
            numeric = torch.zeros(any_input.shape[0], 0)
        categorical = given.get("categorical")
        if categorical is None:
            categorical = torch.zeros(any_input.shape[0], 0, dtype=torch.long)
        return self.tower(Features(numeric, categorical))

    def forward(self, *inputs: Tensor) -> Any:
        return self.encode(*inputs)


class UserGraph(TowerGraph):
    """Rank the catalogue for users: :class:`TowerGraph`, and the items of the largest inner products.

    It also reads ``seen (B, L) int64``, catalogue indices of items not to recommend, padded with -1, and ``k ()``, and
    also returns ``items (B, k) int64, -1 where no item is left, and scores (B, k)``.
    """

    outputs = ("items", "scores", "vector")

    def __init__(self, model: TwoTower) -> None:
        super().__init__(model.user_tower, model.user_schema)
        items_IS = model.item_embeddings().float().cpu()
        self.register_buffer("table", F.pad(items_IS, (0, 0, 1, 0)))
        self.table: Tensor
        self.inputs["seen"] = torch.full((3, 2), -1)
        self.inputs["k"] = torch.tensor(min(10, len(items_IS)))
        self.axes["seen"] = {0: "batch", 1: "n_seen"}

    def forward(self, *inputs: Tensor) -> Any:
        *features, seen_BL, k = inputs
        vector_BS = self.encode(*features)
        items_Bk, scores_Bk = _best(vector_BS @ self.table.t(), (seen_BL + 1).clamp(min=0), k)
        return items_Bk, scores_Bk, vector_BS


def graphs_of(model: Recommender, filter_seen: bool | None = None) -> dict[str, Graph]:
    """Return the graphs of a model by name: ``model``, or ``users`` and ``items`` of two towers.

    Raises:
        UserError: The model is of another kind, or reads more than items.
    """
    if isinstance(model, NextItem):
        if any(part.uses_times for part in (model.tokenizer, model.backbone)) or (
            model.tokenizer.uses_columns
        ):
            raise UserError(
                "the model uses times or columns of events, which a graph of items does not have; give "
                "format=safetensors"
            )
        model.check_items()
        seen = model.filter_seen if filter_seen is None else filter_seen
        return {"model": NextItemGraph(model, seen).eval()}
    if isinstance(model, TwoTower):
        return {
            "users": UserGraph(model).eval(),
            "items": TowerGraph(model.item_tower, model.item_schema).eval(),
        }
    raise UserError(
        f"cannot export a {type(model).__name__}; give a run of NextItem or TwoTower, or format=safetensors"
    )


def _frozen(module: Any) -> Any:
    """Return a copy in float32, in evaluation mode, without gradients, on the CPU."""
    return copy.deepcopy(module).cpu().float().eval().requires_grad_(requires_grad=False)


def _best(scores_BI: Tensor, left_out_BL: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ``k`` best columns but the first, and their scores; equal scores in the order of the columns.

    Args:
        scores_BI: (B, 1 + I); column 0 is padding's.
        left_out_BL: (B, L) columns that are left out.
        k: ().
    """
    lowest = torch.finfo(scores_BI.dtype).min
    n = scores_BI.shape[1] - 1
    # A score of -inf must not look like an item that is left out.
    scores_BI = scores_BI.clamp(min=lowest).scatter(1, left_out_BL, -torch.inf)
    places: Any = k.clamp(1, n).item()
    torch._check(places >= 1)
    torch._check(places <= n)
    scores_Bk, at_Bk = scores_BI[:, 1:].topk(places, dim=1)
    left_Bk = scores_Bk == -torch.inf
    return at_Bk.masked_fill(left_Bk, -1), scores_Bk
