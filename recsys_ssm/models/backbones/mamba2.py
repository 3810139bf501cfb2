"""Mamba-2: state space duality (Dao and Gu 2024, arXiv 2405.21060).

A Mamba-2 block is a Mamba block whose recurrence is mostly matrix products. Channels come in heads of P, as in
attention. All states of a head share one decay: A is one number a head, and dt one step size a head and token. B and C
are shared by the heads of a group. The state of a head is a matrix, to which each token adds an outer product:

    h[t] = exp(dt[t] · A) · h[t-1] + dt[t] · x[t] B[t]ᵀ        the state, P × N numbers a head
    y[t] = h[t] C[t] + D · x[t]                                the output, P numbers a head

With one decay a head, the recurrence is also a masked attention without softmax, hence *duality*:
``y[t] = Σ_{s ≤ t} (C[t] · B[s]) exp(A · Σ_{s < r ≤ t} dt[r]) dt[s] x[s] + D · x[t]``.
:func:`~recsys_ssm.ops.ssd.ssd` uses the attention form within chunks of tokens and the recurrence between chunks;
``step`` uses the recurrence.

One projection computes z, x, B, C and dt from the token at once. x, B and C pass the convolution together (in Mamba, B
and C are computed after it). The output is gated and normalised: RMSNorm(y · SiLU(z)).

    (B, L, D) ── in_proj ──► z (B, L, E), [x, B, C] (B, L, X), dt (B, L, H)
    [x, B, C] ── conv1d, SiLU ──► x (B, L, H, P), B and C (B, L, G, N)
    x, dt, A (H,), B, C, D (H,) ── ssd ──► y (B, L, H, P)
    RMSNorm(y · SiLU(z)) ── out_proj ──► (B, L, D)

Legend: B rows, L tokens, D = d_model, E = expand·D inner channels, H heads of P = headdim channels, G groups of heads
that share B and C, N = d_state, W = d_conv, X = E + 2·G·N channels that are convolved: x, B and C.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.models.backbones.base import (
    Timed,
    TimedMixer,
    TimedStack,
    TimeScale,
    at_least_float32,
)
from recsys_ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from recsys_ssm.ops.ssd import ssd, ssd_step


class GatedRMSNorm(nn.Module):
    """RMSNorm with a gate, over ``groups`` groups of channels.

    RMSNorm(y · SiLU(z)), or RMSNorm(y) · SiLU(z) with ``norm_before_gate``.
    """

    def __init__(
        self, d: int, *, eps: float = 1e-5, groups: int = 1, norm_before_gate: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        # Half precision is normalised in float32.
        wide = torch.promote_types(y.dtype, torch.float32)
        gate = F.silu(z.to(wide))
        x = y.to(wide)
        if not self.norm_before_gate:
            x = x * gate
        grouped = x.unflatten(-1, (self.groups, -1))
        x = F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2) * self.weight
        if self.norm_before_gate:
            x = x * gate
        return x.to(y.dtype)


def initial_dt_bias(heads: int, dt_min: float, dt_max: float, dt_init_floor: float) -> nn.Parameter:
    """Draw biases (H,) whose softplus is log-uniform between ``dt_min`` and ``dt_max``."""
    dt = torch.exp(torch.rand(heads) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
    dt = dt.clamp(min=dt_init_floor)
    return nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


class Mamba2State(NamedTuple):
    """State of a Mamba-2 block after the tokens so far."""

    conv: Tensor
    """(B, X, W - 1), the last inputs of the convolution."""
    ssm: Tensor
    """(B, H, P, N) float32."""


class Mamba2Block(TimedMixer):
    """One Mamba-2 block; parameters have the names, shapes and initialisation of the public implementation.

    Args:
        d_model: D.
        d_state: N.
        d_conv: W.
        expand: E / D.
        headdim: P.
        ngroups: G.
        A_init_range: Range of the heads' initial decay rates -A, which are drawn uniformly.
        dt_min, dt_max: Range of the initial step sizes, which are drawn log-uniformly.
        dt_init_floor: Lower bound of the initial step sizes.
        norm_before_gate: Compute RMSNorm(y) · SiLU(z) rather than RMSNorm(y · SiLU(z)).
        norm_eps: Term added to the mean square before its root.
        conv_bias: Give the convolution a bias.
        bias: Give the projections in and out a bias.
        scale_by_time: Scale the step sizes of a token by the time since the event before (:class:`TimeScale`).

    Raises:
        ValueError: E is not a multiple of ``headdim``, or H is not a multiple of ``ngroups``.
    """

    label: ClassVar[str] = "Mamba-2"

    def __init__(
        self,
        *,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        conv_bias: bool = True,
        bias: bool = False,
        scale_by_time: bool = False,
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
        self.d_state, self.d_conv, self.headdim, self.ngroups = d_state, d_conv, headdim, ngroups
        self.d_conved = self.d_inner + 2 * ngroups * d_state

        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_conved + self.heads, bias=bias)
        # nn.Conv1d gives parameters their names, shapes and initialisation; causal_conv1d computes.
        self.conv1d = nn.Conv1d(
            self.d_conved,
            self.d_conved,
            d_conv,
            groups=self.d_conved,
            padding=d_conv - 1,
            bias=conv_bias,
        )
        self.dt_bias = initial_dt_bias(self.heads, dt_min, dt_max, dt_init_floor)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = GatedRMSNorm(
            self.d_inner, eps=norm_eps, groups=ngroups, norm_before_gate=norm_before_gate
        )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.time_scale = TimeScale(self.heads) if scale_by_time else None

    def _run(
        self,
        x_BLD: Tensor,
        context: Tensor | Timed | None,
        before: Mamba2State | None,
        want_state: bool,
    ) -> tuple[Tensor, Mamba2State | None]:
        seq_idx, gap = context if isinstance(context, Timed) else (context, None)
        z_BLE, xBC_BLX, dt_BLH = self._split(x_BLD)
        dt_bias, scaled = at_least_float32(self.dt_bias), self.time_scale is not None
        if self.time_scale is not None:
            dt_BLH = F.softplus(dt_BLH + dt_bias)
            if gap is not None:
                dt_BLH = dt_BLH * self.time_scale(gap)
        wanted: dict[str, Any] = {"return_final_state": want_state}
        conv: Any = causal_conv1d(
            xBC_BLX,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            "silu",
            seq_idx,
            None if before is None else before.conv,
            **wanted,
        )
        x_BLHP, B_BLGN, C_BLGN = self._selection(conv[0] if want_state else conv)
        found: Any = ssd(
            x_BLHP,
            dt_BLH,
            -at_least_float32(self.A_log).exp(),
            B_BLGN,
            C_BLGN,
            at_least_float32(self.D),
            None if scaled else dt_bias,
            dt_softplus=not scaled,
            seq_idx=seq_idx,
            initial_state=None if before is None else before.ssm,
            **wanted,
        )
        y_BLHP = found[0] if want_state else found
        y_BLD = self.out_proj(self.norm(y_BLHP.flatten(2), z_BLE))
        return y_BLD, Mamba2State(conv[1], found[1]) if want_state else None

    def init_state(self, batch_size: int) -> Mamba2State:
        ssm = at_least_float32(self.A_log).new_zeros(
            batch_size, self.heads, self.headdim, self.d_state
        )
        return Mamba2State(
            self.in_proj.weight.new_zeros(batch_size, self.d_conved, self.d_conv - 1), ssm
        )

    def step(self, x_BD: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        self.check_steps()
        z_BE, xBC_BX, dt_BH = self._split(x_BD)
        xBC_BX, conv = causal_conv1d_step(
            xBC_BX, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu"
        )
        x_BHP, B_BGN, C_BGN = self._selection(xBC_BX)
        y_BHP, ssm = ssd_step(
            state.ssm,
            x_BHP,
            dt_BH,
            -at_least_float32(self.A_log).exp(),
            B_BGN,
            C_BGN,
            at_least_float32(self.D),
            at_least_float32(self.dt_bias),
            dt_softplus=True,
        )
        return self.out_proj(self.norm(y_BHP.flatten(1), z_BE)), Mamba2State(conv, ssm)

    def _split(self, x_D: Tensor) -> tuple[Tensor, ...]:
        """Return z, the channels to convolve, and dt before its bias and softplus."""
        return self.in_proj(x_D).split([self.d_inner, self.d_conved, self.heads], dim=-1)

    def _selection(self, xBC_X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input-dependent parts of the recurrence: x by heads, B and C by groups."""
        states = self.ngroups * self.d_state
        x_E, B_S, C_S = xBC_X.split([self.d_inner, states, states], dim=-1)
        by_group = (self.ngroups, self.d_state)
        return (
            x_E.unflatten(-1, (self.heads, self.headdim)),
            B_S.unflatten(-1, by_group),
            C_S.unflatten(-1, by_group),
        )


