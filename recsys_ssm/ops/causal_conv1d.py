"""Depthwise convolution along time, short and causal, as in every Mamba block.

    y[t] = act(bias + sum_k weight[W-1-k] * x[t-k]),   k = 0 … W-1

for each channel, over the positions t-k of the same sequence as t.

Shape legend: B batch, L length, E channels, W filter width.

The layout is (batch, length, channel) throughout, so that a chunk of a linear layer's output needs no copy. ``weight``
is the (E, W) view of ``nn.Conv1d(groups=E).weight``; its last column belongs to the current position.

``seq_idx`` (B, L) marks sequences packed into a row: equal neighbours belong together, and -1 is padding, on either
side or in between. A sequence does not see the others. Padding contributes nothing, and its output is 0.

Four paths give the same result: :func:`_reference`, plain PyTorch for any device and dtype; a C++ kernel for float32
and bfloat16 on the CPU; and for CUDA tensors Triton kernels and, when it is installed, the kernel of the package
``causal_conv1d``.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops._choice import choose
from recsys_ssm.ops._dispatch import Operator
from recsys_ssm.ops._operators import (
    KernelFunction,
    check_tensors,
    kernels_differentiate,
    register_operator,
)
from recsys_ssm.ops._vmap import each_call, is_batched
from recsys_ssm.ops.sequences import starts_of

__all__ = ["causal_conv1d", "causal_conv1d_step", "same_conv1d"]

Activation = Literal["silu"] | None

_OPERATOR = Operator(
    "causal_conv1d",
    kernels=("recsys_causal_conv1d_forward", "recsys_causal_conv1d_backward"),
    cuda="causal_conv1d:causal_conv1d_fn",
    triton="recsys_ssm.ops.triton.causal_conv1d:OPERATOR",
)


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own causal filter, optionally followed by SiLU.

    Args:
        x: (B, L, E), floating point.
        weight: (E, W).
        bias: (E,).
        activation: ``"silu"`` or None.
        seq_idx: (B, L) integers, see the head of this file.
        initial_state: (B, E, W-1), the inputs just before the row, oldest first. The row's first sequence continues
            from them.
        return_final_state: If True, also return (B, E, W-1), the ``initial_state`` for a continuation of the row's
            last sequence. A row of padding alone returns its own ``initial_state``.

    Returns:
        y (B, L, E) in x's dtype, or (y, final_state). Both are differentiable.

    Raises:
        UserError: Shapes do not fit together, the activation is unknown, a dtype is not floating point (``seq_idx``:
            not an integer), or tensors are on different devices. The message names the argument.
    """
    _check(x, weight, bias, activation, seq_idx, initial_state)
    y = _convolve(x, weight, bias, activation, seq_idx, initial_state, 0)
    if not return_final_state:
        return y
    return y, _final_state(x, weight.shape[1], seq_idx, initial_state)


