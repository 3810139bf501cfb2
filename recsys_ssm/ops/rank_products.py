"""Find the items with the largest inner products for each user, exactly, over the whole catalogue.

    top(u) = the first k of the items i, ordered by  -query(u)·items(i),  then by i

Legend: U users, I items, D the length of their vectors, k places, n pairs of a user and an item not to recommend.

The scores of the whole catalogue, (U, I), are never in memory at once: writing them and reading them again takes longer
than the matrix product that makes them.

There are two paths: :func:`_reference`, plain PyTorch for any device and dtype, which takes some users at a time; and a
C++ kernel for float32 and bfloat16 on the CPU, which ranks a product while it is in a register. The kernel multiplies
bfloat16 vectors in float32.
"""

from __future__ import annotations

import math
from array import array

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
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
    """Rank ``query @ items.T`` like :func:`~recsys_ssm.metrics.rank_top_k`, with and without the excluded items.

    Args:
        query: (U, D).
        items: (I, D).
        k: Places, at least 1; may be more than I.
        exclude: Users (n,) and items (n,), int64, in any order: items not to recommend to these users. None excludes
            nothing.
        everything: If True, also rank all items.

    Returns:
        (U, k) int64 over all items (None unless ``everything``), and (U, k) without the excluded items. Without
        ``exclude`` both are the same. The best item comes first. Of equal scores, the lower index comes first. -1 means
        that no item is left.

    Raises:
        UserError: Shapes, ``k`` or pairs are wrong, or a score is NaN because the model has diverged.
    """
    if query.dim() != 2 or items.dim() != 2 or query.shape[1] != items.shape[1]:
        raise UserError(
            f"query {tuple(query.shape)} and items {tuple(items.shape)} must be (U, D) and (I, D)"
        )
    if query.is_complex() or items.is_complex() or query.device != items.device:
        raise UserError(
            f"rank_products: query is {query.dtype} on {query.device}, items {items.dtype} on {items.device}; "
            "pass real numbers on one device"
        )
    if query.dtype != items.dtype:
        wide = torch.promote_types(query.dtype, items.dtype)
        query, items = query.to(wide), items.to(wide)
    if not len(items):
        raise UserError("items is empty; pass at least one item to rank")
    if k < 1:
        raise UserError(f"k must be at least 1, got {k}")
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
    """Sort the pairs by user and item. Return them, (n,) and (n,), and where each user's begin, (U + 1,)."""
    if user.dim() != 1 or user.shape != item.shape:
        raise UserError(
            f"exclude must be equal numbers of users and items, got {tuple(user.shape)} and {tuple(item.shape)}"
        )
    if user.numel():
        (u0, u1), (i0, i1) = (x.aminmax() for x in (user, item))
        if min(int(u0), int(i0)) < 0 or int(u1) >= n_users or int(i1) >= n_items:
            raise UserError(
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
        # A score of -inf must not look like an excluded item.
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
    # RankProductsArgs of csrc/rank_products.cpp, all 8-byte integers.
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
    """Return ``t`` in float32 with adjacent elements, as the kernel reads them."""
    t = t.float()
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()
