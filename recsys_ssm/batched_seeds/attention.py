"""Run PyTorch's CPU attention under :func:`torch.vmap` as one call.

PyTorch has ``vmap`` rules for its CUDA attention but not for the CPU operator, which it would call once a seed, with a
warning. :func:`register_attention_rule` adds the missing rule for the whole process, so only :class:`Seeds` calls it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call_vmap_helper
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter

_OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"


def has_attention_rule() -> bool:
    """Return True if the CPU attention has a ``vmap`` rule."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_OPERATOR}", "FuncTorchBatched")


@functools.cache
def register_attention_rule() -> torch.library.Library | None:
    """Register the rule, once, unless PyTorch has its own; the library returned keeps it alive."""
    if has_attention_rule():
        return None
    library = torch.library.Library("aten", "IMPL")
    library.impl(_OPERATOR, _batched_attention, "FuncTorchBatched", with_keyset=True)
    return library


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )


def _attention_rule(
    info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Join the calls' batches into one: the rows of a batch are independent."""
    n_calls = info.batch_size

    def in_front(x: Tensor, dim: int | None) -> Tensor:
        return x.movedim(dim, 0) if dim is not None else x.expand(n_calls, *x.shape)

    query, key, value, mask, *options = arguments
    query, key, value = (
        in_front(x, dim) for x, dim in zip((query, key, value), in_dims, strict=False)
    )
    n_rows = query.shape[1]
    if mask is not None and (in_dims[3] is not None or mask.dim() > 2):
        mask = in_front(mask, in_dims[3])
        while mask.dim() < 5:  # (calls, L, L) to (calls, B, H, L, L)
            mask = mask.unsqueeze(1)
        mask = mask.expand(n_calls, n_rows, *mask.shape[2:]).flatten(0, 1)
    y, logsumexp = _attention(
        query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), mask, *options
    )
    rows = (n_calls, n_rows)
    return (y.unflatten(0, rows), logsumexp.unflatten(0, rows)), (0, 0)


def _batched_attention(
    _keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    return custom_function_call_vmap_helper(
        cast(VmapInterpreter, retrieve_current_functorch_interpreter()),
        _attention_rule,
        _attention,
        *(query, key, value, attn_mask, dropout_p, is_causal, scale),
    )
