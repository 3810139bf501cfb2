"""Mamba-2 beside a long filter: a recurrence that selects, and fixed weights for the places before a token.

Models of fixed filters over the positions (FMLP-Rec, BSARec, WEARec) know more than a recurrence of items that belong
together anywhere in a history, and less of transitions. A layer here computes both from the same token and adds them:

    f[t] = (1 + W x[t]) · Σ_k w[k] x[t-k],   k = 0 … K-1
    y[t] = (1 - s) · mamba2(x)[t] + s · f[t]

Each channel has its own filter w and share s. The filters are causal, where those over frequencies are circular. So a
loss at every position is allowed, and a model can advance one item at a time. At the latest item k is the position from
the end. W lets the token scale what its filter collected, as WEARec lets the mean token scale its frequencies.

Legend: B rows, L tokens, D = d_model, K = filter_length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from recsys_ssm.models.backbones.base import Mixer, Timed, TimedStack
from recsys_ssm.models.backbones.mamba2 import Mamba2Block, Mamba2State
from recsys_ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step


def window_averages(d_model: int, length: int) -> Tensor:
    """Return filters (D, K) whose weights fall exponentially with the distance and sum to 1.

    The distances over which they fall are spread evenly on a logarithmic scale from 1 to K. The last column belongs to
    the token itself.
    """
    reach_D1 = torch.logspace(0, math.log10(length), d_model).unsqueeze(1)
    back_K = torch.arange(length - 1, -1, -1)
    return torch.softmax(-back_K / reach_D1, dim=1)


class FilterMamba2State(NamedTuple):
    """State of a block after the tokens so far."""

    mamba2: Mamba2State
    filter: Tensor
    """(B, D, K - 1), the last tokens."""


class FilterMamba2Block(Mixer):
    """Mix tokens by a Mamba-2 block and by a long filter, as the head of this file says.

    Args:
        d_model: D.
        filter_length: K.
        share: Initial share of the filter in the sum.
        adaptive: Scale the filter's output by the token, with W.
        mamba2: Options of :class:`~recsys_ssm.models.backbones.mamba2.Mamba2Block`.

    Raises:
        ValueError: ``filter_length`` is below 1, or ``share`` is not between 0 and 1.
    """

    def __init__(
        self,
        *,
        d_model: int,
        filter_length: int = 50,
        share: float = 0.5,
        adaptive: bool = True,
        **mamba2: Any,
    ) -> None:
        super().__init__()
        if filter_length < 1:
            raise ValueError(f"filter_length={filter_length}: give at least 1")
        if not 0 < share < 1:
            raise ValueError(f"share={share}: expected a number between 0 and 1")
        self.mamba2 = Mamba2Block(d_model=d_model, **mamba2)
        self.filter = nn.Parameter(window_averages(d_model, filter_length))
        self.share = nn.Parameter(torch.full((d_model,), math.log(share / (1 - share))))
        self.adapt = nn.Linear(d_model, d_model, bias=False) if adaptive else None
        if self.adapt is not None:
            nn.init.normal_(self.adapt.weight, std=0.02)

    def forward(self, x_BLD: Tensor, context: Tensor | Timed | None = None) -> Tensor:
        seq_idx = context.seq_idx if isinstance(context, Timed) else context
        f_BLD = causal_conv1d(x_BLD, self.filter, seq_idx=seq_idx)
        return self._add(x_BLD, self.mamba2(x_BLD, context), f_BLD)

    def init_state(self, batch_size: int) -> FilterMamba2State:
        D, K = self.filter.shape
        return FilterMamba2State(
            self.mamba2.init_state(batch_size), self.filter.new_zeros(batch_size, D, K - 1)
        )

    def step(self, x_BD: Tensor, state: FilterMamba2State) -> tuple[Tensor, FilterMamba2State]:
        y_BD, mamba2 = self.mamba2.step(x_BD, state.mamba2)
        f_BD, last = causal_conv1d_step(x_BD, state.filter, self.filter)
        return self._add(x_BD, y_BD, f_BD), FilterMamba2State(mamba2, last)

    def _add(self, x: Tensor, y: Tensor, f: Tensor) -> Tensor:
        """Return the weighted sum of both outputs for the token x; each token by itself."""
        if self.adapt is not None:
            f = torch.addcmul(f, self.adapt(x), f)
        return torch.lerp(y, f, self.share.sigmoid())


class FilterMamba2(TimedStack):
    """Mamba-2 blocks, each beside a long causal filter over the history, in a :class:`Stack`.

    Args:
        d_model, filter_length, share, adaptive: As in :class:`FilterMamba2Block`.
        n_layers: Number of layers.
        d_state, d_conv, expand, headdim, ngroups, scale_by_time: As in
            :class:`~recsys_ssm.models.backbones.mamba2.Mamba2Block`.
        residual, ffn, norm_eps, stack: Options of :class:`Stack`.

    Example:
        >>> import torch
        >>> from recsys_ssm import FilterMamba2
        >>> backbone = FilterMamba2(d_model=8, n_layers=1, d_state=4, headdim=4, filter_length=10)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, state = backbone.step(torch.randn(2, 8), backbone.init_state(batch_size=2))
        >>> output.shape
        torch.Size([2, 8])
    """

    causal = True
    labels: ClassVar[Mapping[str, str]] = {
        "two_tower": "FT-FilterMamba2",
        "next_item": "FilterMamba2",
    }
    style: ClassVar[Mapping[str, str]] = {"color": "#009e73", "linestyle": ":", "marker": "D"}

    def __init__(
        self,
        *,
        d_model: int = 64,
        n_layers: int = 2,
        filter_length: int = 50,
        share: float = 0.5,
        adaptive: bool = True,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 32,
        ngroups: int = 1,
        scale_by_time: bool = False,
        residual: bool = True,
        ffn: int = 4,
        norm_eps: float = 1e-12,
        **stack: Any,
    ) -> None:
        super().__init__(
            *(
                FilterMamba2Block(
                    d_model=d_model,
                    filter_length=filter_length,
                    share=share,
                    adaptive=adaptive,
                    d_state=d_state,
                    d_conv=d_conv,
                    expand=expand,
                    headdim=headdim,
                    ngroups=ngroups,
                    scale_by_time=scale_by_time,
                )
                for _ in range(n_layers)
            ),
            d_model=d_model,
            residual=residual,
            ffn=ffn,
            norm_eps=norm_eps,
            **stack,
        )
        self.uses_times = scale_by_time
