"""Selective scan: the recurrence of Mamba (Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling with Selective State
Spaces", arXiv:2312.00752, algorithm 2 and equation 2a).

For every channel e and state n, with a step size Δ that depends on the input::

    h_t[e, n] = exp(Δ_t[e] · A[e, n]) · h_{t-1}[e, n] + Δ_t[e] · B_t[n] · u_t[e]
    y_t[e]    = Σ_n C_t[n] · h_t[e, n] + D[e] · u_t[e]

Several paths give the same result, and :func:`selective_scan` chooses. :func:`selective_scan_reference` reads like the
formula; the tests hold the other paths against it, in float64. :func:`_scan_loop` is the fastest plain PyTorch we know,
for any device and dtype. A C++ kernel serves float32 and bfloat16 on the CPU. Triton kernels serve CUDA tensors, and so
does ``mamba_ssm``'s CUDA kernel when it is installed.

Legend of shape suffixes: B batch, L length, E channels (``d_inner``), N states (``d_state``).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops._choice import choose
from recsys_ssm.ops._dispatch import Operator, is_exporting
from recsys_ssm.ops._operators import (
    INTEGERS,
    KernelFunction,
    check_tensors,
    empty_like,
    kernels_differentiate,
    register_operator,
    state_dtype,
)
from recsys_ssm.ops._vmap import each_call, is_batched
from recsys_ssm.ops.sequences import starts_of

__all__ = ["selective_scan", "selective_scan_reference", "selective_scan_step"]

# u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state
_Inputs: TypeAlias = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool,
    Tensor | None, Tensor | None,
]  # fmt: skip

_NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "seq_idx", "initial_state")

_OPERATOR = Operator(
    "selective_scan",
    kernels=("recsys_selective_scan_forward", "recsys_selective_scan_backward"),
    cuda="mamba_ssm.ops.selective_scan_interface:selective_scan_fn",
    triton="recsys_ssm.ops.triton.selective_scan:OPERATOR",
)


@overload
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan over whole sequences, by the fastest path available.

    Args:
        u: Input, (B, L, E). Like ``dt``, ``B``, ``C`` and ``z`` it may be a strided view.
        dt: Step size Δ, (B, L, E), before ``dt_bias`` and softplus.
        A: Decay rate, (E, N); negative for a stable recurrence.
        B: Input matrix, (B, L, N).
        C: Output matrix, (B, L, N).
        D: Skip weight, (E), or None.
        z: Gate, (B, L, E): the output is multiplied by ``silu(z)``, after the skip.
        dt_bias: Term added to ``dt`` before the softplus, (E).
        dt_softplus: If True, Δ = softplus(dt + dt_bias), else dt + dt_bias.
        seq_idx: number of the sequence at each position, (B, L), any integer dtype. Equal neighbours are one sequence.
            The state is set to 0 where another sequence begins, so sequences packed into one row do not see each
            other. -1 is padding, at any position: its output is 0, it has no gradient, and it ends a sequence.
        initial_state: State before the row's first sequence, (B, E, N).
        return_final_state: If True, also return the state after the row's last valid position.

    Returns:
        y (B, L, E) in ``u``'s dtype; with ``return_final_state`` also the state (B, E, N), in float32 (float64 if an
        input is). Both are differentiable in every floating-point argument.

    Raises:
        UserError: Shapes do not fit together, a dtype is not floating point (``seq_idx``: not an integer), or tensors
            are on different devices. The message names the argument.
    """
    inputs = (u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state)
    if _fit(inputs) and _OPERATOR.takes(*_floats(inputs)) and kernels_differentiate():
        outputs = _scan_kernel(inputs, return_final_state)
        return (outputs[0], outputs[1]) if return_final_state else outputs[0]
    _check(u, dt, A, B, C, D, z, dt_bias, seq_idx, initial_state)
    public = seq_idx is None and initial_state is None and not is_batched(u)
    paths = () if 0 in A.shape else _OPERATOR.gpu_paths(*_floats(inputs), public=public)
    if paths and kernels_differentiate():
        arguments = {
            **dict(zip(_NAMES, inputs, strict=True)),
            "return_final_state": return_final_state,
        }
        outputs = _on_gpu(choose("selective_scan", paths, _on_gpu, arguments), arguments)
        return (outputs[0], outputs[1]) if return_final_state else outputs[0]
    y, state = _scan_loop(*inputs)
    return (y, state) if return_final_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one step of :func:`selective_scan`, in constant time and memory.

    Args:
        state: (B, E, N); not written to.
        u, dt, z: (B, E).
        A: (E, N).
        B, C: (B, N).
        D, dt_bias: (E).
        dt_softplus: As in :func:`selective_scan`.

    Returns:
        y (B, E) in ``u``'s dtype and the next state (B, E, N) in ``state``'s dtype. Keep the state in float32 or wider:
        rounding it at every step loses the past.

    Raises:
        UserError: Shapes do not fit together.
    """
    if u.dim() != 2 or state.dim() != 3:
        raise UserError(
            "selective_scan_step: u must be (B, E) and state (B, E, N), "
            f"got {tuple(u.shape)} and {tuple(state.shape)}"
        )
    u_B1E, dt_B1E, B_B1N, C_B1N = (x.unsqueeze(1) for x in (u, dt, B, C))
    z_B1E = None if z is None else z.unsqueeze(1)
    _check(u_B1E, dt_B1E, A, B_B1N, C_B1N, D, z_B1E, dt_bias, None, state)
    wide = state_dtype(u, dt, A, B, C)
    dt_BE = dt.to(wide)
    if dt_bias is not None:
        dt_BE = dt_BE + dt_bias
    if dt_softplus:
        dt_BE = F.softplus(dt_BE)
    u_BE = u.to(wide)
    decay_BEN = torch.exp(dt_BE.unsqueeze(-1) * A)
    h_BEN = decay_BEN * state + (dt_BE * u_BE).unsqueeze(-1) * B.to(wide).unsqueeze(1)
    y_BE = (h_BEN * C.to(wide).unsqueeze(1)).sum(-1)
    if D is not None:
        y_BE = y_BE + D * u_BE
    if z is not None:
        y_BE = y_BE * F.silu(z.to(wide))
    return y_BE.to(u.dtype), h_BEN.to(state.dtype)


def selective_scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the formula in the plainest way, in the dtype of the inputs.

    Takes the arguments of :func:`selective_scan` and returns y (B, L, E) and the final state (B, E, N). The tests hold
    the other paths against its float64 result.
    """
    batch, length, channels = u.shape
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.long, device=u.device)
    h_BEN = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state
    first_B = torch.ones(batch, dtype=torch.bool, device=u.device)  # no sequence has begun
    outputs = []
    for t in range(length):
        valid_B = seq_idx[:, t] >= 0
        valid_B1, valid_B11 = valid_B[:, None], valid_B[:, None, None]
        new_B11 = (~first_B & (seq_idx[:, t] != seq_idx[:, t - 1]))[:, None, None]
        first_B = first_B & ~valid_B

        # Inputs at padding count as 0, so that not even a NaN there reaches a gradient.
        delta_BE = torch.where(valid_B1, dt[:, t], 0)
        if dt_bias is not None:
            delta_BE = delta_BE + dt_bias
        if dt_softplus:
            delta_BE = F.softplus(delta_BE)
        u_BE = torch.where(valid_B1, u[:, t], 0)
        B_BN = torch.where(valid_B1, B[:, t], 0)
        C_BN = torch.where(valid_B1, C[:, t], 0)

        past_BEN = torch.where(new_B11, 0, h_BEN)
        next_BEN = (
            torch.exp(delta_BE[:, :, None] * A) * past_BEN
            + delta_BE[:, :, None] * B_BN[:, None, :] * u_BE[:, :, None]
        )
        h_BEN = torch.where(valid_B11, next_BEN, h_BEN)
        y_BE = (C_BN[:, None, :] * h_BEN).sum(-1)
        if D is not None:
            y_BE = y_BE + D * u_BE
        if z is not None:
            y_BE = y_BE * F.silu(torch.where(valid_B1, z[:, t], 0))
        outputs.append(torch.where(valid_B1, y_BE, 0))
    y_BLE = torch.stack(outputs, 1) if outputs else torch.zeros_like(u)
    return y_BLE, h_BEN


