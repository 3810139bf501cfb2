"""Selective scan in Triton: see :mod:`recsys_ssm.ops.selective_scan` for the formula and the arguments.

Forward, a program takes a row's time steps one after the other for a block of channels, with all their states in
registers, and writes the states at the start of every chunk of T positions. Backward, a program takes the chunks from
the last to the first. For one state number at a time it computes the states of a chunk again, by an associative scan
from its first one, and the gradients of the states by a scan in the other direction. So no (B, L, E, N) tensor exists.

dB and dC are sums over channels. They are matrix products with a matrix of zeros and ones, because a product sums a
block of channels in fewer instructions than shuffles between threads.

Legend: B rows, L positions, E channels, N states, T positions of a chunk. Tensors of states are (B, …, N, E), so that
adjacent threads take adjacent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recsys_ssm.ops._operators import KernelFunction, empty_like, register_operator
from recsys_ssm.ops._vmap import each_call
from recsys_ssm.ops.triton._launch import (
    blocks,
    first_positions,
    on_device,
    power_of_two,
    rows,
    tiles_of_a_program,
)

__all__ = ["OPERATOR"]

_CHUNK = 16
_FORWARD_CHANNELS = 64
_BACKWARD_CHANNELS = 64


@triton.jit
def _softplus(x):
    return tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _step(dt, bias, valid, SOFTPLUS: tl.constexpr):
    """Return the step size, 0 at padding, and its derivative by the input."""
    raw = dt + bias
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = 1 / (1 + tl.exp(-raw))
        # log(1 + e^x) loses small values: below -8 it is e^x to float32's precision.
        raw = tl.where(raw < -8, tl.exp(raw) - 0.5 * tl.exp(2 * raw), _softplus(raw))
    return tl.where(valid, raw, 0.0), slope


@triton.jit
def _compose(a_left, b_left, a_right, b_right):
    """Compose two steps x → a·x + b, the left one first."""
    return a_left * a_right, a_right * b_left + b_right


@triton.jit
def _marks(seq, b, t, first, L, SEQ: tl.constexpr):
    """Return where positions are valid, and where a sequence begins that is not the row's first."""
    inside = (t >= 0) & (t < L)
    if SEQ:
        here = tl.load(seq + b * L + t, mask=inside, other=-1)
        before = tl.load(seq + b * L + t - 1, mask=inside & (t > 0), other=-1)
        valid = here >= 0
        return valid, valid & (here != before) & (t != first)
    else:
        return inside, t < 0


