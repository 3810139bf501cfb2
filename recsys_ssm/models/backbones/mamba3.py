"""Mamba-3: state space duality with the trapezoidal rule and rotated states (arXiv 2603.15569).

A Mamba-3 block keeps Mamba-2's heads and changes three things. It has no convolution:

- *Trapezoidal rule.* A step adds its own outer product and, once more, that of the step before. The input λ[t] in
  (0, 1) weighs the two, so the recurrence sees neighbours as the convolution did:

      h[t] = α[t] · h[t-1] + (1 - λ[t]) Δ[t] α[t] · x[t-1] k[t-1]ᵀ + λ[t] Δ[t] · x[t] k[t]ᵀ,   α[t] = exp(Δ[t] A[t])

- *Rotated states.* Pairs of states turn by angles that the input chooses, θ[t] = θ[t-1] + π tanh(angles[t]) Δ[t]. That
  equals a complex decay: k[t] = rotate(B[t], θ[t]), q[t] = rotate(C[t], θ[t]), y[t] = h[t] q[t] + D x[t].
- *Several inputs and outputs (MIMO).* A step may add R outer products and read the state with R queries. R copies of x,
  scaled by learnt weights, go in, and R outputs, gated one by one, come out as their weighted sum.

A is an input as well, A[t] = -f(dd_A[t]) with f(a) = 1 + a for a ≥ 0 and 1 / (1 - a) below. B and C are normalised and
get a bias of each head, which starts at 1.

    (B, L, D) ── in_proj ──► z, x (B, L, H, P), B, C (B, L, R, G, N), dt, A, λ (B, L, H), angles (B, L, A)
    B, C ── RMSNorm ──► with x, decays, weights and angles ── trapezoidal_ssd ──► y (B, L, R, H, P)
    y · SiLU(z), summed over R ── out_proj ──► (B, L, D)

Legend: B rows, L tokens, D = d_model, E = expand·D inner channels, H heads of P = headdim channels, G groups of heads
that share B and C, N = d_state, R ranks (1 without MIMO), A angles, half of ``rope_fraction`` · N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.models.backbones.base import Mixer, Stack, at_least_float32
from recsys_ssm.models.backbones.mamba2 import GatedRMSNorm, initial_dt_bias
from recsys_ssm.ops.trapezoidal_ssd import rotate, trapezoidal_ssd


class Mamba3State(NamedTuple):
    """State of a Mamba-3 block after the tokens so far; float32, or float64 in a float64 model."""

    angle: Tensor
    """(B, H, A) radians in [0, 2π)."""
    ssm: Tensor
    """(B, H, P, N)."""
    k: Tensor
    """(B, R, H, N), the keys of the last token."""
    x: Tensor
    """(B, H, P), the inputs of the last token."""


class _Selection(NamedTuple):
    """Parts of the recurrence that depend on the input; … is (B, L), or (B) for one step."""

    z: Tensor  # (…, H, P)
    x: Tensor  # (…, H, P)
    B: Tensor  # (…, R, G, N)
    C: Tensor  # (…, R, G, N)
    log_decay: Tensor  # (…, H)
    past: Tensor  # (…, H)
    own: Tensor  # (…, H)
    turn: Tensor  # (…, H, A)


class Mamba3Block(Mixer):
    """One Mamba-3 block; parameters have the names, shapes and initialisation of the public implementation.

    Args:
        d_model: D.
        d_state: N, even.
        expand: E / D.
        headdim: P.
        ngroups: G.
        mimo_rank: R. None: one input and one output a head (SISO), without the weights of ranks.
        rope_fraction: Share of the states that turn, 0.5 or 1.
        outproj_norm: Normalise each head's outputs before the gate (the public ``is_outproj_norm``).
        dt_min, dt_max: Range of the initial step sizes, which are drawn log-uniformly.
        dt_init_floor: Lower bound of the initial step sizes.
        A_floor: Lower bound of -A.

    Raises:
        ValueError: E is not a multiple of ``headdim``, H is not a multiple of ``ngroups``, ``d_state`` is odd, or
            another option has a value that is not listed above.
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        mimo_rank: int | None = None,
        rope_fraction: float = 0.5,
        outproj_norm: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
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
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction={rope_fraction}: expected 0.5 or 1")
        self.angles = int(d_state * rope_fraction) // 2
        if d_state % 2 or self.angles < 1:
            raise ValueError(
                f"d_state={d_state}: states turn in pairs; give an even number, at least 4 (2 with rope_fraction=1)"
            )
        if mimo_rank is not None and mimo_rank < 1:
            raise ValueError(f"mimo_rank={mimo_rank}: expected at least 1, or null for SISO")
        self.d_state, self.headdim, self.ngroups, self.A_floor = d_state, headdim, ngroups, A_floor
        self.mimo, self.rank = mimo_rank is not None, mimo_rank or 1

        self.widths = [
            *[self.d_inner] * 2,
            *[self.rank * ngroups * d_state] * 2,
            *[self.heads] * 3,
            self.angles,
        ]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.dt_bias = initial_dt_bias(self.heads, dt_min, dt_max, dt_init_floor)
        self.B_bias = nn.Parameter(torch.ones(self.heads, self.rank, d_state))
        self.C_bias = nn.Parameter(torch.ones(self.heads, self.rank, d_state))
        self.B_norm = nn.RMSNorm(d_state, eps=1e-5)
        self.C_norm = nn.RMSNorm(d_state, eps=1e-5)
        if self.mimo:
            ones = torch.ones(self.heads, self.rank, headdim)
            self.mimo_x = nn.Parameter(ones / self.rank)
            self.mimo_z = nn.Parameter(ones.clone())
            self.mimo_o = nn.Parameter(ones / self.rank)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = (
            GatedRMSNorm(self.d_inner, groups=self.heads, norm_before_gate=True)
            if outproj_norm
            else None
        )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, x_BLD: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        parts = self._selection(x_BLD, seq_idx)
        y_BLRHP = trapezoidal_ssd(
            self._ranks(parts.x, "mimo_x"),
            parts.log_decay,
            parts.past,
            parts.own,
            parts.B,
            parts.C,
            at_least_float32(self.B_bias),
            at_least_float32(self.C_bias),
            parts.turn.cumsum(1),
            at_least_float32(self.D),
            halves=self.mimo,
            seq_idx=seq_idx,
        )
        return self._output(y_BLRHP, parts.z)

    def init_state(self, batch_size: int) -> Mamba3State:
        new = at_least_float32(self.D).new_zeros
        rows = batch_size, self.heads
        return Mamba3State(
            angle=new(*rows, self.angles),
            ssm=new(*rows, self.headdim, self.d_state),
            k=new(batch_size, self.rank, self.heads, self.d_state),
            x=new(*rows, self.headdim),
        )

    def step(self, x_BD: Tensor, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
        parts = self._selection(x_BD)
        wide = state.ssm.dtype
        with torch.autocast(x_BD.device.type, enabled=False):
            angle_BHA = torch.remainder(state.angle + parts.turn.to(wide), 2 * math.pi)
            k_BRHN, q_BRHN = (
                rotate(
                    part.to(wide).repeat_interleave(self.heads // self.ngroups, 2)
                    + bias.transpose(0, 1),
                    angle_BHA.unsqueeze(1),
                    halves=self.mimo,
                )
                for part, bias in ((parts.B, self.B_bias), (parts.C, self.C_bias))
            )
            x_BHP = parts.x.to(wide)
            x_BRHP, before_BRHP = (self._ranks(x, "mimo_x") for x in (x_BHP, state.x))
            decay_BH11, past_BH11, own_BH11 = (
                part.to(wide)[..., None, None]
                for part in (parts.log_decay.exp(), parts.past, parts.own)
            )
            before_BHPN = torch.einsum("brhp,brhn->bhpn", before_BRHP, state.k)
            new_BHPN = torch.einsum("brhp,brhn->bhpn", x_BRHP, k_BRHN)
            h_BHPN = decay_BH11 * (state.ssm + past_BH11 * before_BHPN) + own_BH11 * new_BHPN
            y_BRHP = torch.einsum("bhpn,brhn->brhp", h_BHPN, q_BRHN) + self.D[:, None] * x_BRHP
        y_BD = self._output(y_BRHP.to(parts.x.dtype), parts.z)
        return y_BD, Mamba3State(angle_BHA, h_BHPN, k_BRHN, x_BHP)

    def _selection(self, x_D: Tensor, seq_idx: Tensor | None = None) -> _Selection:
        z, x, B, C, dt, a, trapezoid, angles = self.in_proj(x_D).split(self.widths, dim=-1)
        by_head, by_group = (self.heads, self.headdim), (self.rank, self.ngroups, self.d_state)
        dt_H, a_H, angles_A = at_least_float32(dt), at_least_float32(a), at_least_float32(angles)
        if seq_idx is not None:
            # Angles add up along the row, so padding must not turn.
            pad_BL1 = (seq_idx < 0).unsqueeze(-1)
            dt_H, angles_A = dt_H.masked_fill(pad_BL1, 0), angles_A.masked_fill(pad_BL1, 0)
        delta_H = F.softplus(dt_H + self.dt_bias)
        rate_H = (a_H.clamp(min=0) + (1 - a_H.clamp(max=0)).reciprocal()).clamp(min=self.A_floor)
        own_H = trapezoid.sigmoid() * delta_H
        return _Selection(
            z=z.unflatten(-1, by_head),
            x=x.unflatten(-1, by_head),
            B=self.B_norm(B.unflatten(-1, by_group)),
            C=self.C_norm(C.unflatten(-1, by_group)),
            log_decay=-rate_H * delta_H,
            past=delta_H - own_H,
            own=own_H,
            turn=(math.pi * angles_A.tanh()).unsqueeze(-2) * delta_H.unsqueeze(-1),
        )

    def _ranks(self, x_HP: Tensor, weight: str) -> Tensor:
        """Return (…, R, H, P): a copy of x for each rank, scaled by the rank's weights."""
        x_1HP = x_HP.unsqueeze(-3)
        return x_1HP * getattr(self, weight).transpose(0, 1).to(x_HP.dtype) if self.mimo else x_1HP

    def _output(self, y_RHP: Tensor, z_HP: Tensor) -> Tensor:
        z_RHP = self._ranks(z_HP, "mimo_z")
        if self.norm is None:
            y_RHP = y_RHP * F.silu(z_RHP)
        else:
            y_RHP = self.norm(y_RHP.flatten(-2), z_RHP.flatten(-2)).unflatten(-1, y_RHP.shape[-2:])
        if self.mimo:
            y_RHP = y_RHP * self.mimo_o.transpose(0, 1).to(y_RHP.dtype)
        return self.out_proj(y_RHP.sum(-3).flatten(-2))


class Mamba3(Stack):
    """Mamba-3 blocks in a stack.

    A block with d_model 64 has 35,208 parameters with d_state 64 and headdim 32, and 44,164 with 128 and 64.

    Args:
        d_model, d_state, expand, headdim, ngroups, mimo_rank, rope_fraction, outproj_norm: As in :class:`Mamba3Block`.
        n_layers: Number of blocks.
        stack: Options of :class:`Stack`.

    Example:
        >>> import torch
        >>> from recsys_ssm import Mamba3
        >>> backbone = Mamba3(d_model=8, n_layers=1, d_state=4, headdim=4, mimo_rank=2)
        >>> backbone(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, state = backbone.step(torch.randn(2, 8), backbone.init_state(batch_size=2))
        >>> output.shape
        torch.Size([2, 8])
    """

    causal = True
    labels: ClassVar[Mapping[str, str]] = {"two_tower": "FT-Mamba3", "next_item": "Mamba-3"}
    style: ClassVar[Mapping[str, str]] = {"color": "#7f4fbf", "linestyle": "-", "marker": "*"}

    def __init__(
        self,
        *,
        d_model: int = 128,
        n_layers: int = 4,
        d_state: int = 128,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        mimo_rank: int | None = None,
        rope_fraction: float = 0.5,
        outproj_norm: bool = False,
        **stack: Any,
    ) -> None:
        super().__init__(
            *(
                Mamba3Block(
                    d_model=d_model,
                    d_state=d_state,
                    expand=expand,
                    headdim=headdim,
                    ngroups=ngroups,
                    mimo_rank=mimo_rank,
                    rope_fraction=rope_fraction,
                    outproj_norm=outproj_norm,
                )
                for _ in range(n_layers)
            ),
            d_model=d_model,
            **stack,
        )
