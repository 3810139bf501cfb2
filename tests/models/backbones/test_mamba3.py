"""Test Mamba-3 against the public implementation, against a recurrence written out, and across precisions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.models.backbones.mamba3 import Mamba3, Mamba3Block

# Made by scripts/make_mamba3_fixtures.py.
with np.load(Path(__file__).parents[2] / "fixtures" / "mamba3.npz", allow_pickle=False) as archive:
    NUMBERS = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "cases"}
    CASES: list[dict[str, Any]] = json.loads(str(archive["cases"]))

OPTIONS: list[dict[str, Any]] = [
    {},
    {"ngroups": 2},
    {"rope_fraction": 1.0, "outproj_norm": True},
    {"mimo_rank": 1},
    {"mimo_rank": 4, "ngroups": 2},
    {"mimo_rank": 3, "rope_fraction": 1.0, "outproj_norm": True},
]


def ours(public: dict[str, Any]) -> dict[str, Any]:
    """Translate the constructor arguments of the public module."""
    options = {
        name: value
        for name, value in public.items()
        if name not in {"is_mimo", "is_outproj_norm", "chunk_size", "fuse_pregate_headwise_norm"}
    }
    return options | {"outproj_norm": public.get("is_outproj_norm", False)}


def make(**options: Any) -> Mamba3Block:
    """Make a small block whose parameters all matter."""
    torch.manual_seed(0)
    block = Mamba3Block(**({"d_model": 8, "d_state": 8, "headdim": 4} | options)).double()
    with torch.no_grad():
        block.dt_bias += 3
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return block


@pytest.mark.parametrize("case", range(len(CASES)))
def test_block_equals_the_public_one(case: int) -> None:
    expected = {
        name.removeprefix(f"{case}/"): each
        for name, each in NUMBERS.items()
        if name.startswith(f"{case}/")
    }
    block = Mamba3Block(**ours(CASES[case])).double()
    # Strict: the same names and shapes, so public checkpoints load.
    block.load_state_dict(
        {
            name.removeprefix("parameter/"): each
            for name, each in expected.items()
            if name.startswith("parameter/")
        },
        strict=True,
    )
    x = expected["x"].clone().requires_grad_()
    y = block(x)
    y.backward(expected["dy"])
    torch.testing.assert_close(y, expected["y"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(x.grad, expected["dx"], rtol=1e-9, atol=1e-11)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[f"gradient/{name}"], rtol=1e-9, atol=1e-11, msg=name
        )


def test_the_public_cases_cover_both_kinds() -> None:
    assert sum(case.get("is_mimo", False) for case in CASES) >= 3
    assert sum(not case.get("is_mimo", False) for case in CASES) >= 3


def recurrence(block: Mamba3Block, u_LD: Tensor) -> Tensor:
    """Write the block out for one sequence: loops over steps, heads and ranks, numbers rotated as complex ones."""
    heads, headdim, states, groups = block.heads, block.headdim, block.d_state, block.ngroups
    rank, half = block.rank, block.d_state // 2
    outputs = []
    theta = torch.zeros(heads, block.angles, dtype=u_LD.dtype)
    state = torch.zeros(heads, headdim, states, dtype=u_LD.dtype)
    before = torch.zeros(heads, headdim, states, dtype=u_LD.dtype)
    for u_D in u_LD:
        parts = (block.in_proj.weight @ u_D).split(block.widths)
        z, x = (part.view(heads, headdim) for part in parts[:2])
        B, C = (
            F.rms_norm(part.view(rank, groups, states), (states,), norm.weight, 1e-5)
            for part, norm in zip(parts[2:4], (block.B_norm, block.C_norm), strict=True)
        )
        dt, a, trapezoid, angles = parts[4:]
        y = torch.zeros(heads, rank, headdim, dtype=u_D.dtype)
        new_state, new_before, new_theta = [], [], []
        for h in range(heads):
            delta = torch.log1p(torch.exp(dt[h] + block.dt_bias[h]))
            A = -torch.where(a[h] >= 0, 1 + a[h], 1 / (1 - a[h].clamp(max=0)))
            A = torch.minimum(A, torch.full_like(A, -block.A_floor))
            trap = torch.sigmoid(trapezoid[h])
            turned = theta[h] + math.pi * torch.tanh(angles) * delta
            new_theta.append(turned)
            turn = torch.polar(
                torch.ones(half, dtype=u_D.dtype), F.pad(turned, (0, half - block.angles))
            )

            def rotated(row: Tensor, turn: Tensor = turn) -> Tensor:
                if block.mimo:
                    pair = torch.complex(row[:half], row[half:]) * turn
                    return torch.cat([pair.real, pair.imag])
                return torch.view_as_real(torch.complex(row[::2], row[1::2]) * turn).flatten()

            group = h // (heads // groups)
            keys = [rotated(B[r, group] + block.B_bias[h, r]) for r in range(rank)]
            queries = [rotated(C[r, group] + block.C_bias[h, r]) for r in range(rank)]
            inputs = [x[h] * (block.mimo_x[h, r] if block.mimo else 1) for r in range(rank)]
            added = sum(torch.outer(inputs[r], keys[r]) for r in range(rank))
            assert isinstance(added, Tensor)
            decay = torch.exp(delta * A)
            now = decay * state[h] + (1 - trap) * delta * decay * before[h] + trap * delta * added
            new_state.append(now)
            new_before.append(added)
            for r in range(rank):
                y[h, r] = now @ queries[r] + block.D[h] * inputs[r]
        state, before, theta = (torch.stack(each) for each in (new_state, new_before, new_theta))
        out = torch.zeros(heads, headdim, dtype=u_D.dtype)
        for h in range(heads):
            for r in range(rank):
                one = y[h, r]
                if block.norm is not None:
                    weight = block.norm.weight.view(heads, headdim)[h]
                    one = F.rms_norm(one, (headdim,), weight, 1e-5)
                gate = z[h] * (block.mimo_z[h, r] if block.mimo else 1)
                one = one * F.silu(gate)
                out[h] = out[h] + (one * block.mimo_o[h, r] if block.mimo else one)
        outputs.append(block.out_proj.weight @ out.flatten())
    return torch.stack(outputs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [1, 17])
def test_block_equals_the_recurrence_written_out(options: dict[str, Any], length: int) -> None:
    block = make(**options)
    u = torch.randn(length, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(length, 8, dtype=torch.float64)
    leaves = [u, *block.parameters()]
    y, expected = block(u[None])[0], recurrence(block, u)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    found = torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, leaves, dy, allow_unused=True, materialize_grads=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("d_state", "headdim", "count"), [(64, 32, 35_208), (128, 64, 44_164)])
def test_number_of_parameters(d_state: int, headdim: int, count: int) -> None:
    block = Mamba3Block(d_model=64, d_state=d_state, headdim=headdim)
    assert sum(parameter.numel() for parameter in block.parameters()) == count


@pytest.mark.parametrize("options", OPTIONS)
def test_float32_packed_rows_equal_float64(options: dict[str, Any]) -> None:
    block = make(**options)
    seq_idx = torch.tensor([[0] * 20 + [1] * 3 + [-1] * 2 + [2] * 15, [-1] * 4 + [7] * 36])
    u = torch.randn(2, 40, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 40, 8, dtype=torch.float64) * (seq_idx >= 0)[..., None]
    y = block(u, seq_idx)
    expected = torch.autograd.grad(y, [u, *block.parameters()], dy)
    block.float()
    single = u.detach().float().requires_grad_()
    out = block(single, seq_idx)
    valid = seq_idx >= 0
    torch.testing.assert_close(out.double()[valid], y[valid], rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(out, [single, *block.parameters()], dy.float())
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().clamp(min=1).item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("options", OPTIONS)
def test_autocast(options: dict[str, Any]) -> None:
    block = make(**options).float()
    u = torch.randn(2, 30, 8, requires_grad=True)
    expected = block(u)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(u)
        state = block.init_state(2)
        for t in range(30):
            stepped, state = block.step(u[:, t], state)
    assert y.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    scale = expected.abs().max().item()
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.1 * scale)
    torch.testing.assert_close(stepped.float(), expected[:, -1], rtol=0, atol=0.1 * scale)
    y.float().sum().backward()
    assert u.grad is not None and u.grad.isfinite().all()


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4]])
def test_compiled(options: dict[str, Any]) -> None:
    block = make(**options).float()
    u = torch.randn(2, 20, 8, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for module in (block, compiled):
        module(u).sin().sum().backward()
    y = compiled(u)
    torch.testing.assert_close(y, block(u), rtol=1e-5, atol=1e-5)
    (one,) = torch.autograd.grad(y.sin().sum(), u)
    (other,) = torch.autograd.grad(block(u).sin().sum(), u)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_long_row_keeps_its_precision() -> None:
    """Angles add up over 2,000 tokens; chunks pass a state on."""
    block = make()
    u = torch.randn(1, 2000, 8, dtype=torch.float64)
    expected = block(u)
    torch.testing.assert_close(block.float()(u.float()).double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headdim": 3}, "headdim=3 does not divide"),
        ({"ngroups": 3}, "ngroups=3 does not divide"),
        ({"rope_fraction": 0.3}, "rope_fraction=0.3"),
        ({"d_state": 7}, "d_state=7"),
        ({"d_state": 2}, "d_state=2"),
        ({"mimo_rank": 0}, "mimo_rank=0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba3(**({"d_model": 8, "d_state": 8, "headdim": 4, "n_layers": 1} | options))