def _scan_loop(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence step by step, and everything else for all steps at once.

    Inputs are ``unbind``-ed, because indexing ``x[:, t]`` makes the backward pass quadratic in the length: every
    slice's gradient is a zero tensor of the full size. Each step takes one exponential. Fused and batched operators
    (``addcmul``, ``bmm``) take a quarter longer on a CPU than products and sums.
    """
    wide = state_dtype(u, dt, A, B, C, D, z, dt_bias, initial_state)
    # A program of torch.export cannot be saved with a change of autocast in it.
    with nullcontext() if is_exporting() else torch.autocast(u.device.type, enabled=False):
        u_BLE, dt_BLE, B_BLN, C_BLN = (x.to(wide) for x in (u, dt, B, C))
        A_EN = A.to(wide)
        keep: tuple[Tensor, ...] | None = None
        if seq_idx is not None:
            pad_BL1 = (seq_idx < 0).unsqueeze(-1)
            u_BLE, dt_BLE, B_BLN, C_BLN = (
                x.masked_fill(pad_BL1, 0) for x in (u_BLE, dt_BLE, B_BLN, C_BLN)
            )
            if not is_exporting():  # one sequence a row
                keep = (~_resets(seq_idx)).unbind(1)
        if dt_bias is not None:
            dt_BLE = dt_BLE + dt_bias
        if dt_softplus:
            dt_BLE = F.softplus(dt_BLE)
        if seq_idx is not None:
            # With a step size of 0 the decay is 1 and the input 0: padding passes the state on.
            dt_BLE = dt_BLE.masked_fill(pad_BL1, 0)
        h_BEN = (
            u_BLE.new_zeros(u.shape[0], u.shape[2], A.shape[1])
            if initial_state is None
            else initial_state.to(wide)
        )
        if is_exporting():
            y_BLE, h_BEN = _scan_operator(h_BEN, A_EN, dt_BLE, dt_BLE * u_BLE, B_BLN, C_BLN)
            return _finish(y_BLE, u, u_BLE, D, z, seq_idx), h_BEN
        outputs = []
        steps = zip(
            dt_BLE.unsqueeze(-1).unbind(1),
            (dt_BLE * u_BLE).unsqueeze(-1).unbind(1),
            B_BLN.unsqueeze(2).unbind(1),
            C_BLN.unsqueeze(2).unbind(1),
            strict=True,
        )
        for t, (dt_BE1, dtu_BE1, B_B1N, C_B1N) in enumerate(steps):
            if keep is not None:
                h_BEN = torch.where(keep[t][:, None, None], h_BEN, 0)
            h_BEN = torch.exp(dt_BE1 * A_EN) * h_BEN + dtu_BE1 * B_B1N
            outputs.append((h_BEN * C_B1N).sum(-1))
        y_BLE = torch.stack(outputs, 1) if outputs else torch.zeros_like(u_BLE)
        return _finish(y_BLE, u, u_BLE, D, z, seq_idx), h_BEN


def _finish(
    y_BLE: Tensor,
    u: Tensor,
    u_BLE: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """Add the skip ``D * u`` to a recurrence's output, apply the gate, and return it in ``u``'s dtype."""
    pad_BL1 = None if seq_idx is None else (seq_idx < 0).unsqueeze(-1)
    if D is not None:
        y_BLE = y_BLE + D * u_BLE
    if z is not None:
        z_BLE = z.to(y_BLE.dtype)
        y_BLE = y_BLE * F.silu(z_BLE if pad_BL1 is None else z_BLE.masked_fill(pad_BL1, 0))
    if pad_BL1 is not None:
        y_BLE = y_BLE.masked_fill(pad_BL1, 0)
    return y_BLE.to(u.dtype)


def _scan_operator(
    h_BEN: Tensor, A_EN: Tensor, dt_BLE: Tensor, dtu_BLE: Tensor, B_BLN: Tensor, C_BLN: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of rows of one sequence as one ``scan`` operator, which any length can be exported with."""
    from torch._higher_order_ops.scan import scan

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        dt_BE, dtu_BE, B_BN, C_BN = inputs
        h = torch.exp(dt_BE.unsqueeze(-1) * A_EN) * h + dtu_BE.unsqueeze(-1) * B_BN.unsqueeze(1)
        return h, (h @ C_BN.unsqueeze(-1)).squeeze(-1)

    over_time = tuple(x.transpose(0, 1) for x in (dt_BLE, dtu_BLE, B_BLN, C_BLN))
    h_BEN, y_LBE = scan(step, h_BEN, over_time)
    return y_LBE.transpose(0, 1), h_BEN


def _on_gpu(path: str, arguments: Mapping[str, Any]) -> list[Tensor]:
    """Run the Triton kernels, or ``mamba_ssm``'s with its layout (B, E, L) and float32 parameters."""
    *inputs, return_final_state = arguments.values()
    if path == "triton":
        return torch.ops.recsys_ssm.triton_selective_scan.default(
            *inputs, return_final_state, False
        )
    function = _OPERATOR.cuda_function
    assert function is not None
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, _, _ = inputs
    u_BEL, dt_BEL, B_BNL, C_BNL = (x.transpose(1, 2) for x in (u, dt, B, C))
    z_BEL = None if z is None else z.transpose(1, 2)
    D, dt_bias = (None if x is None else x.float() for x in (D, dt_bias))
    out = function(
        u_BEL, dt_BEL, A.float(), B_BNL, C_BNL, D, z_BEL, dt_bias, dt_softplus, return_final_state
    )
    if return_final_state:
        return [out[0].transpose(1, 2), out[1].float()]
    return [out.transpose(1, 2)]


# --- the C++ kernel ------------------------------------------------------------------------------

_CHUNK = 32  # kChunk and kBlock of csrc/selective_scan.cpp: the shape of the checkpoints
_BLOCK = 64
_INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? seq_idx, Tensor? initial_state"
)
_LIBRARY = torch.library.Library("recsys_ssm", "FRAGMENT")
# Returns y; with return_final_state the final state; with keep_for_backward y before the gate and checkpoints.
_LIBRARY.define(
    f"selective_scan({_INPUTS}, bool return_final_state, bool keep_for_backward) -> Tensor[]"
)
# Returns the gradients of the floating-point inputs that are passed, in their order.
_LIBRARY.define(
    f"selective_scan_backward(Tensor? dy, Tensor? dfinal_state, {_INPUTS}, Tensor? ungated, "
    "Tensor checkpoints) -> Tensor[]"
)


