"""Turn one side of a batch (features, or histories of items) into tokens.

Legend: B rows, L positions, I items, Fn numeric and Fc categorical features, F = Fn + Fc, D = d_model.
"""

from __future__ import annotations

import abc
import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema
from recsys_ssm.instantiate import Configurable


class Tokenizer(Configurable, nn.Module, abc.ABC):
    """Define the contract of a tokenizer: one side of a batch in, tokens (B, L, D) out.

    A model passes ``d_model`` and what it knows of the data when it builds a tokenizer; the other arguments are the
    tokenizer's options. A new tokenizer is a subclass of one of the two below, and one file in ``conf/tokenizer``.
    """

    @abc.abstractmethod
    def forward(self, *side: Any) -> Tensor:
        """Return the tokens (B, L, D) of one side of a batch."""


class TableTokenizer(Tokenizer):
    """Define the contract of a tokenizer of tables, for two towers: ``(schema, d_model, **options)``.

    The backbone's last token stands for the row, or the mean token, as the backbone's ``pooling`` says.
    """

    @abc.abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Return the tokens (B, L, D) of B rows."""


class HistoryTokenizer(Tokenizer):
    """Define the contract of a tokenizer of histories: ``(n_items, d_model, schema, max_length, **options)``."""

    embedding: nn.Embedding
    position: nn.Embedding | None

    @abc.abstractmethod
    def items(self, features: Features | None) -> Tensor:
        """Return the (I, D) vectors that scores are inner products with; ``features`` are the catalogue's."""

    @abc.abstractmethod
    def forward(self, item: Tensor, position: Tensor, features: Features | None = None) -> Tensor:
        """Return the tokens (B, L, D) of histories.

        Args:
            item: (B, L) catalogue indices, -1 at padding.
            position: (B, L) places in the history, from 0.
            features: The catalogue's, I rows, where there is a schema.
        """


