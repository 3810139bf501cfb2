"""State space duality by the trapezoidal rule: the recurrence of Mamba-3 (arXiv:2603.15569).

For every head h with its P channels p, N states n and R ranks r, with B and C shared by the heads of a group::

    k_t[r] = rotate(B_t[r] + B_bias[r], θ_t)        q_t[r] = rotate(C_t[r] + C_bias[r], θ_t)
    h_t    = exp(log_decay_t) · (h_{t-1} + past_t · Σ_r x_{t-1}[r] k_{t-1}[r]ᵀ) + own_t · Σ_r x_t[r] k_t[r]ᵀ
    y_t[r] = h_t q_t[r] + D · x_t[r]

A step adds its own outer products and, a second time, those of the step before: the trapezoidal rule. Position j
therefore weighs own_j + past_{j+1} for every later step and own_j for its own. So one pass of attention with these
weights is enough, and no term is subtracted.

Keys and queries belong to a head, since bias and angles do. The C++ kernel biases and rotates them as it reads B and C,
so they are never stored. :func:`_chunked` is plain PyTorch, for any device and dtype; :func:`trapezoidal_ssd_reference`
reads like the formula.

Legend of shape suffixes: B batch, L length, R ranks, H heads, P channels of a head (``headdim``), G groups, N states
(``d_state``), A rotated pairs of states. In the chunked form: K chunks of Q steps each; T = Q·R positions of a chunk,
and the second T of a pair is written S.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

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
from recsys_ssm.ops._vmap import each_call
from recsys_ssm.ops.selective_scan import _resets

__all__ = ["rotate", "trapezoidal_ssd", "trapezoidal_ssd_reference"]

_OPERATOR = Operator(
    "trapezoidal_ssd",
    kernels=("recsys_trapezoidal_ssd_forward", "recsys_trapezoidal_ssd_backward"),
)


def rotate(x: Tensor, angle: Tensor, *, halves: bool = False) -> Tensor:
    """Rotate the first pairs of the last dimension.

    Args:
        x: (…, N), N even.
        angle: (…, A) radians, A at most N / 2. The other pairs stay.
        halves: Pairs are (i, N/2 + i) if True, else (2i, 2i + 1).

    Returns:
        (…, N).
    """
    half = x.shape[-1] // 2
    first, second = (
        x.unflatten(-1, (2, half)).unbind(-2) if halves else x.unflatten(-1, (half, 2)).unbind(-1)
    )
    still = half - angle.shape[-1]
    cos, sin = F.pad(angle.cos(), (0, still), value=1.0), F.pad(angle.sin(), (0, still))
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)


def trapezoidal_ssd(
    x: Tensor,
    log_decay: Tensor,
    past: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angle: Tensor,
    D: Tensor | None = None,
    *,
    halves: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Run Mamba-3's recurrence over whole sequences, by the fastest path available.

    Args:
        x: Input, (B, L, R, H, P). Like ``B`` and ``C`` it may be a strided view.
        log_decay: Logarithm of each step's decay, (B, L, H), at most 0 for a stable recurrence.
        past: Weight of the step before, (B, L, H). It is not used at a sequence's first step.
        own: Weight of the step itself, (B, L, H).
        B: Input matrix, (B, L, R, G, N). H must be a multiple of G; head h reads group h // (H / G). N is even.
        C: Output matrix, (B, L, R, G, N).
        B_bias, C_bias: Terms added to ``B`` and ``C``, (H, R, N).
        angle: Angles θ of rotation, (B, L, H, A) radians, A at most N / 2. Only differences within a sequence count.
        D: Skip weight, (H), or None.
        halves: Rotated pairs of states are (i, N/2 + i) if True, else (2i, 2i + 1).
        seq_idx: As in :func:`~recsys_ssm.ops.ssd.ssd`: number of the sequence at each position, (B, L); -1 is padding,
            where the output is 0 and nothing has a gradient.
        chunk_size: Steps that plain PyTorch treats as one block of attention. It changes speed and memory, not the
            result. None chooses one. The C++ kernel always chooses its own.

    Returns:
        y (B, L, R, H, P) in ``x``'s dtype, differentiable in every floating-point argument.

    Raises:
        UserError: Shapes do not fit together, a dtype is not floating point (``seq_idx``: not an integer), or tensors
            are on different devices. The message names the argument.
    """
    _check(x, log_decay, past, own, B, C, B_bias, C_bias, angle, D, seq_idx, chunk_size)
    if is_exporting():
        return _matrix_form(
            x, log_decay, past, own, B, C, B_bias, C_bias, angle, D, halves, seq_idx
        )
    floats = (x, log_decay, past, own, B, C, B_bias, C_bias, angle) + (() if D is None else (D,))
    rank = x.shape[2]
    if x.numel() > 0 and rank <= _BLOCK and _OPERATOR.takes(*floats) and kernels_differentiate():
        return _by_kernel(x, log_decay, past, own, B, C, B_bias, C_bias, angle, D, halves, seq_idx)
    return _chunked(
        x, log_decay, past, own, B, C, B_bias, C_bias, angle, D, halves, seq_idx, chunk_size
    )


