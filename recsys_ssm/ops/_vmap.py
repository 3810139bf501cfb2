"""Operators under :func:`torch.vmap`: many independent calls as one.

A model trained for several seeds at once calls each operator once a step, with parameters that differ from seed to
seed. So the operators' C++ kernels take tensors with further dimensions in front, one call for each index there, and
the rule registered here brings whatever ``vmap`` batches to the front. Autograd is the operator's own either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call_vmap_helper
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_current_functorch_interpreter,
)

__all__ = ["each_call", "is_batched", "register_vmap"]


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` is one of many calls' under ``torch.vmap``; what knows no vmap must not be given it."""
    return torch._C._functorch.is_batchedtensor(x)


def each_call(
    n_dims: int, main: int, outputs: Sequence[Tensor], arguments: Sequence[Any]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Any]]]:
    """The calls that the operands of one operator call stand for, each as views of its part.

    Args:
        n_dims: Dimensions ``arguments[main]`` has in a single call; more stand in front, of all tensors alike.
        main: A tensor that is always given.
        outputs: Allocated already; to be written to.
        arguments: Tensors, and what is the same for every call.

    Yields:
        Outputs and arguments of a single call.
    """
    if arguments[main].dim() == n_dims:
        yield outputs, arguments
        return
    n_calls = arguments[main].shape[0]
    parts = [x.unbind(0) if isinstance(x, Tensor) else (x,) * n_calls for x in arguments]
    results = [x.unbind(0) for x in outputs]
    for one, found in zip(zip(*parts, strict=True), zip(*results, strict=True), strict=True):
        yield from each_call(n_dims, main, found, one)


def register_vmap(name: str, library: torch.library.Library) -> None:
    """Give an operator whose kernel goes by :func:`each_call` its rule for ``vmap``: what is batched comes first."""
    operator = torch._library.utils.lookup_op(name)
    torch.library.register_vmap(name, _rule(operator), lib=library)


def _rule(operator: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
        stacked = [
            x
            if not isinstance(x, Tensor)
            else x.movedim(dim, 0)
            if dim is not None
            else x.expand(info.batch_size, *x.shape)
            for x, dim in zip(arguments, in_dims, strict=True)
        ]
        results = operator(*stacked)
        return (results, 0) if isinstance(results, Tensor) else (results, [0] * len(results))

    return rule


# --- attention on the CPU ------------------------------------------------------------------------
#
# PyTorch has rules for its CUDA attention and none for this one: it would be called once a seed, with a warning.


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
    """The calls' batches become one: it is one of independent rows anyway."""
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


_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_LIBRARY = torch.library.Library("aten", "IMPL")
if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_ATTENTION}", "FuncTorchBatched"):
    _LIBRARY.impl(_ATTENTION, _batched_attention, "FuncTorchBatched", with_keyset=True)