def same_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Convolve with a filter centred on each position (Hydra's): ``W//2`` positions back, the rest ahead.

    For odd W this is ``nn.Conv1d(padding=W//2)``; for even W it is the first L of that layer's L+1 outputs. Arguments,
    result and errors are those of :func:`causal_conv1d`.
    """
    _check(x, weight, bias, activation, seq_idx, None)
    return _convolve(x, weight, bias, activation, seq_idx, None, (weight.shape[1] - 1) // 2)


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = None,
) -> tuple[Tensor, Tensor]:
    """Run :func:`causal_conv1d` on one position: x (B, E), state (B, E, W-1) to (y (B, E), new state).

    Start with a state of zeros. ``state`` is not written to.
    """
    _check(x[:, None], weight, bias, activation, None, state)
    window_BEW = torch.cat([state, x[..., None].to(state.dtype)], dim=-1)
    acc = _acc_dtype(x, weight)
    y_BE = (window_BEW.to(acc) * weight.to(acc)).sum(-1)
    if bias is not None:
        y_BE = y_BE + bias.to(acc)
    if activation == "silu":
        y_BE = F.silu(y_BE)
    return y_BE.to(x.dtype), window_BEW[..., 1:]


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    ahead: int,
) -> Tensor:
    """Choose the path. Takes the arguments of :func:`_reference`."""
    floats = [t for t in (x, weight, bias, initial_state) if t is not None]
    if _OPERATOR.takes(*floats) and kernels_differentiate():
        return torch.ops.recsys_ssm.causal_conv1d.default(
            x, weight, bias, seq_idx, initial_state, activation == "silu", ahead
        )
    public = (
        seq_idx is None
        and initial_state is None
        and ahead == 0
        and 2 <= weight.shape[1] <= 4  # the widths of that kernel
        and not is_batched(x)
    )
    paths = _OPERATOR.gpu_paths(*floats, public=public)
    if paths and kernels_differentiate():
        arguments = {
            "x": x, "weight": weight, "bias": bias, "seq_idx": seq_idx,
            "initial_state": initial_state, "activation": activation, "ahead": ahead,
        }  # fmt: skip
        return _on_gpu(choose("causal_conv1d", paths, _on_gpu, arguments), arguments)
    return _reference(x, weight, bias, activation, seq_idx, initial_state, ahead)


def _on_gpu(path: str, arguments: Mapping[str, Any]) -> Tensor:
    """Run the Triton kernel or the public one."""
    x, weight, bias, seq_idx, initial_state, activation, ahead = arguments.values()
    if path == "triton":
        return torch.ops.recsys_ssm.triton_causal_conv1d.default(
            x, weight, bias, seq_idx, initial_state, activation == "silu", ahead
        )
    assert _OPERATOR.cuda_function is not None
    y_BEL = _OPERATOR.cuda_function(x.transpose(1, 2), weight, bias, activation=activation)
    return y_BEL.transpose(1, 2)


def _acc_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of sums: at least float32."""
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _neighbours(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Count the positions of the same sequence before and after each one: two (B, L) int64."""
    L = seq_idx.shape[1]
    t_L = torch.arange(L, device=seq_idx.device)
    new = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))  # padding of a bool is False
    start_BL = torch.cummax(torch.where(new, t_L, 0), dim=1).values
    last = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1))
    end_BL = torch.where(last, t_L, L - 1).flip(1).cummin(dim=1).values.flip(1)
    return t_L - start_BL, end_BL - t_L


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    ahead: int,
) -> Tensor:
    """Add W shifted products, on any device and in any dtype; ``ahead`` of the W taps look into the future.

    On a CPU this is faster than ``F.conv1d`` at width 16 and as fast at width 4 (forward and backward).
    """
    (B, L, E), W = x.shape, weight.shape[1]
    acc = _acc_dtype(x, weight)
    back = W - 1 - ahead
    if seq_idx is not None:
        # Not even a NaN at padding reaches a gradient.
        valid_BL1 = (seq_idx >= 0)[..., None]
        x = x.where(valid_BL1, 0)
    # With packed sequences the state does not stand before row position 0. It is added below.
    before = x.new_zeros(B, back, E)
    if initial_state is not None and seq_idx is None:
        before = initial_state.transpose(1, 2).to(x.dtype)
    padded = torch.cat([before, x, x.new_zeros(B, ahead, E)], dim=1).to(acc)
    taps_WE = weight.to(acc).t().contiguous()
    y = torch.zeros_like(padded[:, :L]) if bias is None else bias.to(acc).expand(B, L, E)
    if seq_idx is not None:
        behind_BL, after_BL = _neighbours(seq_idx)
    for j in range(W):
        x_j = padded[:, j : j + L]
        if seq_idx is not None and j != back:
            seen = behind_BL >= back - j if j < back else after_BL >= j - back
            x_j = x_j.where(seen[..., None], 0)
        y = torch.addcmul(y, x_j, taps_WE[j])
    if seq_idx is not None and initial_state is not None and back > 0:
        # The part that the state adds to the first W-1 positions after it.
        from_state = _reference(
            x.new_zeros(B, back, E, dtype=acc),
            weight,
            None,
            None,
            None,
            initial_state.to(acc),
            0,
        )
        reached = _first_sequence(seq_idx) & (behind_BL < back)
        at = behind_BL.clamp(max=back - 1)[..., None].expand(B, L, E)
        y = y + from_state.gather(1, at).where(reached[..., None], 0)
    if activation == "silu":
        y = F.silu(y)
    if seq_idx is not None:
        y = y.where(valid_BL1, 0)
    return y.to(x.dtype)


# --- the C++ kernel ------------------------------------------------------------------------------


_LIBRARY = torch.library.Library("recsys_ssm", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_state, "
    "bool silu, int ahead"
)
_LIBRARY.define(f"causal_conv1d({_INPUTS}) -> Tensor")
# Returns the gradients of the floating-point inputs that are passed, in their order.
_LIBRARY.define(f"causal_conv1d_backward(Tensor dy, {_INPUTS}) -> Tensor[]")


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    """Allocate the output of the forward operator."""
    return x.new_empty(x.shape)


def _backward_fake(_dy: Tensor, *inputs: Any) -> list[Tensor]:
    """Allocate the outputs of the backward operator."""
    x, weight, bias, _, initial_state, *_ = inputs
    return [t.new_empty(t.shape) for t in (x, weight, bias, initial_state) if t is not None]


def _forward_cpu(*inputs: Any) -> Tensor:
    y = _forward_fake(*inputs)
    for (y_one,), one in each_call(3, 0, (y,), inputs):
        _call(0, one, (0, 0), y_one.data_ptr())
    return y


def _backward_cpu(*arguments: Any) -> list[Tensor]:
    gradients = _backward_fake(*arguments)
    for found, one in each_call(3, 1, gradients, arguments):
        _backward_into(found, *one)
    return gradients


def _backward_into(gradients: Sequence[Tensor], dy: Tensor, *inputs: Any) -> None:
    x, weight, bias, _, state, *_ = inputs
    dy = _rows(dy if dy.dtype == x.dtype else dy.to(x.dtype))
    left = iter(gradients)
    dx = next(left)
    own = [None if t is None else next(left) for t in (weight, bias, state)]
    # The kernel adds up in float32.
    found = [t if t is None or t.dtype == torch.float32 else t.float() for t in own]
    at = [0 if t is None else t.data_ptr() for t in found]
    _call(1, inputs, dy.stride()[:2], 0, dy.data_ptr(), dx.data_ptr(), *at)
    for mine, computed in zip(own, found, strict=True):
        if mine is not None and computed is not None and mine is not computed:
            mine.copy_(computed)


def differentiable(name: str) -> Any:
    """Return the function of an operator with this module's schemas, with the gradients of ``name_backward``."""
    run = getattr(torch.ops.recsys_ssm, name).default
    run_backward = getattr(torch.ops.recsys_ssm, f"{name}_backward").default

    class Convolution(KernelFunction):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                y = run(*inputs)
            *tensors, ctx.silu, ctx.ahead = inputs
            ctx.save_for_backward(*tensors)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, weight, bias, seq_idx, state = ctx.saved_tensors
            found = run_backward(dy, x, weight, bias, seq_idx, state, ctx.silu, ctx.ahead)
            left = iter(found)
            dx, dweight = next(left), next(left)
            dbias = None if bias is None else next(left)
            dstate = None if state is None else next(left)
            return dx, dweight, dbias, None, dstate, None, None

    return Convolution.apply


register_operator(
    "causal_conv1d",
    _LIBRARY,
    forward=_forward_cpu,
    backward=_backward_cpu,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    differentiable=differentiable("causal_conv1d"),
)


def _rows(t: Tensor) -> Tensor:
    """Return ``t`` with adjacent channels, as the kernel reads them."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _call(which: int, inputs: Sequence[Any], dy_strides: Sequence[int], *results: int) -> None:
    """Call a C function with the ``CausalConv1dArgs`` of csrc/causal_conv1d.cpp, all 8-byte integers.

    The arguments are a plain array, because filling a ctypes structure by name takes longer than a short convolution.
    """
    x, weight, bias, seq_idx, state, silu, ahead = inputs
    x = _rows(x)
    # Keeps the tensors alive until the kernel is done.
    dense = [
        None if t is None else (t if t.dtype == dtype else t.to(dtype)).contiguous()
        for t, dtype in (
            (weight, torch.float32), (bias, torch.float32), (seq_idx, torch.int64),
            (state, torch.float32),
        )
    ]  # fmt: skip
    batch, time, _ = x.stride()
    values = [
        8 * _ARGUMENTS, torch.get_num_threads(), *x.shape, weight.shape[1], ahead,
        x.dtype == torch.bfloat16, silu, batch, time, *dy_strides, x.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in dense), *results,
    ]  # fmt: skip
    block = array("q", values)
    block.extend([0] * (_ARGUMENTS - len(block)))
    assert _OPERATOR.functions is not None
    _OPERATOR.functions[which](block.buffer_info()[0])


_ARGUMENTS = 24


def _first_sequence(seq_idx: Tensor) -> Tensor:
    """Mark (B, L) the positions of each row's first sequence."""
    return (seq_idx >= 0) & (starts_of(seq_idx).cumsum(1) == 1)


def _final_state(x: Tensor, W: int, seq_idx: Tensor | None, initial_state: Tensor | None) -> Tensor:
    """Return the last W-1 inputs of each row's last sequence, (B, E, W-1)."""
    B, L, E = x.shape
    state = x.new_zeros(B, E, W - 1) if initial_state is None else initial_state
    extended = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)  # (B, W-1+L, E)
    if seq_idx is None:
        return extended[:, L:].transpose(1, 2)
    if L == 0:
        return state.to(x.dtype)
    valid = seq_idx >= 0
    behind_BL, _ = _neighbours(seq_idx)
    t_L = torch.arange(L, device=x.device)
    last_B1 = torch.where(valid, t_L, -1).amax(1, keepdim=True)
    at_B1 = last_B1.clamp(min=0)
    # The length of the last sequence; 0 for a row without one (last_B1 is -1).
    length_B1 = torch.where(last_B1 >= 0, behind_BL.gather(1, at_B1) + 1, 0)
    from_state = (last_B1 < 0) | _first_sequence(seq_idx).gather(1, at_B1)
    back_BW = torch.arange(W - 2, -1, -1, device=x.device).expand(B, W - 1)  # steps before the last
    own = back_BW < length_B1
    in_x = (W - 1) + last_B1 - back_BW
    in_state = (W - 2) - (back_BW - length_B1)
    index = torch.where(own, in_x, in_state)
    window = extended.gather(1, index[..., None].expand(B, W - 1, E))
    return window.where((own | from_state)[..., None], 0).transpose(1, 2)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] == 0:
        raise UserError(
            "causal_conv1d: x must be (B, L, E) and weight (E, W) with W at least 1, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if activation not in (None, "silu"):
        raise UserError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    (batch, length, channels), width = x.shape, weight.shape[1]
    check_tensors(
        "causal_conv1d",
        ("x", "weight"),
        (
            ("x", x, (batch, length, channels)),
            ("weight", weight, (channels, width)),
            ("bias", bias, (channels,)),
            ("seq_idx", seq_idx, (batch, length)),
            ("initial_state", initial_state, (batch, channels, width - 1)),
        ),
    )
