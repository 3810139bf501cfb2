"""Drop elements at random, fast on a CPU.

PyTorch draws one Bernoulli number after the other there, which costs as much as the matrix products of small models.
Here 16 random bits decide on each element, and one draw serves four elements. This is several times faster. The
generator is the same, so a seed still decides. p is rounded to 1/65536.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.errors import UserError
from recsys_ssm.ops._vmap import is_batched

_LEVELS = 1 << 16


def dropout(x: Tensor, p: float, *, training: bool = True) -> Tensor:
    """Set each element to 0 with probability ``p`` and scale up the others, so that the mean stays.

    Args:
        x: Floating point, any shape.
        p: Share of elements to drop, from 0 to 1.
        training: If False, return ``x`` as it is.

    Raises:
        UserError: ``p`` is below 0 or above 1.
    """
    if not 0 <= p <= 1:
        raise UserError(f"dropout probability {p}: not between 0 and 1; pass a share")
    n_dropped = round(p * _LEVELS)
    # Under vmap PyTorch draws other numbers for each call. Ours would be the same for all calls.
    own = x.device.type == "cpu" and not is_batched(x)
    if not training or not own or not 0 < n_dropped < _LEVELS:
        return F.dropout(x, p, training)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.empty_like(x, requires_grad=False, memory_format=torch.contiguous_format)
    torch.ge(bits, n_dropped - _LEVELS // 2, out=kept)
    return x * kept.mul_(_LEVELS / (_LEVELS - n_dropped))


class Dropout(nn.Dropout):
    """Apply :func:`dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)