def _scan_kernel(inputs: _Inputs, return_final_state: bool) -> list[Tensor]:
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state = inputs
    D, dt_bias, initial_state = (
        x if x is None or x.dtype == torch.float32 else x.float()
        for x in (D, dt_bias, initial_state)
    )
    A = A if A.dtype == torch.float32 else A.float()
    return torch.ops.recsys_ssm.selective_scan.default(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state,
        return_final_state, False,
    )  # fmt: skip


def _fake(*arguments: Any) -> list[Tensor]:
    """Allocate the outputs of the forward operator."""
    u, _, A, _, _, _, z, _, _, _, _, return_final_state, keep_for_backward = arguments
    (*calls, batch, length, channels), states = u.shape, A.shape[-1]
    outputs = [empty_like(u)]
    if return_final_state:
        outputs.append(A.new_empty((*calls, batch, channels, states)))
    if keep_for_backward:
        if z is not None:
            outputs.append(empty_like(u))
        chunks = (length + _CHUNK - 1) // _CHUNK
        blocks = (channels + _BLOCK - 1) // _BLOCK
        # The first chunk starts from the initial state.
        shape = (*calls, batch, torch.sym_max(chunks - 1, 0), blocks, states, _BLOCK)
        outputs.append(A.new_empty(shape))
    return outputs