def trapezoidal_ssd_reference(
    x: Tensor,
    log_decay: Tensor,
    past: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angle: Tensor,
    D: Tensor | None = None,
    *,
    halves: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Compute the formula step by step in the plainest way, in the dtype of the inputs.

    Takes the arguments of :func:`trapezoidal_ssd`. The tests hold the other paths against its float64 result.
    """
    batch, length, _, heads, headdim = x.shape
    groups, states = B.shape[3:]
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.long, device=x.device)
    h_BHPN = x.new_zeros(batch, heads, headdim, states)
    added_BHPN = torch.zeros_like(h_BHPN)
    outputs = []
    for t in range(length):
        valid_B = seq_idx[:, t] >= 0
        new_B = seq_idx[:, t] != seq_idx[:, t - 1] if t else torch.ones_like(valid_B)
        valid_B111, new_B111 = valid_B[:, None, None, None], new_B[:, None, None, None]

        def of_head(matrix: Tensor, bias: Tensor, t: int = t, valid: Tensor = valid_B111) -> Tensor:
            row_BRHN = torch.where(valid, matrix[:, t], 0).repeat_interleave(heads // groups, 2)
            angle_B1HA = torch.where(valid, angle[:, t, None], 0)
            return rotate(row_BRHN + bias.transpose(0, 1), angle_B1HA, halves=halves)

        k_BRHN, q_BRHN = of_head(B, B_bias), of_head(C, C_bias)
        x_BRHP = torch.where(valid_B111, x[:, t], 0)
        # Inputs at padding count as 0, so that not even a NaN there reaches a gradient.
        decay_BH, past_BH, own_BH = (
            torch.where(valid_B[:, None], step[:, t], 0)[:, :, None, None]
            for step in (log_decay, past, own)
        )
        before_BHPN = torch.where(new_B111, 0, h_BHPN + past_BH * added_BHPN)
        added_BHPN = torch.einsum("brhp,brhn->bhpn", x_BRHP, k_BRHN)
        h_BHPN = decay_BH.exp() * before_BHPN + own_BH * added_BHPN
        y_BRHP = torch.einsum("bhpn,brhn->brhp", h_BHPN, q_BRHN)
        if D is not None:
            y_BRHP = y_BRHP + D[:, None] * x_BRHP
        outputs.append(torch.where(valid_B111, y_BRHP, 0))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x)


def _chunked(
    x: Tensor,
    log_decay: Tensor,
    past: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angle: Tensor,
    D: Tensor | None,
    halves: bool,
    seq_idx: Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    """Compute attention within each chunk and pass a state from chunk to chunk, all in matrix products."""
    wide = state_dtype(x, log_decay, past, own, B, C, B_bias, C_bias, angle, D)
    _, length, rank, heads, _ = x.shape
    dtype = x.dtype
    if x.numel() == 0:
        return x.clone()
    Q = min(chunk_size or 64, length)
    K = -(-length // Q)
    with torch.autocast(x.device.type, enabled=False):
        x, log_decay, past, own, B, C, angle = (
            _without_padding(t, wide, seq_idx) for t in (x, log_decay, past, own, B, C, angle)
        )
        per_group = heads // B.shape[3]
        k_BHKTN, q_BHKTN = (
            _positions(
                rotate(
                    matrix.repeat_interleave(per_group, 3) + bias.to(wide).transpose(0, 1),
                    angle.unsqueeze(2),
                    halves=halves,
                ),
                K,
                Q,
            )
            for matrix, bias in ((B, B_bias), (C, C_bias))
        )
        x_BHKTP = _positions(x, K, Q)
        log_a_BHKQ, own_BHKQ = (_steps(t, K, Q) for t in (log_decay, own))
        # A position's weight for later steps. That of a chunk's last step reaches into the next chunk.
        scale_BHKQ = _steps(own + F.pad(past[:, 1:], (0, 0, 0, 1)), K, Q)

        weight_BHKQQ = _segment_sums(log_a_BHKQ).exp()
        to_end_BHKQ = F.pad(log_a_BHKQ[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1).exp()
        from_start_BHKQ = log_a_BHKQ.cumsum(-1).exp()
        keep_BHK = from_start_BHKQ[..., -1]
        if seq_idx is not None:
            # Numbers along the row: two steps are of one sequence if and only if their numbers are equal.
            number_BL = F.pad(_resets(seq_idx).cumsum(1), (0, K * Q - length), value=-1)
            number_BKQ = number_BL.unflatten(1, (K, Q))
            last_BK = number_BKQ[:, :, -1]
            first_BK = F.pad(last_BK[:, :-1], (1, 0), value=-2)
            apart_BKQQ = number_BKQ[..., :, None] != number_BKQ[..., None, :]
            weight_BHKQQ = weight_BHKQQ.masked_fill(apart_BKQQ[:, None], 0)
            to_end_BHKQ = to_end_BHKQ.masked_fill((number_BKQ != last_BK[..., None])[:, None], 0)
            from_start_BHKQ = from_start_BHKQ.masked_fill(
                (number_BKQ != first_BK[..., None])[:, None], 0
            )
            keep_BHK = keep_BHK.masked_fill((first_BK != last_BK)[:, None], 0)
        weight_BHKQQ = (weight_BHKQQ * scale_BHKQ.unsqueeze(-2)).tril(-1)
        weight_BHKQQ = weight_BHKQQ + torch.diag_embed(own_BHKQ)
        weight_BHKTS, scaled_to_end_BHKT, from_start_BHKT = (
            weight_BHKQQ,
            scale_BHKQ * to_end_BHKQ,
            from_start_BHKQ,
        )
        if rank > 1:
            weight_BHKTS = weight_BHKTS.repeat_interleave(rank, -1).repeat_interleave(rank, -2)
            scaled_to_end_BHKT, from_start_BHKT = (
                t.repeat_interleave(rank, -1) for t in (scaled_to_end_BHKT, from_start_BHKT)
            )
        y_BHKTP = (q_BHKTN @ k_BHKTN.transpose(-1, -2) * weight_BHKTS) @ x_BHKTP

        if K > 1:
            new_BHKNP = k_BHKTN.transpose(-1, -2) @ (x_BHKTP * scaled_to_end_BHKT[..., None])
            h_BHNP = torch.zeros_like(new_BHKNP[:, :, 0])
            starts = []
            for keep_BH, added_BHNP in zip(keep_BHK.unbind(2), new_BHKNP.unbind(2), strict=True):
                starts.append(h_BHNP)
                h_BHNP = keep_BH[..., None, None] * h_BHNP + added_BHNP
            y_BHKTP = y_BHKTP + from_start_BHKT[..., None] * (q_BHKTN @ torch.stack(starts, 2))
        y_BLRHP = (
            y_BHKTP.unflatten(3, (Q, rank)).permute(0, 2, 3, 4, 1, 5).flatten(1, 2)[:, :length]
        )
        if D is not None:
            y_BLRHP = y_BLRHP + D.to(wide)[:, None] * x
        return _without_padding(y_BLRHP, dtype, seq_idx)


def _matrix_form(
    x: Tensor,
    log_decay: Tensor,
    past: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angle: Tensor,
    D: Tensor | None,
    halves: bool,
    seq_idx: Tensor | None,
) -> Tensor:
    """Compute attention over whole rows of one sequence each, head by head, for export with any length.

    Head by head, so that one matrix of weights a row is in memory. Sums of logarithms are float64, because their
    differences would lose digits in float32.
    """
    wide = state_dtype(x, log_decay, past, own, B, C, B_bias, C_bias, angle, D)
    batch, length, rank, heads, _ = x.shape
    dtype = x.dtype
    x, log_decay, past, own, B, C, angle = (
        _without_padding(t, wide, seq_idx) for t in (x, log_decay, past, own, B, C, angle)
    )
    log_BLH = log_decay.double().cumsum(1)
    scale_BLH = own + F.pad(past[:, 1:], (0, 0, 0, 1))
    here_L = torch.arange(length, device=x.device)
    earlier_LL, itself_LL = (
        compare(here_L.unsqueeze(1), here_L).to(wide) for compare in (torch.gt, torch.eq)
    )
    later_LL = here_L.unsqueeze(1) < here_L
    per_group = heads // B.shape[3]
    outputs = []
    for h in range(heads):
        k_BTN, q_BTN = (
            rotate(
                matrix[:, :, :, h // per_group] + bias[h].to(wide),
                angle[:, :, h : h + 1],
                halves=halves,
            ).flatten(1, 2)
            for matrix, bias in ((B, B_bias), (C, C_bias))
        )
        between_BLL = (log_BLH[:, :, h].unsqueeze(2) - log_BLH[:, :, h].unsqueeze(1)).to(wide)
        decay_BLL = between_BLL.masked_fill(later_LL, -torch.inf).exp()
        weight_BLL = decay_BLL * (
            earlier_LL * scale_BLH[:, :, h].unsqueeze(1) + itself_LL * own[:, :, h].unsqueeze(1)
        )
        product_BTS = q_BTN @ k_BTN.transpose(1, 2)
        if rank > 1:
            product_BLRLR = product_BTS.reshape(batch, length, rank, length, rank)
            weighted_BTS = (
                (product_BLRLR * weight_BLL[:, :, None, :, None]).flatten(3).flatten(1, 2)
            )
        else:
            weighted_BTS = product_BTS * weight_BLL
        y_BTP = weighted_BTS @ x[:, :, :, h].flatten(1, 2)
        outputs.append(y_BTP.reshape(batch, length, rank, x.shape[4]))
    y_BLRHP = torch.stack(outputs, 3)
    if D is not None:
        y_BLRHP = y_BLRHP + D.to(wide)[:, None] * x
    return _without_padding(y_BLRHP, dtype, seq_idx)


def _without_padding(tensor: Tensor, dtype: torch.dtype, seq_idx: Tensor | None) -> Tensor:
    """Return (B, L, …) in ``dtype``, with zeros at padding."""
    tensor = tensor.to(dtype)
    if seq_idx is None:
        return tensor
    return tensor.masked_fill((seq_idx < 0).reshape(*seq_idx.shape, *(1,) * (tensor.dim() - 2)), 0)


def _positions(x_BLRHN: Tensor, chunks: int, size: int) -> Tensor:
    """Return (B, H, K, T, N), filled up with zeros."""
    missing = chunks * size - x_BLRHN.shape[1]
    x_BKQRHN = F.pad(x_BLRHN, (0, 0, 0, 0, 0, 0, 0, missing)).unflatten(1, (chunks, size))
    return x_BKQRHN.permute(0, 4, 1, 2, 3, 5).flatten(3, 4)


def _steps(x_BLH: Tensor, chunks: int, size: int) -> Tensor:
    """Return (B, H, K, Q), filled up with zeros."""
    missing = chunks * size - x_BLH.shape[1]
    return F.pad(x_BLH, (0, 0, 0, missing)).unflatten(1, (chunks, size)).permute(0, 3, 1, 2)


def _segment_sums(x: Tensor) -> Tensor:
    """Sum x[s+1 … q] at (q, s), with -inf above the diagonal: (…, Q) to (…, Q, Q)."""
    Q = x.shape[-1]
    ones = torch.ones(Q, Q, dtype=torch.bool, device=x.device)
    rows = x[..., None].expand(*x.shape, Q).masked_fill(~ones.tril(-1), 0)
    return rows.cumsum(-2).masked_fill(~ones.tril(), -torch.inf)


# --- the C++ kernel ------------------------------------------------------------------------------


class _Args(ctypes.Structure):
    """Mirror ``TrapezoidalSsdArgs`` in csrc/trapezoidal_ssd.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("threads", "batch", "length", "rank")),
        *((name, ctypes.c_int64) for name in ("groups", "heads", "headdim", "states")),
        *((name, ctypes.c_int64) for name in ("angles", "halves", "chunk", "sharing")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_time", "b_batch", "b_time")),
        *((name, ctypes.c_int64) for name in ("c_batch", "c_time", "dy_batch", "dy_time")),
        *((name, ctypes.c_void_p) for name in ("x", "b", "c", "b_bias", "c_bias", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("log_decay", "past", "own", "d", "seq_idx")),
        *((name, ctypes.c_void_p) for name in ("y", "dy", "dx", "db", "dc", "db_bias", "dc_bias")),
        *((name, ctypes.c_void_p) for name in ("dangle", "dlog_decay", "dpast", "down", "dd")),
    )


_LIBRARY = torch.library.Library("recsys_ssm", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor log_decay, Tensor past, Tensor own, Tensor B, Tensor C, Tensor B_bias, Tensor C_bias, "
    "Tensor angle, Tensor? D, Tensor? seq_idx, bool halves"
)
# Returns y, and the cosines and sines of the angles.
_LIBRARY.define(f"trapezoidal_ssd({_INPUTS}) -> Tensor[]")
# Returns the gradients of the floating-point inputs that are passed, in their order.
_LIBRARY.define(
    f"trapezoidal_ssd_backward(Tensor dy, {_INPUTS}, Tensor cos, Tensor sin) -> Tensor[]"
)
_BLOCK = 16  # kT in csrc/matrix.h


def _by_kernel(
    x: Tensor,
    log_decay: Tensor,
    past: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angle: Tensor,
    D: Tensor | None,
    halves: bool,
    seq_idx: Tensor | None,
) -> Tensor:
    dtype, rank = x.dtype, x.shape[2]
    x, log_decay, past, own, B, C, B_bias, C_bias, angle = (
        t.float() for t in (x, log_decay, past, own, B, C, B_bias, C_bias, angle)
    )
    # The kernel wants a rank that divides its block. A rank of zeros adds nothing.
    missing = (1 << (rank - 1).bit_length()) - rank
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
        B, C = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (B, C))
        B_bias, C_bias = (F.pad(t, (0, 0, 0, missing)) for t in (B_bias, C_bias))
    D = None if D is None else D.float()
    y = torch.ops.recsys_ssm.trapezoidal_ssd.default(
        x, log_decay, past, own, B, C, B_bias, C_bias, angle, D, seq_idx, halves
    )[0]
    return (y[:, :, :rank] if missing else y).to(dtype)


