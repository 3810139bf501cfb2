"""Dropout that is cheap on a CPU.

PyTorch draws a Bernoulli number for each element there, one after the other, which costs as much as the matrix
products around it in models this size. Here an element is dropped by comparing 16 random bits of its own, four elements
a draw: several times faster, from the same generator (a seed still decides), and p is rounded to 1/65536.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.ops._vmap import is_batched

_LEVELS = 1 << 16


def dropout(x: Tensor, p: float, *, training: bool = True) -> Tensor:
    """Each element is 0 with probability ``p``, and what remains is scaled up so that the mean stays.

    Args:
        x: Floating point, any shape.
        p: Share dropped, from 0 to 1.
        training: If not, ``x`` is returned as it is.

    Raises:
        ValueError: ``p`` is below 0 or above 1.
    """
    n_dropped = round(p * _LEVELS)
    # Under vmap PyTorch's draws differ from call to call; ours would be the same for all.
    own = x.device.type == "cpu" and not is_batched(x)
    if not training or not own or not 0 < n_dropped < _LEVELS:
        return F.dropout(x, p, training)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.empty_like(x, requires_grad=False, memory_format=torch.contiguous_format)
    torch.ge(bits, n_dropped - _LEVELS // 2, out=kept)
    return x * kept.mul_(_LEVELS / (_LEVELS - n_dropped))


class Dropout(nn.Dropout):
    """:func:`dropout` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)
