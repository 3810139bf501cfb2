"""Hydra: a bidirectional state space model (Hwang et al. 2024, arXiv 2407.09941).

A Hydra block is a Mamba-2 block that looks both ways. As a matrix over positions, a causal scan is lower triangular:
``y = M x`` with zeros above the diagonal. Hydra fills the upper triangle as well and so gets a *quasiseparable* matrix:

    y[t] = scan over the tokens before t  +  scan over the tokens after t  +  d[t] · x[t]

The two scans share A and the values x; each has its own dt, B and C. A token does not enter its own scans: each result
is shifted by one position. It enters through the third, diagonal term, whose weight d is a constant plus a linear
function of the token. Both scans are computed as one call of :func:`~recsys_ssm.ops.ssd.ssd` on twice the rows, the
second half back to front.

Every position sees every other. A Hydra backbone is therefore trained on the last position of a history, not on all,
and has no ``step``.

    (B, L, D) ── in_proj ──► z (B, L, E), [x, B, C] (B, L, X), dt (B, L, 2·H)
    [x, B, C] ── centred conv1d, SiLU ──► x (B, L, E), B and C of both directions (B, L, G, N)
    x and its reverse (2·B, L, H, P), dt, A (H,), B, C ── ssd, shift ──► before, after (B, L, E)
    d = fc_D(x) + D (B, L, H)
    RMSNorm(before + after + d · x) · SiLU(z) ── out_proj ──► (B, L, D)

Legend: B rows, L tokens, D = d_model, E = expand·D inner channels, H heads of P = headdim channels, G groups of heads
that share B and C, N = d_state, W = d_conv, X = E + 4·G·N channels that are convolved: x, B and C of both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.models.backbones.base import Mixer, Stack, at_least_float32
from recsys_ssm.models.backbones.mamba2 import GatedRMSNorm, initial_dt_bias
from recsys_ssm.ops.causal_conv1d import same_conv1d
from recsys_ssm.ops.ssd import ssd


class HydraBlock(Mixer):
    """One Hydra block; parameters have the names, shapes and initialisation of the public implementation.

    The convolution is centred: a position sees the W // 2 positions before it and the (W - 1) // 2 after it.

    Args:
        d_model: D.
        d_state: N.
        d_conv: W.
        expand: E / D.
        headdim: P.
        ngroups: G.
        dt_min, dt_max: Range of the initial step sizes, which are drawn log-uniformly.
        dt_init_floor: Lower bound of the initial step sizes.
        conv_bias: Give the convolution a bias.
        bias: Give the projections in and out a bias.

    Raises:
        ValueError: E is not a multiple of ``headdim``, or H is not a multiple of ``ngroups``.
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        if self.d_inner % headdim:
            raise ValueError(
                f"headdim={headdim} does not divide expand * d_model = {expand} * {d_model} = {self.d_inner}; "
                "give a headdim that does"
            )
        self.heads = self.d_inner // headdim
        if self.heads % ngroups:
            raise ValueError(
                f"ngroups={ngroups} does not divide the {self.heads} heads of headdim={headdim}; "
                "give an ngroups that does"
            )
        self.d_state, self.headdim, self.ngroups = d_state, headdim, ngroups
        self.d_conved = self.d_inner + 4 * ngroups * d_state

        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_conved + 2 * self.heads, bias=bias)
        # nn.Conv1d gives parameters their names, shapes and initialisation; same_conv1d computes.
        # NOTE[DIFF] For even W the public code returns one position too many and fails; here it is the first L.
        self.conv1d = nn.Conv1d(
            self.d_conved,
            self.d_conved,
            d_conv,
            groups=self.d_conved,
            padding=d_conv // 2,
            bias=conv_bias,
        )
        self.dt_bias = initial_dt_bias(self.heads, dt_min, dt_max, dt_init_floor)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.fc_D = nn.Linear(self.d_inner, self.heads, bias=False)
        self.norm = GatedRMSNorm(self.d_inner, norm_before_gate=True)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, x_BLD: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        z_BLE, xBC_BLX, dt_BLH = self.in_proj(x_BLD).split(
            [self.d_inner, self.d_conved, 2 * self.heads], dim=-1
        )
        xBC_BLX = same_conv1d(
            xBC_BLX,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            seq_idx=seq_idx,
        )
        x_BLE, BC_BLS = xBC_BLX.split([self.d_inner, self.d_conved - self.d_inner], dim=-1)
        # One scan over twice the rows computes both directions; the second half is back to front.
        x_RLE = torch.cat([x_BLE, x_BLE.flip(1)])
        dt_RLH, BC_RLS = (_both_ways(tensor) for tensor in (dt_BLH, BC_BLS))
        seq_idx_RL = None if seq_idx is None else torch.cat([seq_idx, seq_idx.flip(1)])
        B_RLGN, C_RLGN = (
            half.unflatten(-1, (self.ngroups, self.d_state)) for half in BC_RLS.chunk(2, dim=-1)
        )
        y_RLHP = ssd(
            x_RLE.unflatten(-1, (self.heads, self.headdim)),
            dt_RLH,
            -at_least_float32(self.A_log).exp(),
            B_RLGN,
            C_RLGN,
            dt_bias=at_least_float32(self.dt_bias),
            dt_softplus=True,
            seq_idx=seq_idx_RL,
        )
        y_RLE = _one_later(y_RLHP.flatten(2), seq_idx_RL)
        # chunk(2) would fix the batch size of an exported program.
        before_BLE, after_BLE = y_RLE.split([x_BLD.shape[0], x_BLD.shape[0]])
        own_BLH1 = F.linear(x_BLE, self.fc_D.weight, self.D.to(x_BLE.dtype)).unsqueeze(-1)
        own_BLE = (own_BLH1 * x_BLE.unflatten(-1, (self.heads, self.headdim))).flatten(2)
        return self.out_proj(self.norm(before_BLE + after_BLE.flip(1) + own_BLE, z_BLE))


