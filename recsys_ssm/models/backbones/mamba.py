"""Mamba: the selective state space model (Gu and Dao 2023, arXiv 2312.00752).

A Mamba block replaces attention by a recurrence. A first projection splits each token into two parts of E channels: x
is mixed along the sequence, z gates the result. x passes a causal convolution over the last W tokens, channel by
channel, and a SiLU. Then each channel drives N states of its own and is read from them:

    h[t] = exp(dt[t] · A) · h[t-1] + dt[t] · B[t] · x[t]        the state, N numbers a channel
    y[t] = C[t] · h[t] + D · x[t]                               the output

The block is *selective*: the step size dt, the input weights B and the output weights C are computed from the token
itself. A large dt overwrites the state with the token, a small dt skips the token and keeps the past. A, which is
negative, sets how fast each state forgets. The output is y, gated by SiLU(z) and projected back to D channels.

In training, :func:`~recsys_ssm.ops.selective_scan.selective_scan` runs the recurrence over whole sequences. One token
at a time, ``step`` needs only the last W - 1 inputs of the convolution and h, so its cost does not grow with the
history.

    (B, L, D) ── in_proj ──► x, z (B, L, E)
    x ── conv1d, SiLU ──► x (B, L, E) ── x_proj ──► dt (B, L, R), B and C (B, L, N)
    dt ── dt_proj, softplus ──► dt (B, L, E)
    x, dt, A (E, N), B, C, D (E,) ── scan ──► y (B, L, E)
    y · SiLU(z) ── out_proj ──► (B, L, D)

Legend: B rows, L tokens, D = d_model, E = expand·D inner channels, N = d_state, R = dt_rank, W = d_conv.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from recsys_ssm.models.backbones.base import (
    Timed,
    TimedMixer,
    TimedStack,
    TimeScale,
    at_least_float32,
)
from recsys_ssm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from recsys_ssm.ops.selective_scan import selective_scan, selective_scan_step


class MambaState(NamedTuple):
    """State of a Mamba block after the tokens so far."""

    conv: Tensor
    """(B, E, W - 1), the last inputs of the convolution."""
    ssm: Tensor
    """(B, E, N) float32."""


class MambaBlock(TimedMixer):
    """One Mamba block; parameters have the names, shapes and initialisation of the public implementation.

    Args:
        d_model: D.
        d_state: N.
        d_conv: W.
        expand: E / D.
        dt_rank: R; ``auto`` is ⌈D / 16⌉.
        dt_min, dt_max: Range of the initial step sizes, which are drawn log-uniformly.
        dt_init_floor: Lower bound of the initial step sizes.
        conv_bias: Give the convolution a bias.
        bias: Give the projections in and out a bias.
        scale_by_time: Scale the step sizes of a token by the time since the event before
            (:class:`~recsys_ssm.models.backbones.base.TimeScale`).
    """

    label: ClassVar[str] = "Mamba"

    def __init__(
        self,
        *,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        scale_by_time: bool = False,
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        self.d_state, self.d_conv = d_state, d_conv
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        # nn.Conv1d gives parameters their names, shapes and initialisation; causal_conv1d computes.
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.time_scale = TimeScale(self.d_inner) if scale_by_time else None

        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.exp(
            torch.rand(self.d_inner) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
        ).clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt

    def _run(
        self,
        x_BLD: Tensor,
        context: Tensor | Timed | None,
        before: MambaState | None,
        want_state: bool,
    ) -> tuple[Tensor, MambaState | None]:
        seq_idx, gap = context if isinstance(context, Timed) else (context, None)
        x_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, dim=-1)
        wanted: dict[str, Any] = {"return_final_state": want_state}
        conv: Any = causal_conv1d(
            x_BLE,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            "silu",
            seq_idx,
            None if before is None else before.conv,
            **wanted,
        )
        x_BLE = conv[0] if want_state else conv
        dt_BLE, B_BLN, C_BLN = self._selection(x_BLE)
        dt_bias, scaled = at_least_float32(self.dt_proj.bias), self.time_scale is not None
        if self.time_scale is not None:
            dt_BLE = nn.functional.softplus(dt_BLE + dt_bias)
            if gap is not None:
                dt_BLE = dt_BLE * self.time_scale(gap)
        scan: Any = selective_scan(
            x_BLE,
            dt_BLE,
            self._A(),
            B_BLN,
            C_BLN,
            at_least_float32(self.D),
            z_BLE,
            None if scaled else dt_bias,
            dt_softplus=not scaled,
            seq_idx=seq_idx,
            initial_state=None if before is None else before.ssm,
            **wanted,
        )
        if not want_state:
            return self.out_proj(scan), None
        return self.out_proj(scan[0]), MambaState(conv[1], scan[1])

    def init_state(self, batch_size: int) -> MambaState:
        weight = self.in_proj.weight
        return MambaState(
            weight.new_zeros(batch_size, self.d_inner, self.d_conv - 1),
            self.A_log.new_zeros(batch_size, self.d_inner, self.d_state, dtype=self._A().dtype),
        )

    def step(self, x_BD: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        self.check_steps()
        x_BE, z_BE = self.in_proj(x_BD).chunk(2, dim=-1)
        x_BE, conv = causal_conv1d_step(
            x_BE, state.conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu"
        )
        dt_BE, B_BN, C_BN = self._selection(x_BE)
        y_BE, ssm = selective_scan_step(
            state.ssm,
            x_BE,
            dt_BE,
            self._A(),
            B_BN,
            C_BN,
            at_least_float32(self.D),
            z_BE,
            at_least_float32(self.dt_proj.bias),
            dt_softplus=True,
        )
        return self.out_proj(y_BE), MambaState(conv, ssm)

    def _A(self) -> Tensor:
        return -torch.exp(at_least_float32(self.A_log))

    def _selection(self, x_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input-dependent parts of the recurrence: dt before its bias and softplus, B and C."""
        dt_R, B_N, C_N = self.x_proj(x_E).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return nn.functional.linear(dt_R, self.dt_proj.weight), B_N, C_N


