"""HSTU: attention without softmax, weighed by place and by time (Zhai et al. 2024, arXiv 2402.17152).

    u, v, q, k = split(SiLU(W norm(x)))
    a = SiLU(q kᵀ + position bias + time bias) / max_length        causal
    x = x + W_o drop(norm(a v) · u)

The position bias is a weight for each distance i - j. The time bias is a weight for each bucket of the time between the
event at j and the moment that the outputs of i are asked for. The authors' code takes the time of event i + 1 as that
moment, so the model sees the time of the next event. So does this backbone with ``model.query_time=true``; otherwise
the moment is that of event i, the latest that a model can know.

Legend: B rows, L tokens, T tokens so far, D = d_model, H heads of P = D / H channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.models.backbones.base import Clock, Mixer, Stack, time_buckets
from recsys_ssm.ops.dropout import Dropout


class Relations(NamedTuple):
    """Relations of the tokens of rows to each other, the same for all layers."""

    distance: Tensor
    """(L, L) int64, places from the token of a column to that of a row, at least 0."""
    seen: Tensor
    """(L, L) or (B, L, L), 1 where a row's token sees a column's, else 0."""
    bucket: Tensor | None
    """(B, L, L) int64, bucket of the time in between; None: not known."""


class HSTUState(NamedTuple):
    """Keys and values of all tokens so far."""

    key: Tensor
    """(B, H, T, P)."""
    value: Tensor
    """(B, H, T, P)."""


class HSTUBlock(Mixer):
    """The unit above without the first norm and the sum, which are those of :class:`Layer`.

    Args:
        d_model: D.
        nhead: H.
        max_length: Longest history; scores are divided by it, and longer distances have the weight of the longest.
        time_bias: Add the bias of times.
        n_buckets: Buckets of times; one more holds what is longer.
        dropout: Dropout rate before the projection out.
        norm_eps: Number that LayerNorm adds to the variance.
        init_std: Standard deviation of the initial projection in and of the biases.

    Raises:
        ValueError: ``d_model`` is not a multiple of ``nhead``, or a size is below 1.
    """

    def __init__(
        self,
        *,
        d_model: int,
        nhead: int = 2,
        max_length: int = 50,
        time_bias: bool = False,
        n_buckets: int = 128,
        dropout: float = 0.2,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if d_model % nhead:
            raise ValueError(
                f"d_model={d_model} is not a multiple of nhead={nhead}; change one of them"
            )
        if max_length < 1:
            raise ValueError(f"max_length={max_length}: give at least 1")
        if n_buckets < 1:
            raise ValueError(f"n_buckets={n_buckets}: give at least 1")
        self.nhead, self.max_length = nhead, max_length
        self.in_proj = nn.Linear(d_model, 4 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.dropout = Dropout(dropout)
        # As in the public code, distances to later tokens have weights, too, which nothing reads.
        self.position_bias = nn.Parameter(torch.empty(2 * max_length - 1).normal_(std=init_std))
        self.time_bias = (
            nn.Parameter(torch.empty(n_buckets + 1).normal_(std=init_std)) if time_bias else None
        )
        nn.init.normal_(self.in_proj.weight, std=init_std)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def forward(self, x_BLD: Tensor, context: Relations | None = None) -> Tensor:
        if context is None:
            context = relations(x_BLD, None)
        u_BLD, v_BHLP, q_BHLP, k_BHLP = self._project(x_BLD)
        bias = self._position(context.distance)
        if context.bucket is not None and self.time_bias is not None:
            bias = (bias + self.time_bias[context.bucket]).unsqueeze(1)
        seen = context.seen if context.seen.dim() == 2 else context.seen.unsqueeze(1)
        a_BHLL = F.silu(q_BHLP @ k_BHLP.transpose(2, 3) + bias) * (seen / self.max_length)
        return self._out(u_BLD, (a_BHLL @ v_BHLP).transpose(1, 2).flatten(2))

    def init_state(self, batch_size: int) -> HSTUState:
        weight = self.in_proj.weight
        empty = weight.new_empty(batch_size, self.nhead, 0, weight.shape[1] // self.nhead)
        return HSTUState(empty, empty)

    def step(self, x_BD: Tensor, state: HSTUState) -> tuple[Tensor, HSTUState]:
        if self.time_bias is not None:
            raise NotImplementedError(
                "HSTU with time_bias=true needs the times of all events and cannot advance by one token; call forward"
            )
        u_B1D, v_BH1P, q_BH1P, k_BH1P = self._project(x_BD.unsqueeze(1))
        state = HSTUState(torch.cat((state.key, k_BH1P), 2), torch.cat((state.value, v_BH1P), 2))
        T = state.key.shape[2]
        bias_T = self._position(torch.arange(T - 1, -1, -1, device=x_BD.device))
        a_BH1T = F.silu(q_BH1P @ state.key.transpose(2, 3) + bias_T) / self.max_length
        y_B1D = (a_BH1T @ state.value).transpose(1, 2).flatten(2)
        return self._out(u_B1D, y_B1D).squeeze(1), state

    def _project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        """Return u (B, L, D), and v, q and k (B, H, L, P)."""
        u, *others = F.silu(self.in_proj(x_BLD)).chunk(4, dim=-1)
        return u, *(part.unflatten(-1, (self.nhead, -1)).transpose(1, 2) for part in others)

    def _position(self, distance: Tensor) -> Tensor:
        return self.position_bias[distance.clamp(max=self.max_length - 1) + self.max_length - 1]

    def _out(self, u_BLD: Tensor, y_BLD: Tensor) -> Tensor:
        return self.out_proj(self.dropout(self.norm(y_BLD) * u_BLD))


def relations(
    tokens: Tensor, seq_idx: Tensor | None, clock: Clock | None = None, n_buckets: int = 128
) -> Relations:
    """Return how the tokens of rows stand to each other.

    Args:
        tokens: (B, L, D), for length, dtype and device.
        seq_idx: (B, L), as in :meth:`Backbone.forward`.
        clock: Times of the events; None: they are not known.
        n_buckets: Buckets of times.
    """
    L = tokens.shape[1]
    here_L = torch.arange(L, device=tokens.device)
    distance_LL = here_L.unsqueeze(1) - here_L
    seen = distance_LL >= 0
    if seq_idx is not None:
        seen = seen & (seq_idx.unsqueeze(2) == seq_idx.unsqueeze(1))
    bucket = None
    if clock is not None:
        between_BLL = clock.asked.unsqueeze(2) - clock.event.unsqueeze(1)
        bucket = time_buckets(between_BLL.where(seen, 0), n_buckets)
    return Relations(distance_LL.clamp(min=0), seen.to(tokens.dtype), bucket)


class HSTU(Stack):
    """HSTU units in a :class:`Stack`, with a norm at the end.

    With d_model 64, two heads, length 50 and the time bias a layer has 21,028 parameters.

    Args:
        d_model, nhead, max_length, time_bias, n_buckets, dropout, norm_eps, init_std: As in :class:`HSTUBlock`.
        n_layers: Number of layers.

    Example:
        >>> import torch
        >>> from recsys_ssm import HSTU
        >>> backbone = HSTU(d_model=8, n_layers=1, max_length=10)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, state = backbone.step(torch.randn(2, 8), backbone.init_state(batch_size=2))
        >>> output.shape
        torch.Size([2, 8])
    """

    # NOTE[DIFF] RecTools' copy pads rows to the longest history, also with the times of padding; here histories are
    # packed, and a bias exists between events alone. Its LayerNorms have weights in RecTools' release, as here.

    causal = True
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-HSTU", "next_item": "HSTU"}
    style: ClassVar[Mapping[str, str]] = {"color": "#cc79a7", "linestyle": "--", "marker": "v"}

    def __init__(
        self,
        *,
        d_model: int = 64,
        n_layers: int = 2,
        nhead: int = 2,
        max_length: int = 50,
        time_bias: bool = False,
        n_buckets: int = 128,
        dropout: float = 0.2,
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(
            *(
                HSTUBlock(
                    d_model=d_model,
                    nhead=nhead,
                    max_length=max_length,
                    time_bias=time_bias,
                    n_buckets=n_buckets,
                    dropout=dropout,
                    norm_eps=norm_eps,
                    init_std=init_std,
                )
                for _ in range(n_layers)
            ),
            d_model=d_model,
            norm="pre",
            residual=True,
            norm_eps=norm_eps,
        )
        self.uses_times, self.n_buckets = time_bias, n_buckets

    def context(
        self, tokens: Tensor, seq_idx: Tensor | None, clock: Clock | None = None
    ) -> Relations:
        """Return how the tokens stand to each other, which all layers share."""
        return relations(tokens, seq_idx, clock, self.n_buckets)