def _both_ways(x: Tensor) -> Tensor:
    """Split (B, L, 2·S) into two directions and return (2·B, L, S), the second half of the rows back to front."""
    ahead, back = x.chunk(2, dim=-1)
    return torch.cat([ahead, back.flip(1)])


def _one_later(y_BLE: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Shift outputs by one position within each sequence, so that no position sees its own token twice."""
    y_BLE = F.pad(y_BLE[:, :-1], (0, 0, 1, 0))
    if seq_idx is None:
        return y_BLE
    continues_BL = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0))
    return y_BLE.where(continues_BL.unsqueeze(-1), 0)


class Hydra(Stack):
    """Hydra blocks in a stack. Every position sees every other, so a loss at every position is refused.

    Hydra4Rec is Mamba4Rec (see :class:`Stack`) with d_model 64, one layer, d_state 32, d_conv 4, headdim 64: 68,038
    parameters, 68,166 with the LayerNorm of the item embeddings.

    Args:
        d_model, d_state, d_conv, expand, headdim, ngroups: As in :class:`HydraBlock`.
        n_layers: Number of blocks.
        stack: Options of :class:`Stack`.

    Example:
        >>> import torch
        >>> from recsys_ssm import Hydra
        >>> backbone = Hydra(d_model=8, n_layers=1, d_state=4, headdim=4)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    causal = False
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-Hydra", "next_item": "Hydra4Rec"}
    style: ClassVar[Mapping[str, str]] = {"color": "#767676", "linestyle": ":", "marker": "D"}

    def __init__(
        self,
        *,
        d_model: int = 128,
        n_layers: int = 4,
        d_state: int = 64,
        d_conv: int = 7,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        **stack: Any,
    ) -> None:
        super().__init__(
            *(
                HydraBlock(
                    d_model=d_model,
                    d_state=d_state,
                    d_conv=d_conv,
                    expand=expand,
                    headdim=headdim,
                    ngroups=ngroups,
                )
                for _ in range(n_layers)
            ),
            d_model=d_model,
            **stack,
        )