class Mamba(TimedStack):
    """Mamba blocks in a stack; the defaults are FT-Mamba's tower, 479,232 parameters at d_model 128.

    The paper does not say if there is a residual connection. ``residual`` decides; docs/results.md has both results.
    Mamba4Rec is d_model 64, one layer, d_state 32, d_conv 4, with the layer that :class:`Stack` describes: 72,128
    parameters, 72,256 with the LayerNorm of the item embeddings.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, conv_bias, scale_by_time: As in :class:`MambaBlock`.
        n_layers: Number of blocks.
        stack: Options of :class:`Stack`.

    Example:
        >>> import torch
        >>> from recsys_ssm import Mamba
        >>> backbone = Mamba(d_model=8, n_layers=1, d_state=4)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, state = backbone.step(torch.randn(2, 8), backbone.init_state(batch_size=2))
        >>> output.shape
        torch.Size([2, 8])
    """

    causal = True
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-Mamba", "next_item": "Mamba4Rec"}
    style: ClassVar[Mapping[str, str]] = {"color": "#0b3c5d", "linestyle": "-", "marker": "o"}

    def __init__(
        self,
        *,
        d_model: int = 128,
        n_layers: int = 4,
        d_state: int = 16,
        d_conv: int = 16,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        conv_bias: bool = True,
        scale_by_time: bool = False,
        **stack: Any,
    ) -> None:
        super().__init__(
            *(
                MambaBlock(
                    d_model=d_model,
                    d_state=d_state,
                    d_conv=d_conv,
                    expand=expand,
                    dt_rank=dt_rank,
                    conv_bias=conv_bias,
                    scale_by_time=scale_by_time,
                )
                for _ in range(n_layers)
            ),
            d_model=d_model,
            **stack,
        )
        self.uses_times = scale_by_time
