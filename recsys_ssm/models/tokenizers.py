"""From features or item ids to tokens.

Legend: B rows, L positions, I items, Fn numeric and Fc categorical features, F = Fn + Fc, D = d_model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from recsys_ssm.errors import UserError
from recsys_ssm.features import Features, FeatureSchema


class FeatureTokenizer(nn.Module):
    """One token a feature and a CLS token at the END (Gorishniy et al. 2021, arXiv 2106.11959; FT-Mamba).

    Numeric feature j becomes ``x_j w_j + b_j``, a categorical one ``W_j[x_j] + b_j``; CLS is a numeric feature that
    is always 1. FT-Transformer puts CLS first; here it is last, where a causal backbone has seen everything.

    Args:
        n_numeric: Fn.
        cardinalities: Codes of each categorical feature, the missing one (0) included.
        d_model: D.
        init: ``normal``, N(0, init_scale²), PyTorch's default for embeddings; or ``uniform`` in
            ±init_scale/√D, FT-Transformer's. It decides much: see docs/results.md.
        init_scale: As above.
    """

    def __init__(
        self,
        *,
        n_numeric: int,
        cardinalities: Sequence[int],
        d_model: int,
        init: Literal["normal", "uniform"] = "normal",
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if init not in ("normal", "uniform"):
            raise ValueError(f"init={init!r}: expected 'normal' or 'uniform'")
        self.init, self.init_scale = init, init_scale
        self.weight = nn.Parameter(torch.empty(n_numeric + 1, d_model))
        self.embedding = nn.Parameter(torch.empty(sum(cardinalities), d_model))
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
        """Features of B rows to tokens (B, F + 1, D)."""
        numeric, categorical = features
        x_BFD = numeric.unsqueeze(-1) * self.weight[: self.n_numeric]
        e_BFD = nn.functional.embedding(categorical + self.offsets, self.embedding)
        cls_BFD = self.weight[self.n_numeric :].expand(numeric.shape[0], 1, -1)
        return torch.cat((x_BFD, e_BFD, cls_BFD), dim=1) + self.bias


class ItemTokenizer(nn.Module):
    """One token an item of a history: its embedding, its place if asked for, LayerNorm, dropout.

    The embedding has a row for padding before the items' own, as public implementations count it; it stays zero and
    is never scored. Where the catalogue has features, an item's row is its id's embedding plus the sum of its
    features' tokens, both as input and as what the softmax scores (SASRec's tied embedding).

    Args:
        n_items: I.
        d_model: D.
        positions: Learned embeddings of the place in the history, this many (SASRec); 0: none, as state space models
            need none.
        norm: LayerNorm after the sum, as in SASRec and Mamba4Rec.
        dropout: After the LayerNorm (before it there is none).
        init_std: Standard deviation the embeddings are drawn with; .02 is RecBole's.
        norm_eps: Of the LayerNorm; 1e-12 is RecBole's.
        schema: Of the items' features; none: the id alone.
    """

    def __init__(
        self,
        *,
        n_items: int,
        d_model: int,
        positions: int = 0,
        norm: bool = False,
        dropout: float = 0.0,
        init_std: float = 0.02,
        norm_eps: float = 1e-12,
        schema: FeatureSchema | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_items + 1, d_model, padding_idx=0)
        self.position = nn.Embedding(positions, d_model) if positions else None
        self.norm = nn.LayerNorm(d_model, eps=norm_eps) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.features = (
            FeatureTokenizer(
                n_numeric=len(schema.numeric),
                cardinalities=[field.n_codes for field in schema.categorical],
                d_model=d_model,
                init_scale=init_std,
            )
            if schema is not None
            else None
        )
        with torch.no_grad():
            for table in (self.embedding, self.position):
                if table is not None:
                    nn.init.normal_(table.weight, std=init_std)
            self.embedding.weight[0].zero_()

    def items(self, features: Features | None) -> Tensor:
        """(I, D), what each item is as a token and as a row of the softmax; ``features`` are the catalogue's."""
        rows_ID = self.embedding.weight[1:]
        if self.features is None:
            return rows_ID
        assert features is not None, "the catalogue's features"
        return rows_ID + self.features(features).sum(1)

    def forward(self, item: Tensor, position: Tensor, features: Features | None = None) -> Tensor:
        """Tokens of histories.

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
            if position.numel() and int(position.max()) >= self.position.num_embeddings:
                raise UserError(
                    f"a history of {int(position.max()) + 1} items, and tokenizer.positions="
                    f"{self.position.num_embeddings}; give as many as dataset.max_length"
                )
            tokens_BLD = tokens_BLD + self.position(position)
        return self.dropout(self.norm(tokens_BLD))