def _fake(*arguments: Any) -> list[Tensor]:
    """Allocate the outputs of the forward operator."""
    return [empty_like(arguments[0]), empty_like(arguments[8]), empty_like(arguments[8])]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    """Allocate the outputs of the backward operator."""
    return [empty_like(t) for t in arguments[1:11] if t is not None]


def _forward_cpu(*arguments: Any) -> list[Tensor]:
    outputs = _fake(*arguments)
    torch.cos(arguments[8], out=outputs[1])
    torch.sin(arguments[8], out=outputs[2])
    for found, one in each_call(5, 0, outputs, arguments):
        args, _alive = _arguments(*one, *found[1:])
        args.y = found[0].data_ptr()
        assert _OPERATOR.functions is not None
        _OPERATOR.functions[0](args)
    return outputs


def _backward_cpu(*arguments: Any) -> list[Tensor]:
    gradients = _backward_fake(*arguments)
    for found, one in each_call(5, 1, gradients, arguments):
        _backward_into(found, *one)
    return gradients


def _backward_into(gradients: Sequence[Tensor], *arguments: Any) -> None:
    dy, *inputs = arguments
    args, _alive = _arguments(*inputs)
    dy = _dense_rows(dy.float())
    args.dy, args.dy_batch, args.dy_time = dy.data_ptr(), dy.stride(0), dy.stride(1)
    dx, dlog_decay, dpast, down, dB, dC, dB_bias, dC_bias, dangle, *dD = gradients
    args.dx, args.dangle = dx.data_ptr(), dangle.data_ptr()
    args.dlog_decay, args.dpast, args.down = (t.data_ptr() for t in (dlog_decay, dpast, down))
    # Each of the groups that share B and C has a gradient of its own.
    parts = [
        d if args.sharing == 1 else d.new_empty(*d.shape[:3], args.groups, d.shape[4])
        for d in (dB, dC)
    ]
    args.db, args.dc = (part.data_ptr() for part in parts)
    # The sums over the batch follow the kernel, in an order that does not depend on the number of threads.
    batch = dy.shape[0]
    rows = [d.new_empty(batch, *d.shape) for d in (dB_bias, dC_bias, dB_bias[:, 0, 0])]
    args.db_bias, args.dc_bias, args.dd = (row.data_ptr() for row in rows)
    assert _OPERATOR.functions is not None
    _OPERATOR.functions[1](args)
    if args.sharing > 1:
        for part, d in zip(parts, (dB, dC), strict=True):
            torch.sum(part.unflatten(3, (-1, args.sharing)), 4, out=d)
    for row, d in zip(rows, (dB_bias, dC_bias, *dD), strict=False):
        torch.sum(row, 0, out=d)


