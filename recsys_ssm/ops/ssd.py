"""State space duality: the recurrence of Mamba-2 (Dao and Gu, 2024, "Transformers are SSMs", arXiv:2405.21060, equation
1 with a scalar A for each head; the chunked form is its section 6).

For every head h with its P channels p and N states n, with B and C shared by the heads of a group::

    h_t[h, p, n] = exp(Δ_t[h] · A[h]) · h_{t-1}[h, p, n] + Δ_t[h] · B_t[g, n] · x_t[h, p]
    y_t[h, p]    = Σ_n C_t[g, n] · h_t[h, p, n] + D[h] · x_t[h, p]

Three paths give the same result, and :func:`ssd` chooses. :func:`ssd_reference` reads like the formula; the tests hold
the other paths against it, in float64. :func:`_chunked` is the fastest plain PyTorch we know, for any device and dtype.
A C++ kernel serves float32 and bfloat16 on the CPU, and ``mamba_ssm``'s Triton kernels serve CUDA tensors when it is
installed.

Legend of shape suffixes: B batch, L length, H heads, P channels of a head (``headdim``), G groups, R heads of a group
(H / G), N states (``d_state``). In the chunked form: K chunks of Q positions each; the second Q of a pair of positions
is written S.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops._dispatch import Operator, is_exporting
from recsys_ssm.ops._operators import (
    KernelFunction,
    check_tensors,
    empty_like,
    kernels_differentiate,
    register_operator,
    state_dtype,
)
from recsys_ssm.ops._vmap import each_call, is_batched
from recsys_ssm.ops.selective_scan import _resets

__all__ = ["ssd", "ssd_reference", "ssd_step"]

_OPERATOR = Operator(
    "ssd",
    kernels=("recsys_ssd_forward", "recsys_ssd_backward"),
    cuda="mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined",
)


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    chunk_size: int | None = None,
) -> Tensor: ...
@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    return_final_state: Literal[True],
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]: ...
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-2's recurrence over whole sequences, by the fastest path available.

    Args:
        x: Input, (B, L, H, P). Like ``dt``, ``B`` and ``C`` it may be a strided view.
        dt: Step size Δ, (B, L, H), before ``dt_bias`` and softplus.
        A: Decay rate, (H); negative for a stable recurrence.
        B: Input matrix, (B, L, G, N). H must be a multiple of G; head h reads group h // (H / G).
        C: Output matrix, (B, L, G, N).
        D: Skip weight, (H), or None.
        dt_bias: Term added to ``dt`` before the softplus, (H).
        dt_softplus: If True, Δ = softplus(dt + dt_bias), else dt + dt_bias.
        seq_idx: number of the sequence at each position, (B, L), any integer dtype. Equal neighbours are one sequence.
            The state is set to 0 where another sequence begins, so sequences packed into one row do not see each
            other. -1 is padding, at any position: its output is 0, it has no gradient, and it ends a sequence.
        initial_state: State before the row's first sequence, (B, H, P, N).
        return_final_state: If True, also return the state after the row's last valid position.
        chunk_size: Positions that plain PyTorch and the CUDA path treat as one block of attention. It changes speed and
            memory, not the result. None chooses a fast one. The C++ kernel always chooses its own.

    Returns:
        y (B, L, H, P) in ``x``'s dtype; with ``return_final_state`` also the state (B, H, P, N), in float32 (float64 if
        an input is). Both are differentiable in every floating-point argument.

    Raises:
        UserError: Shapes do not fit together, a dtype is not floating point (``seq_idx``: not an integer), or tensors
            are on different devices. The message names the argument.
    """
    _check(x, dt, A, B, C, D, dt_bias, seq_idx, initial_state, chunk_size)
    if is_exporting():
        y, state = _matrix_form(x, dt, A, B, C, D, dt_bias, dt_softplus, seq_idx, initial_state)
        return (y, state) if return_final_state else y
    floats = [t for t in (x, dt, A, B, C, D, dt_bias, initial_state) if t is not None]
    if x.numel() > 0 and B.numel() > 0 and _OPERATOR.takes(*floats) and kernels_differentiate():
        return _by_kernel(
            x, dt, A, B, C, D, dt_bias, dt_softplus, seq_idx, initial_state, return_final_state
        )
    public = seq_idx is None and initial_state is None and not is_batched(x)
    if "mamba_ssm" in _OPERATOR.gpu_paths(*floats, public=public) and kernels_differentiate():
        assert _OPERATOR.cuda_function is not None
        return _OPERATOR.cuda_function(
            x, dt, A, B, C, chunk_size or 256, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus,
            return_final_states=return_final_state,
        )  # fmt: skip
    y, state = _chunked(x, dt, A, B, C, D, dt_bias, dt_softplus, seq_idx, initial_state, chunk_size)
    return (y, state) if return_final_state else y


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one step of :func:`ssd`, in constant time and memory.

    Args:
        state: (B, H, P, N); not written to.
        x: (B, H, P).
        dt: (B, H).
        A, D, dt_bias: (H).
        B, C: (B, G, N).
        dt_softplus: As in :func:`ssd`.

    Returns:
        y (B, H, P) in ``x``'s dtype and the next state (B, H, P, N) in ``state``'s dtype. Keep the state in float32 or
        wider: rounding it at every step loses the past.

    Raises:
        UserError: As :func:`ssd`.
    """
    rows = [tensor.unsqueeze(1) if tensor.dim() else tensor for tensor in (x, dt, B, C)]
    _check(rows[0], rows[1], A, rows[2], rows[3], D, dt_bias, None, state, 1)
    wide = state_dtype(x, dt, A, B, C, state)
    with torch.autocast(x.device.type, enabled=False):
        dt_BH = dt.to(wide)
        if dt_bias is not None:
            dt_BH = dt_BH + dt_bias
        if dt_softplus:
            dt_BH = F.softplus(dt_BH)
        x_BHP = x.to(wide)
        heads = x.shape[1] // B.shape[1]
        B_BHN, C_BHN = (group.to(wide).repeat_interleave(heads, 1) for group in (B, C))
        decay_BH = torch.exp(dt_BH * A)
        h_BHPN = decay_BH[..., None, None] * state + (
            (dt_BH[..., None] * x_BHP)[..., None] * B_BHN[:, :, None, :]
        )
        y_BHP = (h_BHPN * C_BHN[:, :, None, :]).sum(-1)
        if D is not None:
            y_BHP = y_BHP + D[:, None] * x_BHP
        return y_BHP.to(x.dtype), h_BHPN.to(state.dtype)


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the formula in the plainest way, in the dtype of the inputs.

    Takes the arguments of :func:`ssd` and returns y (B, L, H, P) and the final state (B, H, P, N). The tests hold the
    other paths against its float64 result.
    """
    batch, length, heads, headdim = x.shape
    groups, states = B.shape[2:]
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.long, device=x.device)
    h_BHPN = x.new_zeros(batch, heads, headdim, states) if initial_state is None else initial_state
    first_B = torch.ones(batch, dtype=torch.bool, device=x.device)  # no sequence has begun
    outputs = []
    for t in range(length):
        valid_B = seq_idx[:, t] >= 0
        valid_B11, valid_B111 = valid_B[:, None, None], valid_B[:, None, None, None]
        new_B111 = (~first_B & (seq_idx[:, t] != seq_idx[:, t - 1]))[:, None, None, None]
        first_B = first_B & ~valid_B

        delta_BH = dt[:, t] if dt_bias is None else dt[:, t] + dt_bias
        if dt_softplus:
            delta_BH = F.softplus(delta_BH)
        # Inputs at padding count as 0, so that not even a NaN there reaches a gradient.
        delta_BH = torch.where(valid_B[:, None], delta_BH, 0)
        x_BHP = torch.where(valid_B11, x[:, t], 0)
        B_BHN = torch.where(valid_B11, B[:, t], 0).repeat_interleave(heads // groups, 1)
        C_BHN = torch.where(valid_B11, C[:, t], 0).repeat_interleave(heads // groups, 1)

        past_BHPN = torch.where(new_B111, 0, h_BHPN)
        next_BHPN = (
            torch.exp(delta_BH * A)[:, :, None, None] * past_BHPN
            + delta_BH[:, :, None, None] * B_BHN[:, :, None, :] * x_BHP[:, :, :, None]
        )
        h_BHPN = torch.where(valid_B111, next_BHPN, h_BHPN)
        y_BHP = (C_BHN[:, :, None, :] * h_BHPN).sum(-1)
        if D is not None:
            y_BHP = y_BHP + D[:, None] * x_BHP
        outputs.append(torch.where(valid_B11, y_BHP, 0))
    y_BLHP = torch.stack(outputs, 1) if outputs else torch.zeros_like(x)
    return y_BLHP, h_BHPN


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute attention within each chunk and pass a state from chunk to chunk, all in matrix products.

    Heads that share B or C share one product.
    """
    wide = state_dtype(x, dt, A, B, C, D, dt_bias, initial_state)
    batch, length, heads, headdim = x.shape
    groups, states = B.shape[2:]
    if length == 0:
        state = (
            x.new_zeros(batch, heads, headdim, states, dtype=wide)
            if initial_state is None
            else initial_state.to(wide, copy=True)
        )
        return x.clone(), state
    per_group = heads // groups
    if chunk_size is None:
        # Each head has (Q, Q) weights of its own, so many narrow heads want small chunks.
        chunk_size = 16 if headdim < 16 else 64
    Q = min(chunk_size, length)
    K = -(-length // Q)
    with torch.autocast(x.device.type, enabled=False):
        x_BLHP, dt_BLH, B_BLGN, C_BLGN, A_H = (tensor.to(wide) for tensor in (x, dt, B, C, A))
        sequence_BKQ = None
        if seq_idx is not None:
            pad_BL1 = (seq_idx < 0).unsqueeze(-1)
            dt_BLH = dt_BLH.masked_fill(pad_BL1, 0)
            x_BLHP, B_BLGN, C_BLGN = (
                tensor.masked_fill(pad_BL1.unsqueeze(-1), 0) for tensor in (x_BLHP, B_BLGN, C_BLGN)
            )
            # Numbers along the row: two positions are of one sequence if and only if their numbers are equal.
            sequence_BKQ = _to_chunks(_resets(seq_idx).cumsum(1), K, Q, repeat_last=True)
        if dt_bias is not None:
            dt_BLH = dt_BLH + dt_bias
        if dt_softplus:
            dt_BLH = F.softplus(dt_BLH)
        if seq_idx is not None:
            # With a step size of 0 the decay is 1 and the input 0: padding passes the state on.
            dt_BLH = dt_BLH.masked_fill(pad_BL1, 0)

        # Positions beyond the length have step size 0 as well.
        x_BKQGRP = _to_chunks(dt_BLH[..., None] * x_BLHP, K, Q).unflatten(3, (groups, per_group))
        log_a_BGRKQ = (
            _to_chunks(dt_BLH * A_H, K, Q).unflatten(3, (groups, per_group)).permute(0, 3, 4, 1, 2)
        )
        B_BGKQN, C_BGKQN = (
            _to_chunks(tensor, K, Q).permute(0, 3, 1, 2, 4) for tensor in (B_BLGN, C_BLGN)
        )

        # Within a chunk: attention with weights C·B, decayed by the steps in between.
        decay_BGRKQS = _segment_sums(log_a_BGRKQ)
        if sequence_BKQ is not None:
            apart_BKQS = sequence_BKQ[..., :, None] != sequence_BKQ[..., None, :]
            decay_BGRKQS = decay_BGRKQS.masked_fill(apart_BKQS[:, None, None], -torch.inf)
        CB_BGKQS = C_BGKQN @ B_BGKQN.transpose(-1, -2)
        y_BGRKQP = (CB_BGKQS.unsqueeze(2) * decay_BGRKQS.exp()) @ x_BKQGRP.permute(0, 3, 4, 1, 2, 5)

        # From chunk to chunk: the state that a chunk adds at its end, …
        to_end_BGRKQ = _sums_after(log_a_BGRKQ)
        from_start_BGRKQ = log_a_BGRKQ.cumsum(-1)
        keep_BGRK = from_start_BGRKQ[..., -1].exp()
        if sequence_BKQ is not None:
            first_BK = F.pad(
                sequence_BKQ[:, :-1, -1], (1, 0)
            )  # the sequence of the state at its start
            last_BK = sequence_BKQ[:, :, -1]
            to_end_BGRKQ = to_end_BGRKQ.masked_fill(
                (sequence_BKQ != last_BK[..., None])[:, None, None], -torch.inf
            )
            from_start_BGRKQ = from_start_BGRKQ.masked_fill(
                (sequence_BKQ != first_BK[..., None])[:, None, None], -torch.inf
            )
            keep_BGRK = keep_BGRK.masked_fill((first_BK != last_BK)[:, None, None], 0)
        to_end_BKQGR = to_end_BGRKQ.exp().permute(0, 3, 4, 1, 2)
        added_BGKNRP = (
            B_BGKQN.transpose(-1, -2)
            @ (x_BKQGRP * to_end_BKQGR[..., None]).permute(0, 3, 1, 2, 4, 5).flatten(4)
        ).unflatten(4, (per_group, headdim))
        # … the state at every chunk's start, …
        if initial_state is None:
            h_BGNRP = x_BLHP.new_zeros(batch, groups, states, per_group, headdim)
        else:
            h_BGNRP = (
                initial_state.to(wide).unflatten(1, (groups, per_group)).permute(0, 1, 4, 2, 3)
            )
        starts = []
        for keep_BGR, new_BGNRP in zip(keep_BGRK.unbind(3), added_BGKNRP.unbind(2), strict=True):
            starts.append(h_BGNRP)
            h_BGNRP = keep_BGR[:, :, None, :, None] * h_BGNRP + new_BGNRP
        # … and the outputs from that state.
        h_BGKNRP = torch.stack(starts, 2)
        from_state_BGKQRP = (C_BGKQN @ h_BGKNRP.flatten(4)).unflatten(4, (per_group, headdim))
        from_state_BGKQRP = (
            from_state_BGKQRP * from_start_BGRKQ.exp().permute(0, 1, 3, 4, 2)[..., None]
        )
        y_BKQGRP = y_BGRKQP.permute(0, 3, 4, 1, 2, 5) + from_state_BGKQRP.permute(0, 2, 3, 1, 4, 5)
        y_BLHP = y_BKQGRP.reshape(batch, K * Q, heads, headdim)[:, :length]
        if D is not None:
            y_BLHP = y_BLHP + D[:, None] * x_BLHP
        state_BHPN = h_BGNRP.permute(0, 1, 3, 4, 2).flatten(1, 2)
        return y_BLHP.to(x.dtype), state_BHPN


def _matrix_form(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute attention over whole rows of one sequence each, head by head, for export with any length.

    Head by head, so that one (L, L) matrix a row is in memory. Sums of logarithms are float64, because their
    differences would lose digits in float32.
    """
    wide = state_dtype(x, dt, A, B, C, D, dt_bias, initial_state)
    length, heads, groups = x.shape[1], x.shape[2], B.shape[2]
    x_BLHP, dt_BLH, B_BLGN, C_BLGN = (tensor.to(wide) for tensor in (x, dt, B, C))
    if dt_bias is not None:
        dt_BLH = dt_BLH + dt_bias
    if dt_softplus:
        dt_BLH = F.softplus(dt_BLH)
    if seq_idx is not None:
        # With a step size of 0 the decay is 1 and the input 0: padding passes the state on.
        dt_BLH = dt_BLH.masked_fill((seq_idx < 0).unsqueeze(-1), 0)
    log_HBL = (dt_BLH * A.to(wide)).double().cumsum(1).permute(2, 0, 1)
    v_HBLP = (dt_BLH.unsqueeze(-1) * x_BLHP).permute(2, 0, 1, 3)
    h_HBPN = (
        x_BLHP.new_zeros(heads, x.shape[0], x.shape[3], B.shape[3])
        if initial_state is None
        else initial_state.to(wide).transpose(0, 1)
    )
    here_L = torch.arange(length, device=x.device)
    later_LL = here_L.unsqueeze(1) < here_L
    outputs, states = [], []
    for g in range(groups):
        B_BLN, C_BLN = B_BLGN[:, :, g], C_BLGN[:, :, g]
        CB_BLL = C_BLN @ B_BLN.transpose(1, 2)
        for h in range(g * heads // groups, (g + 1) * heads // groups):
            log_BL, v_BLP, h_BPN = log_HBL[h], v_HBLP[h], h_HBPN[h]
            between_BLL = (log_BL.unsqueeze(2) - log_BL.unsqueeze(1)).to(wide)
            decay_BLL = between_BLL.masked_fill(later_LL, -torch.inf).exp()
            y_BLP = (CB_BLL * decay_BLL) @ v_BLP
            if initial_state is not None:
                from_state_BLP = C_BLN @ h_BPN.transpose(1, 2)
                y_BLP = y_BLP + from_state_BLP * log_BL.to(wide).exp().unsqueeze(2)
            to_end_BL1 = (log_BL[:, -1:] - log_BL).to(wide).exp().unsqueeze(2)
            kept_BPN = log_BL[:, -1].to(wide).exp()[:, None, None] * h_BPN
            outputs.append(y_BLP)
            states.append((v_BLP * to_end_BL1).transpose(1, 2) @ B_BLN + kept_BPN)
    y_BLHP = torch.stack(outputs, 2)
    if D is not None:
        y_BLHP = y_BLHP + D[:, None] * x_BLHP
    if seq_idx is not None:
        y_BLHP = y_BLHP.masked_fill((seq_idx < 0)[:, :, None, None], 0)
    return y_BLHP.to(x.dtype), torch.stack(states, 1)


def _to_chunks(tensor: Tensor, chunks: int, size: int, repeat_last: bool = False) -> Tensor:
    """Split (B, L, …) into (B, chunks, size, …), filled up with zeros or with the last position."""
    missing = chunks * size - tensor.shape[1]
    if missing and repeat_last:
        tensor = torch.cat([tensor, tensor[:, -1:].expand(-1, missing)], 1)
    elif missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return tensor.unflatten(1, (chunks, size))


def _segment_sums(x: Tensor) -> Tensor:
    """Sum x[s+1 … q] at (q, s), with -inf above the diagonal: (…, Q) to (…, Q, Q).

    The sums start at s. A difference of two sums from 0 would lose digits by cancellation.
    """
    Q = x.shape[-1]
    ones = torch.ones(Q, Q, dtype=torch.bool, device=x.device)
    rows = x[..., None].expand(*x.shape, Q).masked_fill(~ones.tril(-1), 0)
    return rows.cumsum(-2).masked_fill(~ones.tril(), -torch.inf)


def _sums_after(x: Tensor) -> Tensor:
    """Sum x[q+1 …] at each q of (…, Q)."""
    return F.pad(x[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


# --- the C++ kernel ------------------------------------------------------------------------------
#
# PyTorch adds the bias to the step sizes and applies softplus, because they are small beside the other tensors.


class _Args(ctypes.Structure):
    """Mirror ``SsdArgs`` in csrc/ssd.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "batch", "length", "groups", "heads")),
        *((name, ctypes.c_int64) for name in ("headdim", "states", "chunk", "sharing", "bf16")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_time", "b_batch", "b_time")),
        *((name, ctypes.c_int64) for name in ("c_batch", "c_time", "dy_batch", "dy_time")),
        *((name, ctypes.c_void_p) for name in ("x", "b", "c", "dt", "a", "d", "seq_idx", "state")),
        *((name, ctypes.c_void_p) for name in ("y", "yh", "final_state", "dy", "dfinal")),
        *((name, ctypes.c_void_p) for name in ("dx", "db", "dc", "ddt", "da", "dd", "dstate")),
    )


_LIBRARY = torch.library.Library("recsys_ssm", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? seq_idx, "
    "Tensor? initial_state"
)
# Returns y; with return_final_state the final state; with keep_for_backward the part of y from earlier blocks.
_LIBRARY.define(f"ssd({_INPUTS}, bool return_final_state, bool keep_for_backward) -> Tensor[]")
# Returns the gradients of the floating-point inputs that are passed, in their order.
_LIBRARY.define(
    f"ssd_backward(Tensor? dy, Tensor? dfinal_state, {_INPUTS}, Tensor others) -> Tensor[]"
)


def _by_kernel(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = x.dtype
    if not x.dtype == B.dtype == C.dtype:
        x, B, C = x.float(), B.float(), C.float()
    with torch.autocast("cpu", enabled=False):
        dt = dt.float()
        if seq_idx is not None:
            dt = dt.masked_fill((seq_idx < 0).unsqueeze(-1), 0)
        if dt_bias is not None:
            dt = dt + dt_bias.float()
        if dt_softplus:
            dt = F.softplus(dt)
    D, initial_state = (None if t is None else t.float() for t in (D, initial_state))
    y, *state = torch.ops.recsys_ssm.ssd.default(
        x, dt, A.float(), B, C, D, seq_idx, initial_state, return_final_state, False
    )
    y = y.to(dtype)
    return (y, *state) if return_final_state else y


def _fake(*arguments: Any) -> list[Tensor]:
    """Allocate the outputs of the forward operator."""
    x, _, A, B, *_, return_final_state, keep_for_backward = arguments
    outputs = [empty_like(x)]
    if return_final_state:
        *calls, batch, _, heads, headdim = x.shape
        outputs.append(A.new_empty((*calls, batch, heads, headdim, B.shape[-1])))
    if keep_for_backward:
        outputs.append(A.new_empty(x.shape))
    return outputs


def _backward_fake(*arguments: Any) -> list[Tensor]:
    """Allocate the outputs of the backward operator."""
    x, dt, A, B, C, D, _, initial_state = arguments[2:10]
    return [empty_like(t) for t in (x, dt, A, B, C, D, initial_state) if t is not None]


def _forward_cpu(*arguments: Any) -> list[Tensor]:
    outputs = _fake(*arguments)
    for found, one in each_call(4, 0, outputs, arguments):
        _forward_into(found, *one)
    return outputs


def _forward_into(outputs: Sequence[Tensor], *arguments: Any) -> None:
    *inputs, return_final_state, keep_for_backward = arguments
    left = iter(outputs)
    args, _alive = _arguments(*inputs)
    args.y = next(left).data_ptr()
    if return_final_state:
        args.final_state = next(left).data_ptr()
    if keep_for_backward:
        args.yh = next(left).data_ptr()
    assert _OPERATOR.functions is not None
    _OPERATOR.functions[0](args)


def _backward_cpu(*arguments: Any) -> list[Tensor]:
    gradients = _backward_fake(*arguments)
    for found, one in each_call(4, 2, gradients, arguments):
        _backward_into(found, *one)
    return gradients


def _backward_into(gradients: Sequence[Tensor], *arguments: Any) -> None:
    dy, dfinal_state, *inputs, others = arguments
    x, D, initial_state = inputs[0], inputs[5], inputs[7]
    batch, _, heads, headdim = x.shape
    left = iter(gradients)
    args, _alive = _arguments(*inputs)
    dy = _dense_rows(torch.zeros_like(x) if dy is None else dy.to(x.dtype))
    dfinal_state = None if dfinal_state is None else dfinal_state.float().contiguous()
    # The sums over the batch follow the kernel, in an order that does not depend on the number of threads.
    dA_BH = x.new_empty(batch, heads, dtype=torch.float32)
    dD_BHP = x.new_empty(batch, heads, headdim, dtype=torch.float32)
    args.dy, args.dy_batch, args.dy_time = dy.data_ptr(), dy.stride(0), dy.stride(1)
    args.dfinal = None if dfinal_state is None else dfinal_state.data_ptr()
    args.yh = others.data_ptr()
    args.dx, args.ddt = next(left).data_ptr(), next(left).data_ptr()
    dA = next(left)
    dB, dC = next(left), next(left)
    # Each of the groups that share B and C has a gradient of its own.
    parts = [
        d if args.sharing == 1 else d.new_empty(*d.shape[:2], args.groups, d.shape[3])
        for d in (dB, dC)
    ]
    args.db, args.dc = (part.data_ptr() for part in parts)
    dD = None if D is None else next(left)
    args.dstate = None if initial_state is None else next(left).data_ptr()
    args.da, args.dd = dA_BH.data_ptr(), dD_BHP.data_ptr()
    assert _OPERATOR.functions is not None
    _OPERATOR.functions[1](args)
    if args.sharing > 1:
        for part, d in zip(parts, (dB, dC), strict=True):
            torch.sum(part.unflatten(2, (-1, args.sharing)), 3, out=d)
    torch.sum(dA_BH, 0, out=dA)
    if dD is not None:
        torch.sum(dD_BHP, (0, 2), out=dD)


def _arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[_Args, list[Tensor | None]]:
    """Return the arguments of both directions, and the tensors that must live until the kernel is done."""
    batch, length, heads, headdim = x.shape
    groups, states = B.shape[2:]
    x, B, C = _dense_rows(x), _dense_rows(B), _dense_rows(C)
    seq_idx = None if seq_idx is None else seq_idx.long()
    dense = [None if t is None else t.contiguous() for t in (dt, A, D, seq_idx, initial_state)]
    at = [None if t is None else t.data_ptr() for t in dense]
    threads, per_group = torch.get_num_threads(), heads // groups
    # A task is one group of one row. The heads of a group are split if there are fewer tasks than threads, or if a task
    # would have more channels than the cache of a core has room for.
    wanted = max(-(-threads // max(1, batch * groups)), -(-per_group * headdim // _CHANNELS))
    sharing = next(n for n in range(min(wanted, per_group), 0, -1) if per_group % n == 0)
    args = _Args(
        threads=threads,
        batch=batch,
        length=length,
        groups=groups * sharing,
        heads=per_group // sharing,
        headdim=headdim,
        states=states,
        chunk=_kernel_chunk(length, per_group // sharing * headdim, states),
        sharing=sharing,
        bf16=x.dtype == torch.bfloat16,
        x_batch=x.stride(0),
        x_time=x.stride(1),
        b_batch=B.stride(0),
        b_time=B.stride(1),
        c_batch=C.stride(0),
        c_time=C.stride(1),
        x=x.data_ptr(),
        b=B.data_ptr(),
        c=C.data_ptr(),
        dt=at[0],
        a=at[1],
        d=at[2],
        seq_idx=at[3],
        state=at[4],
    )
    return args, [x, B, C, *dense]


def _dense_rows(x: Tensor) -> Tensor:
    """Return ``x`` with all values of a position side by side, as the kernel reads them."""
    strides, (heads, width) = x.stride(), x.shape[2:]
    dense = (width == 1 or strides[3] == 1) and (heads == 1 or strides[2] == width)
    return x if dense else x.contiguous()


_BLOCK = 16  # kT in csrc/ssd.cpp
_CHANNELS = 512  # of a task: the backward pass then needs about 1.5 MiB at 128 states


def _kernel_chunk(length: int, channels: int, states: int) -> int:
    """Return the chunk length that needs the fewest multiplications and stays in the cache."""
    best, least = _BLOCK, float("inf")
    for chunks in range(1, -(-length // _BLOCK) + 1):
        chunk = -(-length // (chunks * _BLOCK)) * _BLOCK
        within = chunk / 2 * (3 * channels + 4 * states)
        between = 6 * states * channels * (1 - 1 / chunks)
        if chunk <= _LONGEST_CHUNK and within + between < least:
            best, least = chunk, within + between
    return best


_LONGEST_CHUNK = 256


class _Ssd(KernelFunction):
    @staticmethod
    def forward(ctx: Any, return_final_state: bool, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            *public, others = torch.ops.recsys_ssm.ssd.default(*inputs, return_final_state, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, others)
        return tuple(public)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None = None) -> Any:
        if dy is None and dfinal_state is None:
            return (None,) * 9
        *inputs, others = ctx.saved_tensors
        found = torch.ops.recsys_ssm.ssd_backward.default(dy, dfinal_state, *inputs, others)
        left = iter(found)
        seq_idx_at = 6
        return None, *(
            None if x is None or i == seq_idx_at else next(left) for i, x in enumerate(inputs)
        )


def _differentiable(*arguments: Any) -> list[Tensor]:
    *inputs, return_final_state, _ = arguments
    return list(_Ssd.apply(return_final_state, *inputs))


register_operator(
    "ssd",
    _LIBRARY,
    forward=_forward_cpu,
    backward=_backward_cpu,
    forward_fake=_fake,
    backward_fake=_backward_fake,
    differentiable=_differentiable,
)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int | None,
) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise UserError(
            "ssd: x must be (B, L, H, P) and B (B, L, G, N), "
            f"got {tuple(x.shape)} and {tuple(B.shape)}"
        )
    (batch, length, heads, headdim), (groups, states) = x.shape, B.shape[2:]
    if groups == 0 or heads % groups:
        raise UserError(f"ssd: {heads} heads (x) are not a multiple of {groups} groups (B)")
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"ssd: chunk_size must be at least 1, got {chunk_size}")
    check_tensors(
        "ssd",
        ("x", "B"),
        (
            ("dt", dt, (batch, length, heads)),
            ("A", A, (heads,)),
            ("B", B, (batch, length, groups, states)),
            ("C", C, (batch, length, groups, states)),
            ("D", D, (heads,)),
            ("dt_bias", dt_bias, (heads,)),
            ("seq_idx", seq_idx, (batch, length)),
            ("initial_state", initial_state, (batch, heads, headdim, states)),
            ("x", x, (batch, length, heads, headdim)),
        ),
    )
