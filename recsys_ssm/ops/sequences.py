"""Work with sequences packed into rows, each with an initial state and a final state of its own.

The operators take packed rows as they are, with one state in and one state out for each row. Serving has to continue
many histories, and so needs the states of all of them: use :func:`each_sequence`.

Legend: B rows, L positions, S sequences in the rows, M positions of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError

__all__ = ["Sequences", "each_sequence", "seq_idx_of", "sequences_of", "starts_of"]


class Sequences(NamedTuple):
    """Places of the sequences in packed rows, ordered by row and position."""

    row: Tensor
    """(S,) int64."""
    start: Tensor
    """(S,) int64, the first position."""
    length: Tensor
    """(S,) int64, at least 1."""


def starts_of(seq_idx: Tensor) -> Tensor:
    """Mark (B, L) the positions where a sequence begins."""
    new = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)[:, : seq_idx.shape[1]]
    return (seq_idx >= 0) & new


def sequences_of(seq_idx: Tensor) -> Sequences:
    """Find the sequences that ``seq_idx`` (B, L) marks: equal neighbours are one, -1 is padding and ends one."""
    starts = starts_of(seq_idx)
    row, start = starts.nonzero(as_tuple=True)
    number = starts.flatten().cumsum(0)[(seq_idx >= 0).flatten()] - 1
    return Sequences(row, start, torch.bincount(number, minlength=row.numel()))


def seq_idx_of(cu_seqlens: Tensor) -> Tensor:
    """Make the row (1, L) of sequences that lie end to end, from their bounds ``cu_seqlens`` (S + 1), 0 … L.

    Raises:
        UserError: The bounds do not rise from 0.
    """
    length = cu_seqlens.diff()
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens[0] != 0 or (length < 0).any():
        raise UserError(f"cu_seqlens must rise from 0, got {cu_seqlens.tolist()}")
    return torch.arange(len(length), device=length.device).repeat_interleave(length).unsqueeze(0)


def each_sequence(
    operator: Callable[..., Any],
    over_time: Mapping[str, Tensor],
    seq_idx: Tensor,
    *,
    initial_state: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Run a causal operator on packed rows, with a state in and out for each sequence.

    >>> y, states = each_sequence(selective_scan, {"u": u, "dt": dt, "B": B, "C": C}, seq_idx, A=A)

    This pads every sequence to the longest, so it costs more than the packed call if lengths differ much. If you need
    only the output, call ``operator(…, seq_idx=seq_idx)``.

    Args:
        operator: ``selective_scan``, ``ssd`` or ``causal_conv1d``.
        over_time: The operator's arguments of shape (B, L, …), by name.
        seq_idx: (B, L).
        initial_state: (S, …), a state for each sequence in the order of :func:`sequences_of`; None for zeros.
        others: The operator's other arguments.

    Returns:
        The output (B, L, …), 0 at padding, and the state after each sequence (S, …). Both are differentiable in
        every floating-point argument.

    Raises:
        UserError: As the operator.
    """
    B, L = seq_idx.shape
    for name, x in over_time.items():
        if x.shape[:2] != (B, L):
            raise UserError(f"{name} is {tuple(x.shape)}: expected ({B}, {L}, …), as seq_idx")
    row, start, length = sequences_of(seq_idx)
    if initial_state is not None and len(initial_state) != len(row):
        raise UserError(f"initial_state has {len(initial_state)} states for {len(row)} sequences")
    here_M = torch.arange(int(length.max()) if len(row) else 0, device=seq_idx.device)
    inside_SM = here_M < length.unsqueeze(1)
    at_SM = ((row * L + start).unsqueeze(1) + here_M).where(inside_SM, 0)
    y, state = operator(
        **{name: x.flatten(0, 1)[at_SM] for name, x in over_time.items()},
        **others,
        seq_idx=torch.where(inside_SM, 0, -1),
        initial_state=initial_state,
        return_final_state=True,
    )
    packed = y.new_zeros(B * L, *y.shape[2:]).index_put((at_SM[inside_SM],), y[inside_SM])
    return packed.unflatten(0, (B, L)), state