class Mamba2(TimedStack):
    """Mamba-2 blocks in a stack.

    2Mamba4Rec is Mamba4Rec (see :class:`Stack`) with d_model 64, one layer, d_state 128, headdim 4: 78,496 parameters,
    78,624 with the LayerNorm of the item embeddings.

    Args:
        d_model, d_state, d_conv, expand, headdim, ngroups, scale_by_time: As in :class:`Mamba2Block`.
        n_layers: Number of blocks.
        stack: Options of :class:`Stack`.

    Example:
        >>> import torch
        >>> from recsys_ssm import Mamba2
        >>> backbone = Mamba2(d_model=8, n_layers=1, d_state=4, headdim=4)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, state = backbone.step(torch.randn(2, 8), backbone.init_state(batch_size=2))
        >>> output.shape
        torch.Size([2, 8])
    """

    causal = True
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-Mamba2", "next_item": "2Mamba4Rec"}
    style: ClassVar[Mapping[str, str]] = {"color": "#009e73", "linestyle": "-.", "marker": "^"}

    def __init__(
        self,
        *,
        d_model: int = 128,
        n_layers: int = 4,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        scale_by_time: bool = False,
        **stack: Any,
    ) -> None:
        super().__init__(
            *(
                Mamba2Block(
                    d_model=d_model,
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
            **stack,
        )
        self.uses_times = scale_by_time