def _backward_fake(*arguments: Any) -> list[Tensor]:
    """Allocate the outputs of the backward operator."""
    u, dt, A, B, C, D, z, dt_bias, _, _, initial_state = arguments[2:13]
    given = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    return [empty_like(x) for x in given if x is not None]


class _CallArguments:
    """Collect the ``Arguments`` of csrc/selective_scan.cpp in their order, all 8-byte integers.

    Keeps the tensors alive. The arguments are a plain array, because filling a ctypes structure by name takes longer
    than a short scan.
    """

    def __init__(self, inputs: _Inputs) -> None:
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state = inputs
        self.alive: list[Tensor] = []
        self.values = [0, torch.get_num_threads(), *u.shape, A.shape[1], dt_softplus]
        for x in (u, dt, z, B, C):
            self.strided(x)
        for x in (A, D, dt_bias, initial_state, None if seq_idx is None else seq_idx.long()):
            self.dense(x)

    def strided(self, x: Tensor | None) -> None:
        """Add a (batch, length, width) tensor with its strides; copy it only if the last stride is not 1."""
        if x is None:
            self.values += (0, 0, 0, 0)
            return
        batch, time, width = x.stride()
        if width != 1 and x.shape[2] > 1:
            x = x.contiguous()
            batch, time, _ = x.stride()
        self.alive.append(x)
        self.values += (x.data_ptr(), batch, time, x.dtype == torch.bfloat16)

    def dense(self, x: Tensor | None) -> None:
        """Add a tensor without gaps; copy it if it has any."""
        if x is None:
            self.values.append(0)
            return
        x = x.contiguous()
        self.alive.append(x)
        self.values.append(x.data_ptr())

    def call(self, function: Callable[[int], None]) -> None:
        self.values[0] = 8 * _ARGUMENTS
        block = array("q", self.values)
        block.extend([0] * (_ARGUMENTS - len(block)))
        function(block.buffer_info()[0])


