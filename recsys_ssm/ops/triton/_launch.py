"""Share what the launches of all kernels need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["blocks", "first_positions", "on_device", "power_of_two", "rows"]

_PROGRAMS = 4096
"""Programs at which a launch fills the largest GPUs several times over."""


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of ``x`` the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_two(n: int, least: int, most: int) -> int:
    """Return the smallest power of two that is at least ``n``, within bounds that are powers of two."""
    return min(max(1 << (max(n, 1) - 1).bit_length(), least), most)


def blocks(n: int, size: int) -> int:
    """Return the number of blocks of ``size`` that hold ``n``."""
    return -(-n // size)


def rows(t: Tensor) -> Tensor:
    """Return ``t`` with adjacent values along the last dimension, as the kernels read them."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def first_positions(seq_idx: Tensor) -> Tensor:
    """Return (B,) int32: the first position of each row that is not padding, 0 if there is none."""
    return (seq_idx >= 0).to(torch.uint8).argmax(1).to(torch.int32)


def tiles_of_a_program(tiles: int, others: int) -> int:
    """Return how many tiles a program takes in turn, so that its sums over them are written once.

    Args:
        tiles: Tiles to share out.
        others: Programs for each share, along other dimensions.
    """
    return max(1, min(tiles, tiles * others // _PROGRAMS))
