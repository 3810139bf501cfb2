"""Losses of pairs (two towers) and of next items.

Legend: B pairs, S = size of the embedding that is compared; P positions with a next item, I items, D = d_model,
K negatives, N = B + K.
"""

from __future__ import annotations

import abc
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import Configurable
from recsys_ssm.ops.cross_entropy import linear_cross_entropy, multiplies_bfloat16


class PairLoss(Configurable, nn.Module, abc.ABC):
    """Define the contract of a two-tower loss."""

    negatives: int = 0
    """K, items that the model draws uniformly from the catalogue for each training batch."""

    @abc.abstractmethod
    def forward(self, user: Tensor, item: Tensor, target: Tensor, item_index: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            user: (B, S), embeddings of the users.
            item: (N, S), embeddings of the items of the pairs, then of the K that were drawn.
            target: (B,) float.
            item_index: (N,) int64, catalogue indices of the items.

        Returns:
            Scalar.
        """

    def set_item_counts(self, counts: Tensor) -> None:
        """Take the number of positive training pairs of each item, (I,); a loss may need it."""


class MeanSquaredError(PairLoss):
    """Return the mean squared error of the inner product (FT-Mamba)."""

    def forward(self, user: Tensor, item: Tensor, target: Tensor, item_index: Tensor) -> Tensor:
        return F.mse_loss((user * item).sum(-1), target)


class BinaryCrossEntropy(PairLoss):
    """Return the binary cross-entropy of the inner product as a logit.

    Args:
        relevant_above: A target above this is a 1, any other a 0. None: 0, or in a model that of its dataset.
    """

    def __init__(self, *, relevant_above: float | None = None) -> None:
        super().__init__()
        self.relevant_above = 0.0 if relevant_above is None else relevant_above

    def forward(self, user: Tensor, item: Tensor, target: Tensor, item_index: Tensor) -> Tensor:
        label = (target > self.relevant_above).to(user.dtype)
        return F.binary_cross_entropy_with_logits((user * item).sum(-1), label)


class InBatchSoftmax(PairLoss):
    """Return the cross-entropy of each positive pair's item among the items of the batch (Yi et al. 2019).

    Other pairs only contribute their items. The same item in another pair is not a negative. A batch without a positive
    pair has loss 0.

    Items of positive pairs are popular ones, so popular items are negatives too often. Two corrections, which work
    together:

    - ``logq`` lowers each score by the logarithm of the number of times that its item is expected in the batch, from
      the items' positive training pairs (Yi et al. 2019, "Sampling-bias-corrected neural modeling", equation 3). Items
      of other pairs, and those of ``negatives``, count as drawn uniformly.
    - ``negatives`` adds items that are drawn uniformly from the catalogue (mixed negative sampling, Yang et al. 2020,
      "Mixed negative sampling for learning two-tower neural networks in recommendations"). Not in validation.

    Args:
        relevant_above: A pair with a target above this is positive. None: 0, or in a model that of its dataset.
        logq: Correct the scores.
        negatives: K.

    Raises:
        ValueError: ``negatives`` is below 0.
    """

    def __init__(
        self, *, relevant_above: float | None = None, logq: bool = False, negatives: int = 0
    ) -> None:
        super().__init__()
        self.relevant_above = 0.0 if relevant_above is None else relevant_above
        if negatives < 0:
            raise ValueError(f"negatives={negatives}: expected at least 0")
        self.logq, self.negatives = logq, negatives
        # Not in the checkpoint: the dataset has them.
        self.register_buffer("counts", None, persistent=False)
        self.counts: Tensor | None

    def set_item_counts(self, counts: Tensor) -> None:
        self.counts = counts if self.logq and bool(counts.any()) else None

    def log_expected(self, target: Tensor, item_index: Tensor) -> Tensor:
        """Return the logarithm (N,) of the number of times that each item is expected in such a batch.

        Raises:
            UserError: The items' training pairs are not known.
        """
        if self.counts is None:
            raise UserError(
                "loss.logq=true needs the items' training pairs; train with a dataset, or pass item_counts to the model"
            )
        n_positive = (target > self.relevant_above).sum()
        n_uniform = item_index.numel() - n_positive
        # An item without a training pair may be a positive of validation.
        share_N = self.counts[item_index].clamp(min=1) / self.counts.sum()
        return (n_positive * share_N + n_uniform / self.counts.numel()).log()

    def forward(self, user: Tensor, item: Tensor, target: Tensor, item_index: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # one graph needs shapes that are known
            return self.with_static_shapes(user, item, target, item_index)
        positive = target > self.relevant_above
        logits_PN = user[positive] @ item.T
        if self.logq:
            logits_PN = logits_PN - self.log_expected(target, item_index)
        own_P = positive.nonzero().squeeze(1)
        same_PN = item_index[own_P].unsqueeze(1) == item_index.unsqueeze(0)
        same_PN[torch.arange(own_P.numel(), device=own_P.device), own_P] = False
        logits_PN = logits_PN.masked_fill(same_PN, -torch.inf)
        # sum / max(count, 1) rather than the mean: the mean of no pair is NaN.
        return (
            F.cross_entropy(logits_PN, own_P, reduction="sum") / own_P.numel()
            if own_P.numel()
            else (user.sum() + item.sum()) * 0
        )

    def with_static_shapes(
        self, user: Tensor, item: Tensor, target: Tensor, item_index: Tensor
    ) -> Tensor:
        """Return the same loss by shapes that do not depend on the targets, for ``vmap`` and ``torch.compile``."""
        positive_B = target > self.relevant_above
        B, N = target.numel(), item_index.numel()
        itself_BN = torch.eye(B, N, dtype=torch.bool, device=target.device)
        same_BN = (item_index[:B].unsqueeze(1) == item_index.unsqueeze(0)) & ~itself_BN
        logits_BN = user @ item.T
        if self.logq:
            logits_BN = logits_BN - self.log_expected(target, item_index)
        logits_BN = logits_BN.masked_fill(same_BN, -torch.inf)
        own_B = torch.arange(target.numel(), device=target.device)
        losses_B = F.cross_entropy(logits_BN, own_B, reduction="none")
        return losses_B.where(positive_B, 0).sum() / positive_B.sum().clamp(min=1)


NextItemLossKind = Literal["softmax", "sampled_softmax", "bce", "gbce"]


class NextItemLoss(Configurable, nn.Module):
    """Compare the score of the next item with those of other items; a score is an inner product.

    - ``softmax``: cross-entropy over the whole catalogue, exact, in chunks (:mod:`recsys_ssm.ops.cross_entropy`).
    - ``sampled_softmax``: over the next item and K sampled ones. With ``logq`` a sampled item's score is lowered by
      the logarithm of how often it is expected among the K, so that the sum estimates that of the whole catalogue
      (Bengio and Senécal 2008); the next item is always there, so its score stays.
    - ``bce``: binary cross-entropy of the next item against K sampled ones (SASRec has one).
    - ``gbce``: the same with the next item's probability raised to β, which undoes the overconfidence negative
      sampling brings (gSASRec, Petrov and Macdonald 2023, arXiv 2308.07192); ``t`` of 0 is ``bce``.

    Negatives equal to the target are ignored.

    Args:
        n_items: I.
        item_counts: (I,) training interactions of each item, for ``sampling=popularity``.
        kind: One of the above.
        negatives: K.
        sampling: ``uniform``, or ``popularity``: in proportion to ``item_counts`` (plus one).
        shared: Draw one set of K for the whole batch (one matrix product), not K for each position.
        logq: Correct the sampled items' scores, as above.
        gbce_t: t of ``gbce``, in [0, 1].
        matmul: Type that ``softmax`` multiplies in: ``float32``; ``bfloat16``, two to three times faster on processors
            that multiply it, with gradients off by about .3 % of their size; ``auto``: bfloat16 on such processors.
        label_smoothing: Share of the target's weight that ``softmax`` spreads over all items of the catalogue.

    Raises:
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        *,
        n_items: int,
        item_counts: Tensor | None = None,
        kind: NextItemLossKind = "softmax",
        negatives: int = 256,
        sampling: Literal["uniform", "popularity"] = "uniform",
        shared: bool = True,
        logq: bool = True,
        gbce_t: float = 0.75,
        matmul: Literal["float32", "bfloat16", "auto"] = "float32",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in get_args(NextItemLossKind):
            raise ValueError(
                f"kind={kind!r}: expected one of {', '.join(get_args(NextItemLossKind))}"
            )
        if negatives < 1:
            raise ValueError(f"negatives={negatives}: expected at least 1")
        if not 0 <= gbce_t <= 1:
            raise ValueError(f"gbce_t={gbce_t}: expected 0 to 1")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: expected 0 to below 1")
        if label_smoothing and kind != "softmax":
            raise ValueError(
                f"label_smoothing={label_smoothing} needs kind=softmax: kind={kind} has no weights of all items"
            )
        self.n_items, self.kind, self.negatives = n_items, kind, negatives
        self.label_smoothing = label_smoothing
        self.sampling, self.shared, self.logq, self.gbce_t = sampling, shared, logq, gbce_t
        self.matmul = matmul
        counts = torch.ones(n_items, dtype=torch.int64)
        if sampling == "popularity" and item_counts is not None:
            counts += item_counts
        # In the checkpoint, so that a model goes on training without the data's counts; integers, so that no cast
        # to half precision blurs them.
        self.register_buffer("cumulative", counts.cumsum(0))
        self.cumulative: Tensor

    def forward(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """Return the mean over positions.

        Args:
            x: (P, D), the backbone's outputs where there is a next item.
            weight: (I, D), the items.
            target: (P,) int64, the next items.

        Returns:
            Scalar; 0 of no position.
        """
        if self.kind == "softmax":
            fast = self.matmul == "bfloat16" or (
                self.matmul == "auto" and multiplies_bfloat16(x.device)
            )
            loss = linear_cross_entropy(x, weight, target, matmul=torch.bfloat16 if fast else None)
            if not self.label_smoothing:
                return loss
            # The mean over items of -log softmax is the target's plus its score less the mean score.
            above = (x * (weight[target] - weight.mean(0))).sum(-1)
            return loss + self.label_smoothing * _mean(above) if target.numel() else loss
        if not torch.compiler.is_compiling() and not target.numel():
            return (x.sum() + weight.sum()) * 0
        shape = (self.negatives,) if self.shared else (target.numel(), self.negatives)
        negative = self.draw(shape)
        own_P = (x * weight[target]).sum(-1).float()
        if self.shared:
            others_PK = (x @ weight[negative].T).float()
        else:
            others_PK = torch.einsum("pd,pkd->pk", x, weight[negative]).float()
        same_PK = negative == target.unsqueeze(1)
        if self.kind == "sampled_softmax":
            if self.logq:
                others_PK = others_PK - self.log_expected(negative)
            others_PK = others_PK.masked_fill(same_PK, -torch.inf)
            return _mean(_logsumexp(torch.cat([own_P.unsqueeze(1), others_PK], 1)) - own_P)
        beta = self.beta() if self.kind == "gbce" else 1.0
        others = F.softplus(others_PK).masked_fill(same_PK, 0).sum(1)
        return _mean(beta * F.softplus(-own_P) + others) / (self.negatives + 1)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Sample items with replacement."""
        device = self.cumulative.device
        if self.sampling == "uniform":
            return torch.randint(self.n_items, shape, device=device)
        if torch.compiler.is_compiling():  # a graph does not read the total
            share = torch.rand(shape, dtype=torch.float64, device=device)
            ticket = (share * self.cumulative[-1]).long()
        else:
            ticket = torch.randint(int(self.cumulative[-1]), shape, device=device)
        return torch.searchsorted(self.cumulative, ticket, right=True)

    def log_expected(self, item: Tensor) -> Tensor:
        """Return the logarithm of the number of times an item is expected among K draws."""
        counts = self.cumulative.diff(prepend=self.cumulative.new_zeros(1))
        return (counts[item] * (self.negatives / self.cumulative[-1])).log()

    def beta(self) -> float:
        """Return the exponent of the next item's probability (gSASRec, equation 12)."""
        share = min(1.0, self.negatives / max(self.n_items - 1, 1))
        return share * (self.gbce_t * (1 - 1 / share) + 1 / share)


def _mean(x: Tensor) -> Tensor:
    """Return the mean; in a compiled graph 0 of nothing, without a branch on the size."""
    if torch.compiler.is_compiling():
        return x.sum() / torch.sym_max(x.numel(), 1)
    return x.mean()


def _logsumexp(x: Tensor) -> Tensor:
    """Return the logsumexp of each row; in a compiled graph without PyTorch's branch on the size."""
    if torch.compiler.is_compiling():
        top = x.detach().amax(1, keepdim=True)
        return (x - top).exp().sum(1).log() + top.squeeze(1)
    return x.logsumexp(1)