_ARGUMENTS = 7 + 5 * 4 + 5 + 2 * 4 + 2 + 6 * 4 + 5


def _forward_cpu(*arguments: Any) -> list[Tensor]:
    outputs = _fake(*arguments)
    for found, one in each_call(3, 0, outputs, arguments):
        _forward_into(found, *one)
    return outputs


def _forward_into(outputs: Sequence[Tensor], *arguments: Any) -> None:
    *inputs, return_final_state, keep_for_backward = arguments
    z = inputs[6]
    assert _OPERATOR.functions is not None
    left = iter(outputs)
    call = _CallArguments(tuple(inputs))
    call.strided(next(left))
    final_state = next(left) if return_final_state else None
    call.strided(next(left) if keep_for_backward and z is not None else None)
    call.dense(final_state)
    call.dense(next(left) if keep_for_backward else None)
    call.call(_OPERATOR.functions[0])


def _backward_cpu(*arguments: Any) -> list[Tensor]:
    gradients = _backward_fake(*arguments)
    for found, one in each_call(3, 2, gradients, arguments):
        _backward_into(found, *one)
    return gradients


def _backward_into(gradients: Sequence[Tensor], *arguments: Any) -> None:
    dy, dfinal_state, *inputs, ungated, checkpoints = arguments
    assert _OPERATOR.functions is not None
    left = iter(gradients)
    given = [x for i, x in enumerate(inputs) if i not in (8, 9)]  # floating-point ones
    spread = [None if x is None else next(left) for x in given]
    du, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state = spread
    call = _CallArguments(tuple(inputs))
    call.strided(None)  # y
    call.strided(ungated)
    call.dense(None)  # final state
    call.dense(checkpoints)
    for x in (dy, du, ddt, dz, dB, dC):
        call.strided(x)
    for x in (dfinal_state, dA, dD, ddt_bias, dinitial_state):
        call.dense(x)
    call.call(_OPERATOR.functions[1])


