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
from recsys_ssm.ops._operators import empty_like
from recsys_ssm.ops._vmap import in_transform

_LEVELS = 1 << 16


def dropout(x: Tensor, p: float, *, training: bool = True) -> Tensor:
    """Set each element to 0 with probability ``p`` and scale up the others, so that the mean stays.

    Args:
        x: Floating point, any shape.
        p: Share of elements to drop, from 0 to 1.
        training: If False, return ``x`` as it is.

    Raises:
        UserError: ``p`` is below 0 or above 1, or ``x`` is not floating point.
    """
    if not 0 <= p <= 1:
        raise UserError(f"dropout probability {p}: not between 0 and 1; pass a share")
    if not x.is_floating_point():
        raise UserError(f"dropout: x is {x.dtype}; pass floating point")
    n_dropped = round(p * _LEVELS)
    # Under vmap PyTorch draws other numbers for each call. Ours would be the same for all calls.
    own = x.device.type == "cpu" and not in_transform(x)
    if not training or not own or not 0 < n_dropped < _LEVELS:
        return F.dropout(x, p, training)
    # The graph of torch.compile has one node for the draw. Eager calls are faster without the dispatcher.
    if torch.compiler.is_compiling():
        return x * torch.ops.recsys_ssm.dropout_scale.default(x, n_dropped)
    return x * _scale(x, n_dropped)


def _scale(x: Tensor, n_dropped: int) -> Tensor:
    """Draw the factor of each element: 0 with probability ``n_dropped`` / 65536."""
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    kept = empty_like(x)
    torch.ge(bits, n_dropped - _LEVELS // 2, out=kept)
    return kept.mul_(_LEVELS / (_LEVELS - n_dropped))


def _without_gradient(x: Tensor, n_dropped: int) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.recsys_ssm.dropout_scale.default(x, n_dropped)


_LIBRARY = torch.library.Library("recsys_ssm", "FRAGMENT")
_LIBRARY.define(
    "dropout_scale(Tensor x, int n_dropped) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)
_LIBRARY.impl("dropout_scale", _scale, "CPU")
_LIBRARY.impl("dropout_scale", _without_gradient, "Autograd")
torch.library.register_fake(
    "recsys_ssm::dropout_scale", lambda x, n_dropped: empty_like(x), lib=_LIBRARY
)


class Dropout(nn.Dropout):
    """Apply :func:`dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, training=self.training)
