"""Run the operators under :func:`torch.vmap`: many independent calls as one.

A model that is trained for several seeds at once calls each operator once a step, with parameters that differ between
seeds. So the C++ kernels take tensors with more dimensions in front, one call for each index there. The rule that
:func:`register_vmap` adds moves the batched dimension to the front. Autograd is the operator's own in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["each_call", "in_transform", "is_batched", "register_vmap"]


def is_batched(x: Tensor) -> bool:
    """Return True for tensors under ``torch.vmap``. Do not pass such tensors to code without vmap support."""
    return torch._C._functorch.is_batchedtensor(x)


def in_transform(x: Tensor) -> bool:
    """Return True under ``torch.vmap`` or ``torch.func``, also where a transform hides the batch of ``x``."""
    if torch.compiler.is_compiling():
        return is_batched(x)
    return torch._C._are_functorch_transforms_active()


def each_call(
    n_dims: int, main: int, outputs: Sequence[Tensor], arguments: Sequence[Any]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Any]]]:
    """Split the operands of a batched operator call into views, one set for each single call.

    Args:
        n_dims: Number of dimensions of ``arguments[main]`` in a single call. All tensors have the same further
            dimensions in front.
        main: Position of a tensor that is always passed.
        outputs: Allocated tensors to write to.
        arguments: Tensors, and values that all calls share.

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
    """Register the ``vmap`` rule of an operator whose kernel uses :func:`each_call`: move the batch to the front."""
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