class _Scan(KernelFunction):
    @staticmethod
    def forward(ctx: Any, return_final_state: bool, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = torch.ops.recsys_ssm.selective_scan.default(*inputs, return_final_state, True)
        public = 2 if return_final_state else 1
        *ungated, checkpoints = outputs[public:]
        u, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, seq_idx, initial_state = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            u, dt, A, B, C, D, z, dt_bias, seq_idx, initial_state, *(ungated or [None]), checkpoints
        )
        return tuple(outputs[:public])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None = None) -> Any:
        if dy is None and dfinal_state is None:
            return (None,) * 12
        *scan, seq_idx, initial_state, ungated, checkpoints = ctx.saved_tensors
        found = torch.ops.recsys_ssm.selective_scan_backward.default(
            dy, dfinal_state, *scan, ctx.dt_softplus, seq_idx, initial_state, ungated, checkpoints
        )
        left = iter(found)
        *rest, dinitial_state = [None if x is None else next(left) for x in (*scan, initial_state)]
        return None, *rest, None, None, dinitial_state


def _differentiable(*arguments: Any) -> list[Tensor]:
    *inputs, return_final_state, _ = arguments
    return list(_Scan.apply(return_final_state, *inputs))


register_operator(
    "selective_scan",
    _LIBRARY,
    forward=_forward_cpu,
    backward=_backward_cpu,
    forward_fake=_fake,
    backward_fake=_backward_fake,
    differentiable=_differentiable,
)


def _resets(seq_idx: Tensor) -> Tensor:
    """Mark (B, L) where a sequence begins that is not the row's first."""
    begins_BL = starts_of(seq_idx)
    return begins_BL & (begins_BL.cumsum(1) > 1)


def _floats(inputs: _Inputs) -> list[Tensor]:
    """Return the floating-point inputs that are not None."""
    *scan, _, _, initial_state = inputs
    return [x for x in (*scan, initial_state) if x is not None]


def _fit(inputs: _Inputs) -> bool:
    """Return True if all shapes fit the kernel: no channels or no states is left to plain PyTorch.

    Costs a small part of :func:`_check`, which says what is wrong.
    """
    u, dt, A, B, C, D, z, dt_bias, _, seq_idx, initial_state = inputs
    if u.dim() != 3 or A.dim() != 2:
        return False
    wide, narrow = u.shape, (u.shape[0], u.shape[1], A.shape[1])
    return (
        0 not in A.shape
        and dt.shape == wide
        and A.shape[0] == wide[2]
        and B.shape == narrow
        and C.shape == narrow
        and (D is None or D.shape == wide[2:])
        and (z is None or z.shape == wide)
        and (dt_bias is None or dt_bias.shape == wide[2:])
        and (initial_state is None or initial_state.shape == (wide[0], *A.shape))
        and (
            seq_idx is None
            or (seq_idx.shape == wide[:2] and seq_idx.is_cpu and seq_idx.dtype in INTEGERS)
        )
    )


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if u.dim() != 3 or A.dim() != 2:
        raise UserError(
            "selective_scan: u must be (B, L, E) and A (E, N), "
            f"got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    (batch, length, channels), states = u.shape, A.shape[1]
    check_tensors(
        "selective_scan",
        ("u", "A"),
        (
            ("dt", dt, (batch, length, channels)),
            ("A", A, (channels, states)),
            ("B", B, (batch, length, states)),
            ("C", C, (batch, length, states)),
            ("D", D, (channels,)),
            ("z", z, (batch, length, channels)),
            ("dt_bias", dt_bias, (channels,)),
            ("seq_idx", seq_idx, (batch, length)),
            ("initial_state", initial_state, (batch, channels, states)),
            ("u", u, (batch, length, channels)),
        ),
    )
