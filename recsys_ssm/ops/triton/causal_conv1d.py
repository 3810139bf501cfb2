"""Causal convolution in Triton: see :mod:`recsys_ssm.ops.causal_conv1d` for the formula and the arguments.

A program of the forward kernel computes a tile of positions and channels. Its taps read overlapping rows, which the
cache holds. The backward kernel computes the values before the activation again. Filters of up to four taps over whole
rows compute the gradient of the input in the same pass. Wider ones write the gradient before the activation to memory,
because computing it again for every tap takes W² products, and so do packed rows, for want of registers.

Legend: B rows, L positions, E channels, W taps, T positions of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from recsys_ssm.ops._operators import register_operator
from recsys_ssm.ops._vmap import each_call
from recsys_ssm.ops.causal_conv1d import differentiable
from recsys_ssm.ops.triton._launch import (
    blocks,
    first_positions,
    on_device,
    power_of_two,
    rows,
    tiles_of_a_program,
)

__all__ = ["OPERATOR"]

_POSITIONS = 16
_CHANNELS = 64
_WIDEST_FUSED = 4


@triton.jit
def _sequence(seq, b, t, L, SEQ: tl.constexpr):
    """Load the sequence of each position; -1 outside the row."""
    if SEQ:
        return tl.load(seq + b * L + t, mask=(t >= 0) & (t < L), other=-1)
    else:
        return tl.where((t >= 0) & (t < L), 0, -1)


@triton.jit
def _source(
    x, state, seq, b, s, own, same, e, e_ok, first, L, E, x_batch, x_time,
    W: tl.constexpr, SEQ: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Load the inputs at positions ``s``, or the state before the row's first sequence.

    ``same`` marks where all positions between ``s`` and the output belong to one sequence. Returns the inputs, 0 where
    there are none, and the mark with ``s`` included.
    """
    if SEQ:
        inside = (s >= first) & (s < L)
        same = same & ((s < first) | (_sequence(seq, b, s, L, SEQ) == own))
    else:
        inside = (s >= 0) & (s < L)
    value = tl.load(
        x + b * x_batch + s[:, None] * x_time + e[None, :],
        mask=(same & inside)[:, None] & e_ok[None, :],
        other=0.0,
    ).to(tl.float32)
    if STATE:
        before = s - first + (W - 1)
        value += tl.load(
            state + (b * E + e[None, :]) * (W - 1) + before[:, None],
            mask=(same & (s < first) & (before >= 0))[:, None] & e_ok[None, :],
            other=0.0,
        ).to(tl.float32)
    return value, same