@triton.jit
def _forward_kernel(
    u, dt, A, B, C, D, z, dt_bias, seq, first_positions, initial, y, final, checkpoints,
    L, E, N, u_batch, u_time, dt_batch, dt_time, z_batch, z_time, B_batch, B_time, C_batch, C_time,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    SEQ: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, KEEP: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(E, CHANNELS)
    b = (tl.program_id(0) // parts).to(tl.int64)
    e = (tl.program_id(0) % parts) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    e_ok, n_ok = e < E, n < N
    both = n_ok[:, None] & e_ok[None, :]
    at_state = n[:, None] * E + e[None, :]
    # exp(x) is 2^(x · log2 e); the factor goes into A once.
    rate = tl.load(A + at_state, mask=both, other=0.0) * 1.4426950408889634
    skip = tl.zeros([CHANNELS], tl.float32)
    bias = tl.zeros([CHANNELS], tl.float32)
    if SKIP:
        skip = tl.load(D + e, mask=e_ok, other=0.0)
    if BIAS:
        bias = tl.load(dt_bias + e, mask=e_ok, other=0.0)
    h = tl.zeros([STATES, CHANNELS], tl.float32)
    if INITIAL:
        h = tl.load(initial + b * N * E + at_state, mask=both, other=0.0)
    first = 0
    if SEQ:
        first = tl.load(first_positions + b)
    chunks = tl.cdiv(L, T)
    for t in range(L):
        if KEEP:
            if (t % T == 0) & (t > 0):
                at = (b * (chunks - 1) + t // T - 1) * N * E
                tl.store(checkpoints + at + at_state, h, mask=both)
        u_t = tl.load(u + b * u_batch + t * u_time + e, mask=e_ok, other=0.0).to(tl.float32)
        dt_t = tl.load(dt + b * dt_batch + t * dt_time + e, mask=e_ok, other=0.0).to(tl.float32)
        B_t = tl.load(B + b * B_batch + t * B_time + n, mask=n_ok, other=0.0).to(tl.float32)
        C_t = tl.load(C + b * C_batch + t * C_time + n, mask=n_ok, other=0.0).to(tl.float32)
        valid = True
        if SEQ:
            here = tl.load(seq + b * L + t)
            before = tl.load(seq + b * L + t - 1, mask=t > 0, other=-1)
            valid = here >= 0
            resets = valid & (here != before) & (t != first)
            h = tl.where(resets, 0.0, h)
            u_t = tl.where(valid, u_t, 0.0)
            B_t = tl.where(valid, B_t, 0.0)
            C_t = tl.where(valid, C_t, 0.0)
        delta, _ = _step(dt_t, bias, valid, SOFTPLUS)
        h = tl.exp2(delta[None, :] * rate) * h + (delta * u_t)[None, :] * B_t[:, None]
        out = tl.sum(h * C_t[:, None], 0) + skip * u_t
        if GATE:
            z_t = tl.load(z + b * z_batch + t * z_time + e, mask=e_ok, other=0.0).to(tl.float32)
            out = out * (z_t / (1 + tl.exp(-z_t)))
        if SEQ:
            out = tl.where(valid, out, 0.0)
        tl.store(y + (b * L + t) * E + e, out.to(y.dtype.element_ty), mask=e_ok)
    if FINAL:
        tl.store(final + b * N * E + at_state, h, mask=both)


@triton.jit
def _backward_kernel(
    dy, dfinal, u, dt, A, B, C, D, z, dt_bias, seq, first_positions, initial, checkpoints,
    du, ddt, dz, dA, dB, dC, dD, dbias, carry, batch, share,
    L, E, N, dy_batch, dy_time, u_batch, u_time, dt_batch, dt_time, z_batch, z_time,
    B_batch, B_time, C_batch, C_time,
    OUTPUT: tl.constexpr, FINAL: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SEQ: tl.constexpr, INITIAL: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Take ``share`` rows in turn, for one block of channels.

    ``carry`` (B, N, E) holds the gradient of the state at the first position of the chunk after the present one.
    """
    parts = tl.cdiv(E, CHANNELS)
    group, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    e = part * CHANNELS + tl.arange(0, CHANNELS)
    e_ok = e < E
    numbers = tl.arange(0, STATES)
    row = tl.arange(0, T)
    skip = tl.zeros([CHANNELS], tl.float32)
    bias = tl.zeros([CHANNELS], tl.float32)
    if SKIP:
        skip = tl.load(D + e, mask=e_ok, other=0.0)
    if BIAS:
        bias = tl.load(dt_bias + e, mask=e_ok, other=0.0)
    sum_D = tl.zeros([CHANNELS], tl.float32)
    sum_bias = tl.zeros([CHANNELS], tl.float32)
    chunks = tl.cdiv(L, T)
    for number in range(tl.minimum(share, batch - group * share)):
        b = group.to(tl.int64) * share + number
        first = 0
        if SEQ:
            first = tl.load(first_positions + b)
        for back in range(chunks):
            chunk = chunks - 1 - back
            t = chunk * T + row
            valid, resets = _marks(seq, b, t, first, L, SEQ)
            next_valid, next_resets = _marks(seq, b, t + 1, first, L, SEQ)
            here = valid[:, None] & e_ok[None, :]
            u_t = tl.load(
                u + b * u_batch + t[:, None] * u_time + e[None, :], mask=here, other=0.0
            ).to(tl.float32)
            raw = tl.load(
                dt + b * dt_batch + t[:, None] * dt_time + e[None, :], mask=here, other=0.0
            ).to(tl.float32)
            delta, slope = _step(raw, bias[None, :], here, SOFTPLUS)
            there = next_valid[:, None] & e_ok[None, :]
            raw = tl.load(
                dt + b * dt_batch + (t + 1)[:, None] * dt_time + e[None, :], mask=there, other=0.0
            ).to(tl.float32)
            next_delta, _ = _step(raw, bias[None, :], there, SOFTPLUS)
            g = tl.zeros([T, CHANNELS], tl.float32)
            if OUTPUT:
                g = tl.load(
                    dy + b * dy_batch + t[:, None] * dy_time + e[None, :], mask=here, other=0.0
                ).to(tl.float32)
            dout = g
            if GATE:
                z_t = tl.load(
                    z + b * z_batch + t[:, None] * z_time + e[None, :], mask=here, other=0.0
                ).to(tl.float32)
                sigmoid = 1 / (1 + tl.exp(-z_t))
                dout = g * z_t * sigmoid
            added = delta * u_t
            out = tl.zeros([T, CHANNELS], tl.float32)
            d_delta = tl.zeros([T, CHANNELS], tl.float32)
            d_added = tl.zeros([T, CHANNELS], tl.float32)
            sum_B = tl.zeros([T, STATES], tl.float32)
            sum_C = tl.zeros([T, STATES], tl.float32)
            for n in range(N):
                at = n * E + e
                rate = tl.load(A + at, mask=e_ok, other=0.0)
                B_t = tl.load(B + b * B_batch + t * B_time + n, mask=valid, other=0.0)
                C_t = tl.load(C + b * C_batch + t * C_time + n, mask=valid, other=0.0)
                B_t, C_t = B_t.to(tl.float32)[:, None], C_t.to(tl.float32)[:, None]
                start = tl.zeros([CHANNELS], tl.float32)
                if chunk > 0:
                    before = (b * (chunks - 1) + chunk - 1) * N * E
                    start = tl.load(checkpoints + before + at, mask=e_ok, other=0.0)
                elif INITIAL:
                    start = tl.load(initial + b * N * E + at, mask=e_ok, other=0.0)
                decay = tl.exp(delta * rate[None, :])
                decay = tl.where(resets[:, None], 0.0, decay)
                value = added * B_t
                factor, h = tl.associative_scan((decay, value), 0, _compose)
                h += factor * start[None, :]

                following = tl.zeros([CHANNELS], tl.float32)
                if chunk < chunks - 1:
                    following = tl.load(carry + b * N * E + at, mask=e_ok, other=0.0)
                elif FINAL:
                    following = tl.load(dfinal + b * N * E + at, mask=e_ok, other=0.0)
                decay = tl.exp(next_delta * rate[None, :])
                decay = tl.where(next_resets[:, None], 0.0, decay)
                factor, dh = tl.associative_scan((decay, dout * C_t), 0, _compose, reverse=True)
                dh += factor * following[None, :]
                first_dh = tl.sum(tl.where(row[:, None] == 0, dh, 0.0), 0)
                tl.store(carry + b * N * E + at, first_dh, mask=e_ok)

                out += C_t * h
                kept = dh * (h - value)  # the part of dh that came from the state before
                d_delta += kept * rate[None, :]
                d_added += dh * B_t
                sum_A = tl.sum(kept * delta, 0)
                into_A = dA + group.to(tl.int64) * N * E + at
                if (number > 0) | (back > 0):
                    sum_A += tl.load(into_A, mask=e_ok, other=0.0)
                tl.store(into_A, sum_A, mask=e_ok)
                choose = tl.where((numbers == n)[None, :] & e_ok[:, None], 1.0, 0.0)
                sum_B += tl.dot(dh * added, choose, input_precision="tf32x3")
                sum_C += tl.dot(h * dout, choose, input_precision="tf32x3")
            tl.debug_barrier()  # the next chunk reads carry and dA
            out += skip[None, :] * u_t
            sum_D += tl.sum(dout * u_t, 0)
            d_delta = tl.where(here, d_delta + d_added * u_t, 0.0) * slope
            sum_bias += tl.sum(d_delta, 0)
            inside = (t < L)[:, None] & e_ok[None, :]
            at_row = (b * L + t[:, None]) * E + e[None, :]
            d_u = d_added * delta + skip[None, :] * dout
            tl.store(du + at_row, d_u.to(du.dtype.element_ty), mask=inside)
            tl.store(ddt + at_row, d_delta.to(ddt.dtype.element_ty), mask=inside)
            if GATE:
                d_z = g * out * sigmoid * (1 + z_t * (1 - sigmoid))
                tl.store(dz + at_row, d_z.to(dz.dtype.element_ty), mask=inside)
            at_row = (part.to(tl.int64) * batch + b) * L * N + t[:, None] * N + numbers[None, :]
            inside = (t < L)[:, None] & (numbers < N)[None, :]
            tl.store(dB + at_row, sum_B, mask=inside)
            tl.store(dC + at_row, sum_C, mask=inside)
        if INITIAL:
            # The first position's decay leads from the initial state to it.
            valid = tl.full([CHANNELS], 1, tl.int1) & e_ok
            if SEQ:
                valid = valid & (tl.load(seq + b * L) >= 0)
            raw = tl.load(dt + b * dt_batch + e, mask=valid, other=0.0).to(tl.float32)
            delta, _ = _step(raw, bias, valid, SOFTPLUS)
            for n in range(N):
                at = n * E + e
                rate = tl.load(A + at, mask=e_ok, other=0.0)
                last = tl.load(carry + b * N * E + at, mask=e_ok, other=0.0)
                tl.store(carry + b * N * E + at, last * tl.exp(delta * rate), mask=e_ok)
    if SKIP:
        tl.store(dD + group * E + e, sum_D, mask=e_ok)
    if BIAS:
        tl.store(dbias + group * E + e, sum_bias, mask=e_ok)


# --- launches ------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("recsys_ssm", "FRAGMENT")
_INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor? seq_idx, Tensor? initial_state"
)
# Returns y; with return_final_state the final state; with keep_for_backward checkpoints.
_LIBRARY.define(
    f"triton_selective_scan({_INPUTS}, bool return_final_state, bool keep_for_backward) -> Tensor[]"
)
# Returns the gradients of the floating-point inputs that are passed, in their order.
_LIBRARY.define(
    f"triton_selective_scan_backward(Tensor? dy, Tensor? dfinal_state, {_INPUTS}, "
    "Tensor checkpoints) -> Tensor[]"
)


def _fake(*arguments: Any) -> list[Tensor]:
    """Allocate the outputs of the forward operator."""
    u, _, A, *_, return_final_state, keep_for_backward = arguments
    (*calls, batch, length, channels), states = u.shape, A.shape[-1]
    outputs = [empty_like(u)]
    if return_final_state:
        outputs.append(u.new_empty((*calls, batch, channels, states), dtype=torch.float32))
    if keep_for_backward:
        chunks = (length + _CHUNK - 1) // _CHUNK
        # The first chunk starts from the initial state.
        shape = (*calls, batch, torch.sym_max(chunks - 1, 0), states, channels)
        outputs.append(u.new_empty(shape, dtype=torch.float32))
    return outputs


def _backward_fake(*arguments: Any) -> list[Tensor]:
    """Allocate the outputs of the backward operator."""
    u, dt, A, B, C, D, z, dt_bias, _, _, initial_state = arguments[2:13]
    given = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    return [empty_like(x) for x in given if x is not None]


def _states_first(x: Tensor | None) -> Tensor | None:
    """Return (…, E, N) as dense (…, N, E) in float32."""
    return None if x is None else x.float().transpose(-1, -2).contiguous()


def _dense(inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs as the kernels read them, in the kernels' order."""
    u, dt, A, B, C, D, z, dt_bias, _, seq_idx, initial_state = inputs
    u, dt, B, C = (rows(x) for x in (u, dt, B, C))
    z = None if z is None else rows(z)
    D, dt_bias = (None if x is None else x.float().contiguous() for x in (D, dt_bias))
    seq_idx = None if seq_idx is None else seq_idx.contiguous()
    first = None if seq_idx is None else first_positions(seq_idx)
    return [u, dt, _states_first(A), B, C, D, z, dt_bias, seq_idx, first,
            _states_first(initial_state)]  # fmt: skip


def _strides(u: Tensor, dt: Tensor, z: Tensor | None, B: Tensor, C: Tensor) -> list[int]:
    return [s for x in (u, dt, z, B, C) for s in ((0, 0) if x is None else x.stride()[:2])]


def _options(dense: Sequence[Any], softplus: bool, channels: int) -> dict[str, Any]:
    u, _, A, _, _, D, z, dt_bias, seq_idx, _, initial = dense
    return {
        "SKIP": D is not None,
        "GATE": z is not None,
        "BIAS": dt_bias is not None,
        "SOFTPLUS": softplus,
        "SEQ": seq_idx is not None,
        "INITIAL": initial is not None,
        "STATES": power_of_two(A.shape[0], 1, 1 << 30),
        "CHANNELS": power_of_two(u.shape[2], 16, channels),
        "T": _CHUNK,
    }


def _forward(*arguments: Any) -> list[Tensor]:
    outputs = _fake(*arguments)
    for found, one in each_call(3, 0, outputs, arguments):
        _forward_into(found, *one)
    return outputs


def _forward_into(outputs: Sequence[Tensor], *arguments: Any) -> None:
    *inputs, return_final_state, keep_for_backward = arguments
    dense = _dense(inputs)
    u, dt, A, B, C, _, z, *_, initial = dense
    (batch, length, channels), states = u.shape, A.shape[0]
    left = iter(outputs)
    y = next(left)
    final = next(left) if return_final_state else None
    checkpoints = next(left) if keep_for_backward else None
    if not u.numel():
        if final is not None:
            final.zero_() if initial is None else final.copy_(initial.transpose(1, 2))
        return
    found = None if final is None else u.new_empty(batch, states, channels, dtype=torch.float32)
    wide = _FORWARD_CHANNELS if states <= 16 else 32
    options = _options(dense, inputs[8], wide)
    grid = (batch * blocks(channels, options["CHANNELS"]),)
    with on_device(u):
        _forward_kernel[grid](
            *dense, y, found, checkpoints, length, channels, states, *_strides(u, dt, z, B, C),
            FINAL=final is not None, KEEP=checkpoints is not None, num_warps=1, **options,
        )  # fmt: skip
    if final is not None and found is not None:
        final.copy_(found.transpose(1, 2))


def _backward(*arguments: Any) -> list[Tensor]:
    gradients = _backward_fake(*arguments)
    for found, one in each_call(3, 2, gradients, arguments):
        _backward_into(found, *one)
    return gradients


def _backward_into(gradients: Sequence[Tensor], *arguments: Any) -> None:
    dy, dfinal_state, *inputs, checkpoints = arguments
    left = iter(gradients)
    given = [x for i, x in enumerate(inputs) if i not in (8, 9)]  # floating-point ones
    spread = [None if x is None else next(left) for x in given]
    du, ddt, dA, dB, dC, dD, dz, dbias, dinitial = spread
    dense = _dense(inputs)
    u, dt, A, B, C, _, z, *_ = dense
    (batch, length, channels), states = u.shape, A.shape[0]
    if not u.numel():
        for found in gradients:
            found.zero_()
        if dinitial is not None and dfinal_state is not None:
            dinitial.copy_(dfinal_state)
        return
    dy = None if dy is None else rows(dy)
    dfinal = _states_first(dfinal_state)
    options = _options(dense, inputs[8], _BACKWARD_CHANNELS)
    options["STATES"] = max(16, options["STATES"])  # the least width of a matrix product
    parts = blocks(channels, options["CHANNELS"])
    share = tiles_of_a_program(batch, parts)
    groups = blocks(batch, share)

    def wide(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    A_parts, D_parts, bias_parts = (
        wide(groups, states, channels), wide(groups, channels), wide(groups, channels),
    )  # fmt: skip
    B_parts, C_parts = (wide(parts, batch, length, states) for _ in range(2))
    carry = wide(batch, states, channels)
    with on_device(u):
        _backward_kernel[(groups * parts,)](
            dy, dfinal, *dense, checkpoints, du, ddt, dz, A_parts, B_parts, C_parts, D_parts,
            bias_parts, carry, batch, share, length, channels, states,
            *((0, 0) if dy is None else dy.stride()[:2]), *_strides(u, dt, z, B, C),
            OUTPUT=dy is not None, FINAL=dfinal is not None, num_warps=4, **options,
        )  # fmt: skip
    assert dA is not None and dB is not None and dC is not None
    dA.copy_(A_parts.sum(0).t())
    dB.copy_(B_parts.sum(0))
    dC.copy_(C_parts.sum(0))
    if dD is not None:
        dD.copy_(D_parts.sum(0))
    if dbias is not None:
        dbias.copy_(bias_parts.sum(0))
    if dinitial is not None:
        dinitial.copy_(carry.transpose(1, 2))


class _Scan(KernelFunction):
    @staticmethod
    def forward(ctx: Any, return_final_state: bool, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            *public, checkpoints = torch.ops.recsys_ssm.triton_selective_scan.default(
                *inputs, return_final_state, True
            )
        *scan, ctx.dt_softplus, seq_idx, initial_state = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*scan, seq_idx, initial_state, checkpoints)
        return tuple(public)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None = None) -> Any:
        if dy is None and dfinal_state is None:
            return (None,) * 12
        *scan, seq_idx, initial_state, checkpoints = ctx.saved_tensors
        found = torch.ops.recsys_ssm.triton_selective_scan_backward.default(
            dy, dfinal_state, *scan, ctx.dt_softplus, seq_idx, initial_state, checkpoints
        )
        left = iter(found)
        *rest, dinitial_state = [None if x is None else next(left) for x in (*scan, initial_state)]
        return None, *rest, None, None, dinitial_state


def _differentiable(*arguments: Any) -> list[Tensor]:
    *inputs, return_final_state, _ = arguments
    return list(_Scan.apply(return_final_state, *inputs))


register_operator(
    "triton_selective_scan",
    _LIBRARY,
    forward=_forward,
    backward=_backward,
    forward_fake=_fake,
    backward_fake=_backward_fake,
    differentiable=_differentiable,
    device="CompositeExplicitAutograd",
    remedy="pass float64 tensors or set ops.backend=reference to differentiate plain PyTorch",
)
OPERATOR = torch.ops.recsys_ssm.triton_selective_scan.default
