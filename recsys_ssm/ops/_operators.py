"""Check the arguments of operators, and register operators with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops._vmap import register_vmap

__all__ = ["INTEGERS", "check_tensors", "empty_like", "register_operator", "state_dtype"]

INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})
"""Dtypes of ``seq_idx``."""


def check_tensors(
    operator: str,
    anchors: Iterable[str],
    expected: Iterable[tuple[str, Tensor | None, tuple[int, ...]]],
) -> None:
    """Check shapes, dtypes and devices of an operator's tensors.

    Args:
        operator: The operator's name, for the message.
        anchors: Names of the tensors that the expected shapes come from. All tensors are on the first one's device.
        expected: Name, tensor and shape of each argument; arguments that are None are left out.

    Raises:
        UserError: A shape, dtype or device is wrong; the message names the argument.
    """
    given = [(name, tensor, shape) for name, tensor, shape in expected if tensor is not None]
    tensors = {name: tensor for name, tensor, _ in given}
    first, second = anchors
    for name, tensor, shape in given:
        if tensor.shape != shape:
            raise UserError(
                f"{operator}: {name} must have shape {shape} ({first} is {tuple(tensors[first].shape)}, "
                f"{second} {tuple(tensors[second].shape)}), got {tuple(tensor.shape)}"
            )
        if name == "seq_idx":
            if tensor.dtype not in INTEGERS:
                raise UserError(f"{operator}: seq_idx must be an integer, got {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise UserError(f"{operator}: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != tensors[first].device:
            raise UserError(
                f"{operator}: {name} is on {tensor.device} but {first} on {tensors[first].device}; "
                "move them to one device"
            )


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if any tensor has it, else float32: states are never kept in half precision."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def empty_like(x: Tensor) -> Tensor:
    """Allocate a dense tensor like ``x``, whatever the strides of ``x``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def register_operator(
    name: str,
    library: torch.library.Library,
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    differentiable: Callable[..., Any],
) -> None:
    """Register the operators ``name`` and ``name_backward``, both defined in ``library`` already.

    torch.compile and torch.export see one node for each. Autograd is a Function of our own under the first operator's
    Autograd key. torch.library.register_autograd does the same, but costs several times as much for each call, and
    FT-Mamba makes eight short calls a step.

    Args:
        name: Name within the namespace ``recsys_ssm``.
        library: The library that defines the operators.
        forward: CPU implementation.
        backward: CPU implementation of the backward operator.
        forward_fake: Allocates the outputs of ``forward``.
        backward_fake: Allocates the outputs of ``backward``.
        differentiable: Calls the autograd Function with the arguments of the operator.
    """
    operator = getattr(torch.ops.recsys_ssm, name).default

    def autograd(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in arguments
        ):
            return differentiable(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    library.impl(name, forward, "CPU")
    library.impl(name, autograd, "Autograd")
    library.impl(f"{name}_backward", backward, "CPU")
    for each, fake in ((name, forward_fake), (f"{name}_backward", backward_fake)):
        torch.library.register_fake(f"recsys_ssm::{each}", fake, lib=library)
        register_vmap(f"recsys_ssm::{each}", library)
