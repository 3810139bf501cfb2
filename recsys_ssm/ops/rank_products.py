"""The items of the largest inner products with each user, exact, over the whole catalogue.

    top(u) = the k first of the items i, ordered by  -query(u)·items(i),  then by i

Legend: U users, I items, D their vectors' size, k places, n pairs of a user and an item not to recommend.

All scores of a catalogue, (U, I), are never in memory at once: making them is a product of matrices, but writing them
to memory and reading them again takes longer than that.

Two paths: :func:`_reference`, plain PyTorch for any device and dtype, some users at a time; a C++ kernel for float32
and bfloat16 on CPU, which ranks a product while it is in a register and computes bfloat16's in float32.
"""

from __future__ import annotations

import math
from array import array

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.metrics import diverged, rank_top_k, user_blocks
from recsys_ssm.ops._dispatch import Operator

__all__ = ["rank_products"]

_OPERATOR = Operator("rank_products", kernels=("recsys_rank_products",))
_NAN = -2  # kNan of csrc/rank_products.cpp


@torch.no_grad()
def rank_products(
    query: Tensor,
    items: Tensor,
    k: int,
    exclude: tuple[Tensor, Tensor] | None = None,
    *,
    everything: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """:func:`~recsys_ssm.metrics.rank_top_k` of ``query @ items.T``, of all items and without the excluded ones.

    Args:
        query: (U, D).
        items: (I, D).
        k: places, at least 1; may be more than I.
        exclude: users (n,) and items (n,), int64, in any order: items not to recommend to them; None: nothing is
            excluded.
        everything: whether the ranking of all items is wanted beside the other.

    Returns:
        (U, k) int64 of all items (None if not wanted), and (U, k) without the excluded ones (the same if nothing is).
        Best first; of equal scores the item with the lower index; -1 where no item is left.

    Raises:
        UserError: a score that takes part is NaN, which means that the model has diverged.
        ValueError: wrong shapes, k, or pairs.
    """
    if query.dim() != 2 or items.dim() != 2 or query.shape[1] != items.shape[1]:
        raise ValueError(
            f"query {tuple(query.shape)} and items {tuple(items.shape)} must be (U, D) and (I, D)"
        )
    if not len(items):
        raise ValueError("there are no items to rank")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    pairs = None if exclude is None else _by_user(*exclude, len(query), len(items))
    rank = _kernel if _OPERATOR.takes(query, items) else _reference
    whole, without = rank(query, items, k, pairs, everything or pairs is None)
    if without is None:
        assert whole is not None
        return whole, whole
    return whole, without


def _by_user(
    user: Tensor, item: Tensor, n_users: int, n_items: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs ordered by user and item, and where each user's begin: (n,), (n,), (U + 1,)."""
    if user.dim() != 1 or user.shape != item.shape:
        raise ValueError(
            f"exclude must be users and as many items, got {tuple(user.shape)} and {tuple(item.shape)}"
        )
    if user.numel():
        (u0, u1), (i0, i1) = (x.aminmax() for x in (user, item))
        if min(int(u0), int(i0)) < 0 or int(u1) >= n_users or int(i1) >= n_items:
            raise ValueError(
                f"exclude names user {int(u1)} and item {int(i1)} (from {int(u0)} and {int(i0)}), "
                f"of {n_users} users and {n_items} items"
            )
    key = (user * n_items + item).sort().values
    user, item = key // n_items, key % n_items
    starts = torch.searchsorted(user, torch.arange(n_users + 1, device=user.device))
    return user, item, starts


def _reference(
    query: Tensor,
    items: Tensor,
    k: int,
    pairs: tuple[Tensor, Tensor, Tensor] | None,
    everything: bool,
) -> tuple[Tensor | None, Tensor | None]:
    whole, without = [], []
    for start, block in user_blocks(query, len(items)):
        scores = block @ items.T
        if everything:
            whole.append(rank_top_k(scores, k))
        if pairs is None:
            continue
        user, item, starts = pairs
        here = slice(int(starts[start]), int(starts[start + len(block)]))
        # Not excluded and -inf must stay apart, as rank_top_k has it.
        scores.clamp_(min=torch.finfo(scores.dtype).min)
        scores[user[here] - start, item[here]] = -math.inf
        top = rank_top_k(scores, min(k, len(items)))
        top = top.masked_fill(scores.gather(1, top) == -math.inf, -1)
        without.append(F.pad(top, (0, k - top.shape[1]), value=-1))
    return torch.cat(whole) if whole else None, torch.cat(without) if without else None


def _kernel(
    query: Tensor,
    items: Tensor,
    k: int,
    pairs: tuple[Tensor, Tensor, Tensor] | None,
    everything: bool,
) -> tuple[Tensor | None, Tensor | None]:
    query, items = _rows(query), _rows(items)
    whole, without = (
        torch.full((len(query), k), -1) if wanted else None
        for wanted in (everything, pairs is not None)
    )
    if not len(query):
        return whole, without
    excluded = None if pairs is None else pairs[1]
    starts = None if pairs is None else pairs[2]
    # RankProductsArgs of csrc/rank_products.cpp: 8-byte integers all.
    values = [
        torch.get_num_threads(), len(query), len(items), query.shape[1], k, query.stride(0),
        items.stride(0), query.data_ptr(), items.data_ptr(),
        *(0 if x is None else x.data_ptr() for x in (starts, excluded, whole, without)),
    ]  # fmt: skip
    block = array("q", [8 * (len(values) + 1), *values])
    assert _OPERATOR.functions is not None
    _OPERATOR.functions[0](block.buffer_info()[0])
    for found in (whole, without):
        if found is not None and (bad := (found[:, 0] == _NAN).nonzero()).numel():
            raise diverged(int(bad[0, 0]))
    return whole, without


def _rows(t: Tensor) -> Tensor:
    """float32 with adjacent elements, as the kernel reads them."""
    t = t.float()
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()