class FeatureTokenizer(TableTokenizer):
    """Make one token of each feature, and a CLS token at the END (Gorishniy et al. 2021, arXiv 2106.11959; FT-Mamba).

    Numeric feature j becomes ``x_j w_j + b_j``, a categorical one ``W_j[x_j] + b_j``; CLS is a numeric feature whose
    value is always 1. FT-Transformer puts CLS first; here it is last, where a causal backbone has seen all tokens.

    Args:
        schema: The features: Fn numeric and Fc categorical ones.
        d_model: D.
        init: ``normal``, N(0, init_scale²), PyTorch's default for embeddings; or ``uniform`` in
            ±init_scale/√D, FT-Transformer's. The choice matters: see docs/results.md.
        init_scale: As above.
    """

    def __init__(
        self,
        *,
        schema: FeatureSchema,
        d_model: int,
        init: Literal["normal", "uniform"] = "normal",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        n_numeric = len(schema.numeric)
        cardinalities = [field.n_codes for field in schema.categorical]
        if init not in ("normal", "uniform"):
            raise ValueError(f"init={init!r}: expected 'normal' or 'uniform'")
        self.init, self.init_scale = init, init_scale
        self.weight = nn.Parameter(torch.empty(n_numeric + 1, d_model))
        # A parameter without rows is trouble for FSDP, vmap and torch.export.save.
        self.embedding = (
            nn.Parameter(torch.empty(sum(cardinalities), d_model)) if cardinalities else None
        )
        self.bias = nn.Parameter(torch.empty(n_numeric + len(cardinalities) + 1, d_model))
        first_rows = [0, *itertools.accumulate(cardinalities)][: len(cardinalities)]
        self.register_buffer(
            "offsets", torch.tensor(first_rows, dtype=torch.long), persistent=False
        )
        self.offsets: Tensor
        self.n_numeric = n_numeric
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if self.init == "normal":
                nn.init.normal_(parameter, std=self.init_scale)
            else:
                bound = self.init_scale * parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, features: Features) -> Tensor:
        """Return the tokens (B, F + 1, D) of B rows."""
        numeric, categorical = features
        x_BFD = numeric.unsqueeze(-1) * self.weight[: self.n_numeric]
        tokens = [x_BFD]
        if self.embedding is not None:
            tokens.append(nn.functional.embedding(categorical + self.offsets, self.embedding))
        tokens.append(self.weight[self.n_numeric :].expand(numeric.shape[0], 1, -1))
        return torch.cat(tokens, dim=1) + self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load a state; leave out the empty ``embedding`` of version 0.1, which no parameter has now."""
        name = f"{prefix}embedding"
        if self.embedding is None and name in state_dict and not state_dict[name].numel():
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ItemTokenizer(HistoryTokenizer):
    """Make one token of each item in a history: its embedding, its position if asked for, LayerNorm, dropout.

    The embedding has a row for padding before the items' own, as public implementations count it; this row stays zero
    and is never scored. Where the catalogue has features, an item's row is its id's embedding plus the sum of its
    features' tokens, both as input and in the softmax (SASRec's tied embedding).

    Args:
        n_items: I.
        d_model: D.
        schema: Schema of the items' features. None: the id alone.
        max_length: Items of a history that the model sees.
        positions: Number of learned position embeddings (SASRec); ``max_length``: as many as that; 0: none, as state
            space models need none.
        norm: Apply LayerNorm to the sum, as in SASRec and Mamba4Rec.
        dropout: Dropout after the LayerNorm.
        init_std: Standard deviation of the initial embeddings; RecBole's is .02.
        norm_eps: Epsilon of the LayerNorm; RecBole's is 1e-12.
    """

    def __init__(
        self,
        *,
        n_items: int,
        d_model: int,
        schema: FeatureSchema | None = None,
        max_length: int | None = None,
        positions: int | Literal["max_length"] = 0,
        norm: bool = True,
        dropout: float = 0.2,
        init_std: float = 0.02,
        norm_eps: float = 1e-12,
    ) -> None:
        if positions == "max_length":
            if max_length is None:
                raise ValueError("positions=max_length: pass max_length too")
            positions = max_length
        super().__init__()
        self.embedding = nn.Embedding(n_items + 1, d_model, padding_idx=0)
        self.position = nn.Embedding(positions, d_model) if positions else None
        self.norm = nn.LayerNorm(d_model, eps=norm_eps) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.features = (
            FeatureTokenizer(schema=schema, d_model=d_model, init_scale=init_std)
            if schema is not None
            else None
        )
        with torch.no_grad():
            for table in (self.embedding, self.position):
                if table is not None:
                    nn.init.normal_(table.weight, std=init_std)
            self.embedding.weight[0].zero_()

    def items(self, features: Features | None) -> Tensor:
        """Return (I, D): each item as a token and as a row of the softmax; ``features`` are the catalogue's."""
        rows_ID = self.embedding.weight[1:]
        if self.features is None:
            return rows_ID
        assert features is not None, "the catalogue's features"
        return rows_ID + self.features(features).sum(1)

    def forward(self, item: Tensor, position: Tensor, features: Features | None = None) -> Tensor:
        """Return the tokens of histories.

        Args:
            item: (B, L) catalogue indices, -1 at padding.
            position: (B, L) places in the history, from 0.
            features: The catalogue's, I rows, where there is a schema.

        Returns:
            (B, L, D).

        Raises:
            UserError: A history is longer than there are positions.
        """
        if self.features is None:
            # padding_idx keeps the padding row's gradient out.
            tokens_BLD = self.embedding(item + 1)
        else:
            items_ID = self.items(features)
            tokens_BLD = nn.functional.embedding(item.clamp(min=0), items_ID)
            tokens_BLD = tokens_BLD * (item >= 0).unsqueeze(-1)
        if self.position is not None:
            # A compiled graph does not read values; there the embedding raises an IndexError.
            if not torch.compiler.is_compiling() and (
                position.numel() and int(position.max()) >= self.position.num_embeddings
            ):
                raise UserError(
                    f"a history has {int(position.max()) + 1} items, and tokenizer.positions="
                    f"{self.position.num_embeddings}; give tokenizer.positions=max_length"
                )
            tokens_BLD = tokens_BLD + self.position(position)
        return self.dropout(self.norm(tokens_BLD))
