"""From features or item ids to tokens.

Legend: B rows, Fn numeric and Fc categorical features, F = Fn + Fc, D = d_model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from recsys_ssm.features import Features


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
