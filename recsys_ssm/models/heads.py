"""From a backbone's outputs to scores and losses.

Legend: B pairs, U users, I items, D = d_model, S = size of the embedding that is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TowerHead(nn.Sequential):
    """A tower's end: D → hidden (ReLU) → S.

    Args:
        d_model: D.
        hidden: Width of the hidden layer; the paper's is 64.
        output: S; the paper's is 32.
        final_relu: A ReLU after the last layer too. The paper's wording allows it, but scores are then ≥ 0 while
            Spotify has targets of -1; docs/results.md compares both.
    """

    def __init__(
        self, *, d_model: int, hidden: int = 64, output: int = 32, final_relu: bool = False
    ) -> None:
        super().__init__(
            nn.Linear(d_model, hidden),
            nn.ReLU(),
            nn.Linear(hidden, output),
            nn.ReLU() if final_relu else nn.Identity(),
        )


PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(user (B, S), item (B, S), target (B,), item_index (B,)) to a scalar."""


def mse(user: Tensor, item: Tensor, target: Tensor, item_index: Tensor) -> Tensor:
    """Mean squared error of the inner product (FT-Mamba)."""
    return F.mse_loss((user * item).sum(-1), target)


def bce(user: Tensor, item: Tensor, target: Tensor, item_index: Tensor) -> Tensor:
    """Binary cross-entropy of the inner product as a logit; a target above 0 is a 1, any other a 0."""
    return F.binary_cross_entropy_with_logits((user * item).sum(-1), (target > 0).to(user.dtype))


def in_batch_softmax(user: Tensor, item: Tensor, target: Tensor, item_index: Tensor) -> Tensor:
    """Cross-entropy of each positive pair's item among the items of the whole batch (Yi et al. 2019).

    Pairs with a target of 0 or less only lend their items. The same item in another pair is not a negative. A batch
    without a positive pair has loss 0.
    """
    positive = target > 0
    logits_PB = user[positive] @ item.T
    same_PB = item_index[positive].unsqueeze(1) == item_index.unsqueeze(0)
    own_P = positive.nonzero().squeeze(1)
    same_PB[torch.arange(own_P.numel(), device=own_P.device), own_P] = False
    logits_PB = logits_PB.masked_fill(same_PB, -torch.inf)
    # sum / max(count, 1) rather than the mean: of no pair at all that would be NaN.
    return (
        F.cross_entropy(logits_PB, own_P, reduction="sum") / own_P.numel()
        if own_P.numel()
        else user.sum() * 0
    )


LossName = Literal["mse", "bce", "softmax"]
LOSSES: dict[str, PairLoss] = {"mse": mse, "bce": bce, "softmax": in_batch_softmax}