def _arguments(
    x: Tensor,
    log_decay: Tensor,
    past: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angle: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    halves: bool,
    cos: Tensor,
    sin: Tensor,
) -> tuple[_Args, list[Tensor | None]]:
    """Return the arguments of both directions, and the tensors that must live until the kernel is done."""
    batch, length, rank, heads, headdim = x.shape
    groups, states = B.shape[3:]
    x, B, C = _dense_rows(x), _dense_rows(B), _dense_rows(C)
    seq_idx = None if seq_idx is None else seq_idx.long()
    dense = [
        None if t is None else t.contiguous()
        for t in (B_bias, C_bias, cos, sin, log_decay, past, own, D, seq_idx)
    ]
    names = ("b_bias", "c_bias", "cos", "sin", "log_decay", "past", "own", "d", "seq_idx")
    at = {name: None if t is None else t.data_ptr() for name, t in zip(names, dense, strict=True)}
    threads, per_group = torch.get_num_threads(), heads // groups
    # A task is one group of one row. If there are fewer tasks than threads, the heads of a group are split.
    wanted = -(-threads // max(1, batch * groups))
    sharing = next(n for n in range(min(wanted, per_group), 0, -1) if per_group % n == 0)
    args = _Args(
        threads=threads,
        batch=batch,
        length=length,
        rank=rank,
        groups=groups * sharing,
        heads=per_group // sharing,
        headdim=headdim,
        states=states,
        angles=angle.shape[-1],
        halves=halves,
        chunk=_kernel_chunk(length * rank, headdim, states),
        sharing=sharing,
        x_batch=x.stride(0),
        x_time=x.stride(1),
        b_batch=B.stride(0),
        b_time=B.stride(1),
        c_batch=C.stride(0),
        c_time=C.stride(1),
        x=x.data_ptr(),
        b=B.data_ptr(),
        c=C.data_ptr(),
        **at,
    )
    return args, [x, B, C, *dense]


def _dense_rows(x: Tensor) -> Tensor:
    """Return ``x`` (B, L, …) with all values of a position side by side, as the kernel reads them."""
    width = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size > 1 and stride != width:
            return x.contiguous()
        width *= size
    return x


def _kernel_chunk(positions: int, headdim: int, states: int) -> int:
    """Return the number of positions of a chunk that needs the fewest multiplications and stays in the cache."""
    best, least = _BLOCK, float("inf")
    for chunks in range(1, -(-positions // _BLOCK) + 1):
        chunk = -(-positions // (chunks * _BLOCK)) * _BLOCK
        within = chunk / 2 * (3 * headdim + 4 * states)
        between = 6 * states * headdim * (1 - 1 / chunks)
        if chunk <= _LONGEST_CHUNK and within + between < least:
            best, least = chunk, within + between
    return best


_LONGEST_CHUNK = 128


class _TrapezoidalSsd(KernelFunction):
    @staticmethod
    def forward(ctx: Any, halves: bool, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, cos, sin = torch.ops.recsys_ssm.trapezoidal_ssd.default(*inputs, halves)
        ctx.halves = halves
        ctx.save_for_backward(*inputs, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *inputs, cos, sin = ctx.saved_tensors
        found = torch.ops.recsys_ssm.trapezoidal_ssd_backward.default(
            dy, *inputs, ctx.halves, cos, sin
        )
        left = iter(found)
        return None, *(None if x is None else next(left) for x in inputs[:10]), None


def _differentiable(*arguments: Any) -> list[Tensor]:
    *inputs, halves = arguments
    y = _TrapezoidalSsd.apply(halves, *inputs)
    angle = inputs[8].detach()
    return [y, angle, angle]  # nobody reads cosines and sines above autograd


register_operator(
    "trapezoidal_ssd",
    _LIBRARY,
    forward=_forward_cpu,
    backward=_backward_cpu,
    forward_fake=_fake,
    backward_fake=_backward_fake,
    differentiable=_differentiable,
)


def _check(
    x: Tensor,
    log_decay: Tensor,
    past: Tensor,
    own: Tensor,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    angle: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int | None,
) -> None:
    if x.dim() != 5 or B.dim() != 5 or angle.dim() != 4:
        raise UserError(
            "trapezoidal_ssd: x must be (B, L, R, H, P), B (B, L, R, G, N) and angle (B, L, H, A), "
            f"got {tuple(x.shape)}, {tuple(B.shape)} and {tuple(angle.shape)}"
        )
    (batch, length, rank, heads, headdim), (groups, states) = x.shape, B.shape[3:]
    if groups == 0 or heads % groups:
        raise UserError(
            f"trapezoidal_ssd: {heads} heads (x) are not a multiple of {groups} groups (B)"
        )
    if states == 0 or states % 2:
        raise UserError(f"trapezoidal_ssd: B has {states} states; give an even number of them")
    if angle.shape[-1] > states // 2:
        raise UserError(
            f"trapezoidal_ssd: angle has {angle.shape[-1]} values a head, but {states} states have "
            f"{states // 2} pairs to rotate"
        )
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"trapezoidal_ssd: chunk_size must be at least 1, got {chunk_size}")
    steps, matrix, bias = (
        (batch, length, heads),
        (batch, length, rank, groups, states),
        (heads, rank, states),
    )
    check_tensors(
        "trapezoidal_ssd",
        ("x", "B"),
        (
            ("x", x, (batch, length, rank, heads, headdim)),
            ("log_decay", log_decay, steps),
            ("past", past, steps),
            ("own", own, steps),
            ("B", B, matrix),
            ("C", C, matrix),
            ("B_bias", B_bias, bias),
            ("C_bias", C_bias, bias),
            ("angle", angle, (*steps, angle.shape[-1])),
            ("D", D, (heads,)),
            ("seq_idx", seq_idx, (batch, length)),
        ),
    )