@triton.jit
def _before_activation(
    x, weight, bias, state, seq, b, t, e, e_ok, first, L, E, x_batch, x_time,
    W: tl.constexpr, AHEAD: tl.constexpr, SEQ: tl.constexpr, STATE: tl.constexpr,
    BIAS: tl.constexpr, T: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the filter's output at positions ``t``."""
    BACK: tl.constexpr = W - 1 - AHEAD
    total = tl.zeros([T, CHANNELS], tl.float32)
    if BIAS:
        total += tl.load(bias + e, mask=e_ok, other=0.0).to(tl.float32)[None, :]
    own = _sequence(seq, b, t, L, SEQ)
    same = own >= 0
    for k in range(BACK + 1):
        value, same = _source(
            x, state, seq, b, t - k, own, same, e, e_ok, first, L, E, x_batch, x_time, W, SEQ, STATE
        )
        tap = tl.load(weight + e * W + (BACK - k), mask=e_ok, other=0.0).to(tl.float32)
        total += value * tap[None, :]
    same = own >= 0
    for k in range(AHEAD):
        value, same = _source(
            x, state, seq, b, t + k + 1, own, same, e, e_ok, first, L, E, x_batch, x_time,
            W, SEQ, False,
        )  # fmt: skip
        tap = tl.load(weight + e * W + (BACK + 1 + k), mask=e_ok, other=0.0).to(tl.float32)
        total += value * tap[None, :]
    return total


@triton.jit
def _gradient_before(
    dy, x, weight, bias, state, seq, b, t, e, e_ok, first, L, E, x_batch, x_time, dy_batch, dy_time,
    W: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, SEQ: tl.constexpr,
    STATE: tl.constexpr, BIAS: tl.constexpr, T: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient before the activation at positions ``t``; 0 at padding and outside the row."""
    valid = _sequence(seq, b, t, L, SEQ) >= 0
    g = tl.load(
        dy + b * dy_batch + t[:, None] * dy_time + e[None, :],
        mask=valid[:, None] & e_ok[None, :],
        other=0.0,
    ).to(tl.float32)
    if SILU:
        z = _before_activation(
            x, weight, bias, state, seq, b, t, e, e_ok, first, L, E, x_batch, x_time,
            W, AHEAD, SEQ, STATE, BIAS, T, CHANNELS,
        )  # fmt: skip
        s = 1 / (1 + tl.exp(-z))
        g = g * (s * (1 + z * (1 - s)))
    return g


@triton.jit
def _forward_kernel(
    x, weight, bias, state, seq, first_positions, y, L, E, x_batch, x_time,
    W: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, SEQ: tl.constexpr,
    STATE: tl.constexpr, BIAS: tl.constexpr, T: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(L, T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * T + tl.arange(0, T)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    e_ok = e < E
    first = 0
    if SEQ:
        first = tl.load(first_positions + b)
    out = _before_activation(
        x, weight, bias, state, seq, b, t, e, e_ok, first, L, E, x_batch, x_time,
        W, AHEAD, SEQ, STATE, BIAS, T, CHANNELS,
    )  # fmt: skip
    if SILU:
        out = out / (1 + tl.exp(-out))
    if SEQ:
        out = tl.where((_sequence(seq, b, t, L, SEQ) >= 0)[:, None], out, 0.0)
    tl.store(
        y + (b * L + t[:, None]) * E + e[None, :],
        out.to(y.dtype.element_ty),
        mask=(t < L)[:, None] & e_ok[None, :],
    )


@triton.jit
def _backward_kernel(
    dy, x, weight, bias, state, seq, first_positions, dx, before, dweight, dbias,
    tiles, share, L, E, x_batch, x_time, dy_batch, dy_time,
    W: tl.constexpr, AHEAD: tl.constexpr, SILU: tl.constexpr, SEQ: tl.constexpr,
    STATE: tl.constexpr, BIAS: tl.constexpr, FUSED: tl.constexpr, T: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of taps and bias over ``share`` tiles; write dx, or the gradient before the activation."""
    BACK: tl.constexpr = W - 1 - AHEAD
    part = tl.program_id(0)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    e_ok = e < E
    a_row = tl.cdiv(L, T)
    tap_at = tl.arange(0, TAPS)
    dw = tl.zeros([TAPS, CHANNELS], tl.float32)
    db = tl.zeros([CHANNELS], tl.float32)
    for tile in range(part * share, tl.minimum(part * share + share, tiles)):
        b = (tile // a_row).to(tl.int64)
        t = (tile % a_row) * T + tl.arange(0, T)
        first = 0
        if SEQ:
            first = tl.load(first_positions + b)
        g = _gradient_before(
            dy, x, weight, bias, state, seq, b, t, e, e_ok, first, L, E, x_batch, x_time,
            dy_batch, dy_time, W, AHEAD, SILU, SEQ, STATE, BIAS, T, CHANNELS,
        )  # fmt: skip
        db += tl.sum(g, 0)
        own = _sequence(seq, b, t, L, SEQ)
        same = own >= 0
        for k in range(BACK + 1):
            value, same = _source(
                x, state, seq, b, t - k, own, same, e, e_ok, first, L, E, x_batch, x_time,
                W, SEQ, STATE,
            )  # fmt: skip
            dw += tl.where((tap_at == BACK - k)[:, None], tl.sum(g * value, 0)[None, :], 0.0)
        same = own >= 0
        for k in range(AHEAD):
            value, same = _source(
                x, state, seq, b, t + k + 1, own, same, e, e_ok, first, L, E, x_batch, x_time,
                W, SEQ, False,
            )  # fmt: skip
            dw += tl.where((tap_at == BACK + 1 + k)[:, None], tl.sum(g * value, 0)[None, :], 0.0)
        at = (b * L + t[:, None]) * E + e[None, :]
        here = (t < L)[:, None] & e_ok[None, :]
        if FUSED:
            total = g * tl.load(weight + e * W + BACK, mask=e_ok, other=0.0).to(tl.float32)[None, :]
            same = own >= 0
            for k in range(1, BACK + 1):
                same = same & (_sequence(seq, b, t + k, L, SEQ) == own)
                g = _gradient_before(
                    dy, x, weight, bias, state, seq, b, t + k, e, e_ok, first, L, E, x_batch,
                    x_time, dy_batch, dy_time, W, AHEAD, SILU, SEQ, STATE, BIAS, T, CHANNELS,
                )  # fmt: skip
                tap = tl.load(weight + e * W + (BACK - k), mask=e_ok, other=0.0).to(tl.float32)
                total += tl.where(same[:, None], g * tap[None, :], 0.0)
            same = own >= 0
            for k in range(1, AHEAD + 1):
                same = same & (_sequence(seq, b, t - k, L, SEQ) == own)
                g = _gradient_before(
                    dy, x, weight, bias, state, seq, b, t - k, e, e_ok, first, L, E, x_batch,
                    x_time, dy_batch, dy_time, W, AHEAD, SILU, SEQ, STATE, BIAS, T, CHANNELS,
                )  # fmt: skip
                tap = tl.load(weight + e * W + (BACK + k), mask=e_ok, other=0.0).to(tl.float32)
                total += tl.where(same[:, None], g * tap[None, :], 0.0)
            tl.store(dx + at, total.to(dx.dtype.element_ty), mask=here)
        else:
            tl.store(before + at, g, mask=here)
    tl.store(
        dweight + (part * W + tap_at[:, None]) * E + e[None, :],
        dw,
        mask=(tap_at < W)[:, None] & e_ok[None, :],
    )
    if BIAS:
        tl.store(dbias + part * E + e, db, mask=e_ok)


@triton.jit
def _input_kernel(
    before, weight, seq, dx, L, E,
    W: tl.constexpr, AHEAD: tl.constexpr, SEQ: tl.constexpr, T: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute dx from the gradient before the activation."""
    BACK: tl.constexpr = W - 1 - AHEAD
    tiles = tl.cdiv(L, T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * T + tl.arange(0, T)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    e_ok = e < E
    total = tl.zeros([T, CHANNELS], tl.float32)
    own = _sequence(seq, b, t, L, SEQ)
    same = own >= 0
    for k in range(BACK + 1):
        same = same & (_sequence(seq, b, t + k, L, SEQ) == own)
        at = (b * L + (t + k)[:, None]) * E + e[None, :]
        g = tl.load(before + at, mask=same[:, None] & e_ok[None, :], other=0.0)
        tap = tl.load(weight + e * W + (BACK - k), mask=e_ok, other=0.0).to(tl.float32)
        total += g * tap[None, :]
    same = own >= 0
    for k in range(1, AHEAD + 1):
        same = same & (_sequence(seq, b, t - k, L, SEQ) == own)
        at = (b * L + (t - k)[:, None]) * E + e[None, :]
        g = tl.load(before + at, mask=same[:, None] & e_ok[None, :], other=0.0)
        tap = tl.load(weight + e * W + (BACK + k), mask=e_ok, other=0.0).to(tl.float32)
        total += g * tap[None, :]
    tl.store(
        dx + (b * L + t[:, None]) * E + e[None, :],
        total.to(dx.dtype.element_ty),
        mask=(t < L)[:, None] & e_ok[None, :],
    )


@triton.jit
def _state_kernel(
    dy, x, weight, bias, state, seq, first_positions, dstate,
    L, E, x_batch, x_time, dy_batch, dy_time,
    W: tl.constexpr, SILU: tl.constexpr, SEQ: tl.constexpr, BIAS: tl.constexpr,
    T: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the initial state from the first W - 1 positions after it."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    e_ok = e < E
    first = 0
    if SEQ:
        first = tl.load(first_positions + b)
    after = tl.arange(0, T)
    t = first + after
    g = _gradient_before(
        dy, x, weight, bias, state, seq, b, t, e, e_ok, first, L, E, x_batch, x_time,
        dy_batch, dy_time, W, 0, SILU, SEQ, True, BIAS, T, CHANNELS,
    )  # fmt: skip
    reached = after < W - 1
    if SEQ:
        own = _sequence(seq, b, t, L, SEQ)
        for k in range(1, W - 1):
            reached = reached & ((k > after) | (_sequence(seq, b, t - k, L, SEQ) == own))
    g = tl.where(reached[:, None], g, 0.0)
    for i in range(W - 1):
        # The state's number i stands W - 1 - i positions before the sequence: tap i - after of the output.
        column = i - after
        tap = tl.load(
            weight + e[None, :] * W + column[:, None],
            mask=(column >= 0)[:, None] & e_ok[None, :],
            other=0.0,
        ).to(tl.float32)
        tl.store(
            dstate + (b * E + e) * (W - 1) + i,
            tl.sum(g * tap, 0).to(dstate.dtype.element_ty),
            mask=e_ok,
        )


# --- launches ------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("recsys_ssm", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_state, "
    "bool silu, int ahead"
)
_LIBRARY.define(f"triton_causal_conv1d({_INPUTS}) -> Tensor")
# Returns the gradients of the floating-point inputs that are passed, in their order.
_LIBRARY.define(f"triton_causal_conv1d_backward(Tensor dy, {_INPUTS}) -> Tensor[]")


def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    """Allocate the output of the forward operator."""
    return x.new_empty(x.shape)


def _backward_fake(_dy: Tensor, *inputs: Any) -> list[Tensor]:
    """Allocate the outputs of the backward operator."""
    x, weight, bias, _, initial_state, *_ = inputs
    return [t.new_empty(t.shape) for t in (x, weight, bias, initial_state) if t is not None]


def _forward(*inputs: Any) -> Tensor:
    y = _forward_fake(*inputs)
    for (y_one,), one in each_call(3, 0, (y,), inputs):
        _forward_into(y_one, *one)
    return y


def _dense(x: Tensor, weight: Tensor, *others: Tensor | None) -> list[Any]:
    """Return the inputs as the kernels read them."""
    bias, seq_idx, state = (None if t is None else t.contiguous() for t in others)
    first = None if seq_idx is None else first_positions(seq_idx)
    if state is not None and not state.numel():
        state = None
    return [rows(x), weight.contiguous(), bias, state, seq_idx, first]


def _options(inputs: Sequence[Any], silu: bool, ahead: int) -> dict[str, Any]:
    x, weight, bias, state, seq_idx, _ = inputs
    return {
        "W": weight.shape[1],
        "AHEAD": ahead,
        "SILU": silu,
        "SEQ": seq_idx is not None,
        "STATE": state is not None,
        "BIAS": bias is not None,
        "CHANNELS": power_of_two(x.shape[2], 16, _CHANNELS),
    }


def _forward_into(y: Tensor, *inputs: Any) -> None:
    *tensors, silu, ahead = inputs
    dense = _dense(*tensors)
    x = dense[0]
    (B, L, E), options = x.shape, _options(dense, silu, ahead)
    if not x.numel():
        return
    grid = (B * blocks(L, _POSITIONS), blocks(E, options["CHANNELS"]))
    with on_device(x):
        _forward_kernel[grid](*dense, y, L, E, *x.stride()[:2], T=_POSITIONS, **options)


def _backward(*arguments: Any) -> list[Tensor]:
    gradients = _backward_fake(*arguments)
    for found, one in each_call(3, 1, gradients, arguments):
        _backward_into(found, *one)
    return gradients


def _backward_into(gradients: Sequence[Tensor], dy: Tensor, *inputs: Any) -> None:
    *tensors, silu, ahead = inputs
    dense = _dense(*tensors)
    x, weight, bias, state, seq_idx, _ = dense
    (B, L, E), W = x.shape, weight.shape[1]
    if not x.numel():
        for found in gradients:
            found.zero_()
        return
    dy = rows(dy)
    left = iter(gradients)
    dx, dweight = next(left), next(left)
    dbias = None if bias is None else next(left)
    dstate = next(left, None)
    options = _options(dense, silu, ahead)
    fused = W <= _WIDEST_FUSED and seq_idx is None
    channels = blocks(E, options["CHANNELS"])
    tiles = B * blocks(L, _POSITIONS)
    share = tiles_of_a_program(tiles, channels)
    parts = blocks(tiles, share)
    weight_parts = x.new_empty(parts, W, E, dtype=torch.float32)
    bias_parts = x.new_empty(parts, E, dtype=torch.float32) if bias is not None else None
    before = None if fused else x.new_empty(B, L, E, dtype=torch.float32)
    strides = (*x.stride()[:2], *dy.stride()[:2])
    with on_device(x):
        _backward_kernel[parts, channels](
            dy, *dense, dx, before, weight_parts, bias_parts, tiles, share, L, E, *strides,
            FUSED=fused, T=_POSITIONS, TAPS=power_of_two(W, 1, 1 << 30), **options,
        )  # fmt: skip
        if not fused:
            del options["SILU"], options["STATE"], options["BIAS"]
            _input_kernel[tiles, channels](
                before, weight, seq_idx, dx, L, E, T=_POSITIONS, **options
            )
        if dstate is not None and state is not None:
            _state_kernel[B, channels](
                dy, *dense, dstate, L, E, *strides, W=W, SILU=silu, SEQ=seq_idx is not None,
                BIAS=bias is not None, T=power_of_two(W - 1, 1, 1 << 30),
                CHANNELS=options["CHANNELS"],
            )  # fmt: skip
    dweight.copy_(weight_parts.sum(0).t())
    if dbias is not None and bias_parts is not None:
        dbias.copy_(bias_parts.sum(0))


register_operator(
    "triton_causal_conv1d",
    _LIBRARY,
    forward=_forward,
    backward=_backward,
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    differentiable=differentiable("triton_causal_conv1d"),
    device="CompositeExplicitAutograd",
    remedy="pass float64 tensors or set ops.backend=reference to differentiate plain PyTorch",
)
OPERATOR = torch.ops.recsys_ssm.triton_causal_conv1d.default
