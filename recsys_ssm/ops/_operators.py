"""Check the arguments of operators, and register operators with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from recsys_ssm.errors import UserError
from recsys_ssm.ops._vmap import register_vmap

__all__ = [
    "INTEGERS",
    "KernelFunction",
    "check_tensors",
    "empty_like",
    "kernels_differentiate",
    "register_operator",
    "state_dtype",
]

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


class KernelFunction(_SingleLevelFunction):
    """Base of the autograd Functions that run under an operator's Autograd key.

    ``torch.autograd.Function`` refuses to run inside ``torch.func.grad``. There the dispatcher calls the Autograd key
    once for each transform, and a Function of a single level is right. PyTorch's own rule for Functions does the same.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        arguments = unwrap_dead_wrappers(arguments)
        if not torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)  # type: ignore[misc]
        with enable_single_level_autograd_function():
            return super().apply(*arguments)  # type: ignore[misc]


class _Once(KernelFunction):
    """Call a backward operator whose gradients cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, operator: Any, remedy: str, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.message = f"{operator.name()}: only first derivatives; {remedy}"
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(operator(*arguments))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)


def kernels_differentiate() -> bool:
    """Return True if reverse-mode first derivatives are enough, as far as can be seen.

    Forward mode (``torch.func.jvp``, ``jacfwd``) and nested transforms (``hessian``) need plain PyTorch.
    """
    if forward_ad._current_level >= 0:
        return False
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return True
    kinds = torch._C._functorch.TransformType
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() != kinds.Vmap for level in levels) < 2


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def register_operator(
    name: str,
    library: torch.library.Library,
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    differentiable: Callable[..., Any],
    device: str = "CPU",
    remedy: str = "pass float64 tensors or set RECSYS_SSM_NO_KERNELS=1 to differentiate plain PyTorch",
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
        device: Dispatch key of ``forward`` and ``backward``.
        remedy: Advice in the error where the operator has no derivative.
    """
    operator = getattr(torch.ops.recsys_ssm, name).default
    backward_operator = getattr(torch.ops.recsys_ssm, f"{name}_backward").default

    def rule(operator: Any, differentiable: Callable[..., Any]) -> Callable[..., Any]:
        def autograd(*arguments: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
                raise RuntimeError(f"{operator.name()}: no forward-mode derivative; {remedy}")
            if torch.is_grad_enabled() and any(
                isinstance(x, Tensor) and x.requires_grad for x in arguments
            ):
                return differentiable(*arguments)
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)

        return autograd

    def once(*arguments: Any) -> list[Tensor]:
        return list(_Once.apply(backward_operator, remedy, *arguments))

    library.impl(name, forward, device)
    library.impl(name, rule(operator, differentiable), "Autograd")
    library.impl(f"{name}_backward", backward, device)
    library.impl(f"{name}_backward", rule(backward_operator, once), "Autograd")
    for each, fake in ((name, forward_fake), (f"{name}_backward", backward_fake)):
        torch.library.register_fake(f"recsys_ssm::{each}", fake, lib=library)
        register_vmap(f"recsys_ssm::{each}", library)
