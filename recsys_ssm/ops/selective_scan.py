"""Selective scan: the recurrence of Mamba (Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling
with Selective State Spaces", arXiv:2312.00752, algorithm 2 and equation 2a).

For every channel e and state n, with a step size Δ that depends on the input::

    h_t[e, n] = exp(Δ_t[e] · A[e, n]) · h_{t-1}[e, n] + Δ_t[e] · B_t[n] · u_t[e]
    y_t[e]    = Σ_n C_t[n] · h_t[e, n] + D[e] · u_t[e]

Three paths, one result: :func:`selective_scan_reference` reads like the formula (and is what every
other path is tested against, in float64); :func:`_scan_loop` is the best plain PyTorch we know, for
any device and dtype; a C++ kernel serves float32 and bfloat16 on CPU, and ``mamba_ssm``'s CUDA
kernel serves CUDA tensors where it is installed.  :func:`selective_scan` chooses.

Legend of shape suffixes: B batch, L length, E channels (``d_inner``), N states (``d_state``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError

__all__ = ["selective_scan", "selective_scan_reference", "selective_scan_step"]


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
    """Run the selective scan over whole sequences, by the fastest path at hand.

    Args:
        u: input, (B, L, E).  Like ``dt``, ``B``, ``C`` and ``z`` it may be a strided view.
        dt: step size Δ, (B, L, E), before ``dt_bias`` and softplus.
        A: decay rate, (E, N); negative for a stable recurrence.
        B: input matrix, (B, L, N).
        C: output matrix, (B, L, N).
        D: skip weight, (E), or None for none.
        z: gate, (B, L, E): the output is multiplied by ``silu(z)``, after the skip.
        dt_bias: added to ``dt`` before the softplus, (E).
        dt_softplus: Δ = softplus(dt + dt_bias) instead of dt + dt_bias.
        seq_idx: which sequence a position belongs to, (B, L), any integer dtype.  -1 is padding,
            wherever it stands: its output is 0, it has no gradient, and the state passes it
            unchanged.  Between two valid positions that differ the state is set to 0, so sequences
            packed into one row do not see each other.
        initial_state: state before the row's first valid position, (B, E, N).
        return_final_state: also return the state after the row's last valid position.

    Returns:
        y (B, L, E) in ``u``'s dtype; with ``return_final_state`` also the state (B, E, N), which is
        float32 (float64 if an input is).  Both are differentiable in every floating-point argument.

    Raises:
        UserError: shapes that do not fit together, a dtype that is not floating point (for
            ``seq_idx``: not an integer), tensors on different devices; it names the argument.
    """
    _check(u, dt, A, B, C, D, z, dt_bias, seq_idx, initial_state)
    y, state = _scan_loop(u, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state)
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
    """One step of :func:`selective_scan`: O(1) in the length of what came before.

    Args:
        state: (B, E, N); left as it is.
        u, dt, z: (B, E).
        A: (E, N).
        B, C: (B, N).
        D, dt_bias: (E).
        dt_softplus: as in :func:`selective_scan`.

    Returns:
        y (B, E) in ``u``'s dtype and the next state (B, E, N) in ``state``'s dtype, which should be
        float32 or wider: rounding the state at every step loses what it remembers.

    Raises:
        UserError: shapes that do not fit together.
    """
    if u.dim() != 2 or state.dim() != 3:
        raise UserError(
            "selective_scan_step: u must be (B, E) and state (B, E, N), "
            f"got {tuple(u.shape)} and {tuple(state.shape)}"
        )
    rows = [None if x is None else x.unsqueeze(1) for x in (u, dt, B, C, z)]
    u_B1E, dt_B1E, B_B1N, C_B1N, z_B1E = rows
    _check(u_B1E, dt_B1E, A, B_B1N, C_B1N, D, z_B1E, dt_bias, None, state)
    wide = _state_dtype(u, dt, A, B, C)
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
    """The formula, written for the reader: no care for speed, no dtype chosen behind your back.

    Arguments as in :func:`selective_scan`; returns y (B, L, E) and the final state (B, E, N).  Give
    it float64 tensors to get the result every other path is measured against.
    """
    batch, length, channels = u.shape
    if seq_idx is None:
        seq_idx = torch.zeros(batch, length, dtype=torch.long, device=u.device)
    h_BEN = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state
    current_B = torch.full((batch,), -1, dtype=seq_idx.dtype, device=u.device)
    outputs = []
    for t in range(length):
        valid_B = seq_idx[:, t] >= 0
        valid_B1, valid_B11 = valid_B[:, None], valid_B[:, None, None]
        new_B11 = (valid_B & (current_B >= 0) & (seq_idx[:, t] != current_B))[:, None, None]
        current_B = torch.where(valid_B, seq_idx[:, t], current_B)

        delta_BE = dt[:, t] if dt_bias is None else dt[:, t] + dt_bias
        if dt_softplus:
            delta_BE = F.softplus(delta_BE)
        # At padding every input is taken as 0, so that not even a NaN there reaches a gradient.
        delta_BE = torch.where(valid_B1, delta_BE, 0)
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
    """The best plain PyTorch: all that is not the recurrence is done for all steps at once.

    Inputs are ``unbind``-ed, because indexing ``x[:, t]`` makes the backward pass quadratic in the
    length (every slice's gradient is a zero tensor of the full size); one exponential a step.
    """
    wide = _state_dtype(u, dt, A, B, C)
    with torch.autocast(u.device.type, enabled=False):
        u_BLE, dt_BLE, B_BLN, C_BLN = (x.to(wide) for x in (u, dt, B, C))
        A_EN = A.to(wide)
        if dt_bias is not None:
            dt_BLE = dt_BLE + dt_bias
        if dt_softplus:
            dt_BLE = F.softplus(dt_BLE)
        keep: tuple[Tensor, ...] | None = None
        if seq_idx is not None:
            pad_BL1 = (seq_idx < 0).unsqueeze(-1)
            # With a step size of 0 the decay is 1 and the input 0: padding passes the state on.
            u_BLE, dt_BLE, B_BLN, C_BLN = (
                x.masked_fill(pad_BL1, 0) for x in (u_BLE, dt_BLE, B_BLN, C_BLN)
            )
            keep = (~_resets(seq_idx)).unbind(1)
        h_BEN = (
            u_BLE.new_zeros(u.shape[0], u.shape[2], A.shape[1])
            if initial_state is None
            else initial_state.to(wide)
        )
        outputs = []
        steps = zip(
            dt_BLE.unsqueeze(-1).unbind(1),
            (dt_BLE * u_BLE).unsqueeze(-1).unbind(1),
            B_BLN.unsqueeze(2).unbind(1),
            C_BLN.unsqueeze(-1).unbind(1),
            strict=True,
        )
        for t, (dt_BE1, dtu_BE1, B_B1N, C_BN1) in enumerate(steps):
            if keep is not None:
                h_BEN = torch.where(keep[t][:, None, None], h_BEN, 0)
            h_BEN = torch.addcmul(dtu_BE1 * B_B1N, torch.exp(dt_BE1 * A_EN), h_BEN)
            outputs.append(torch.bmm(h_BEN, C_BN1))
        y_BLE = torch.cat(outputs, 2).transpose(1, 2) if outputs else torch.zeros_like(u_BLE)
        if D is not None:
            y_BLE = y_BLE + D * u_BLE
        if z is not None:
            z_BLE = z.to(wide) if seq_idx is None else z.to(wide).masked_fill(pad_BL1, 0)
            y_BLE = y_BLE * F.silu(z_BLE)
        if seq_idx is not None:
            y_BLE = y_BLE.masked_fill(pad_BL1, 0)
        return y_BLE.to(u.dtype), h_BEN


def _resets(seq_idx: Tensor) -> Tensor:
    """(B, L) bool: valid positions whose sequence is not that of the valid position before."""
    valid_BL = seq_idx >= 0
    if seq_idx.shape[1] == 0:
        return valid_BL
    position_L = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    last_BL = torch.where(valid_BL, position_L, -1).cummax(1).values
    before_BL = F.pad(last_BL[:, :-1], (1, 0), value=-1)  # last valid position before this one
    same_BL = seq_idx.gather(1, before_BL.clamp(min=0)) == seq_idx
    return valid_BL & (before_BL >= 0) & ~same_BL


def _state_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: states are never kept in half precision."""
    double = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


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
    for name, tensor, shape in (
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
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise UserError(
                f"selective_scan: {name} must have shape {shape} "
                f"(u is {tuple(u.shape)}, A {tuple(A.shape)}), got {tuple(tensor.shape)}"
            )
        if name == "seq_idx":
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise UserError(f"selective_scan: seq_idx must be an integer, got {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise UserError(f"selective_scan: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != u.device:
            raise UserError(f"selective_scan: {name} is on {tensor.device} but u on {u.device}")
