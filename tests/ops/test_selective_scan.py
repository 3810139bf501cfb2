from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops import selective_scan, selective_scan_reference, selective_scan_step
from recsys_ssm.ops._dispatch import kernel_library
from recsys_ssm.ops.selective_scan import _scan_loop
from tests.ops.conftest import available_isas

FLOATS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
Inputs = dict[str, Any]


def make(
    seed: int,
    batch: int,
    length: int,
    channels: int,
    states: int,
    *,
    dtype: torch.dtype = torch.float32,
    leave_out: tuple[str, ...] = (),
    packed: bool = False,
) -> Inputs:
    """Make inputs like a model's; those named in ``leave_out`` are None."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inputs: Inputs = {
        "u": normal(batch, length, channels),
        "dt": normal(batch, length, channels) - 1,
        "A": -states * torch.rand(channels, states, generator=g, dtype=torch.float64) - 0.1,
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "dt_bias": normal(channels),
        "initial_state": normal(batch, channels, states),
    }
    for name in ("A", "D", "dt_bias", "initial_state"):
        inputs[name] = inputs[name].to(torch.float32 if dtype == torch.bfloat16 else dtype)
    for name in ("u", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].to(dtype)
    inputs["dt_softplus"] = "dt_bias" not in leave_out
    if not inputs["dt_softplus"]:
        inputs["dt"] = inputs["dt"].abs() * 0.3
    for name in leave_out:
        inputs[name] = None
    inputs["seq_idx"] = None
    if packed:
        new = torch.rand(batch, length, generator=g) < 0.2
        pad = torch.rand(batch, length, generator=g) < 0.2
        inputs["seq_idx"] = torch.where(pad, -1, new.cumsum(1))
    return inputs


def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return selective_scan_reference(**inputs)


def leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Copy the inputs; the floating-point tensors are leaves that require gradients."""
    return {
        name: x if not (isinstance(x, Tensor) and x.is_floating_point())
        else x.detach().to(dtype or x.dtype).clone().requires_grad_()
        for name, x in inputs.items()
    }  # fmt: skip


def run(function: Any, inputs: Inputs, weights: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return y, the state, and every gradient of their weighted sum."""
    y, state = function(inputs)
    given = {name: inputs[name] for name in FLOATS if inputs[name] is not None}
    cotangents = [w.to(o.dtype) for w, o in zip(weights, (y, state), strict=True)]
    gradients = torch.autograd.grad([y, state], list(given.values()), cotangents)
    named = {f"d{n}": x for n, x in zip(given, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def public(inputs: Inputs) -> tuple[Tensor, Tensor]:
    out = selective_scan(**inputs, return_final_state=True)
    assert isinstance(out, tuple)
    return out


def loop(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return _scan_loop(**inputs)


def error(found: Tensor, expected: Tensor) -> float:
    """Return max|a - b| / max|b|."""
    if expected.numel() == 0:
        assert found.shape == expected.shape
        return 0.0
    scale = expected.abs().max().item() or 1.0
    return (found.double() - expected).abs().max().item() / scale


def compare(function: Any, inputs: Inputs, bound: float) -> None:
    g = torch.Generator().manual_seed(0)
    batch, _, channels = inputs["u"].shape
    weights = (
        torch.randn(inputs["u"].shape, generator=g).to(inputs["u"].dtype),
        torch.randn(batch, channels, inputs["A"].shape[1], generator=g),
    )
    found = run(function, leaves(inputs), weights)
    expected = run(reference, leaves(inputs, torch.float64), weights)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert error(found[name], value) <= bound, (name, error(found[name], value))


def random_case(seed: int, dtype: torch.dtype) -> Inputs:
    rng = random.Random(seed)
    leave_out = tuple(x for x in ("D", "z", "dt_bias", "initial_state") if rng.random() < 0.3)
    return make(
        seed,
        rng.choice([1, 1, 2, 3, 5]),
        rng.choice([1, 2, 5, 15, 16, 17, 31, 32, 33, 40, 65, 70]),
        rng.choice([1, 3, 8, 15, 16, 17, 33, 48, 64, 65, 100, 130]),
        rng.choice([1, 2, 3, 5, 8, 16, 17]),
        dtype=dtype,
        leave_out=leave_out,
        packed=rng.random() < 0.5,
    )


# --- the formula -------------------------------------------------------------------------------


def test_reference_is_the_formula_one_scalar_at_a_time() -> None:
    x = make(0, 2, 6, 3, 2, dtype=torch.float64)
    x["seq_idx"] = torch.tensor([[-1, 4, 4, -1, 4, 7], [0, 1, 1, 2, -1, -1]])
    v = {name: t.numpy() if isinstance(t, Tensor) else t for name, t in x.items()}
    y = np.zeros((2, 6, 3))
    state = v["initial_state"].copy()
    for b in range(2):
        begun = False
        for t in range(6):
            sequence = v["seq_idx"][b, t]
            if sequence < 0:
                continue
            new = begun and sequence != v["seq_idx"][b, t - 1]
            begun = True
            for e in range(3):
                delta = math.log1p(math.exp(v["dt"][b, t, e] + v["dt_bias"][e]))
                total = v["D"][e] * v["u"][b, t, e]
                for n in range(2):
                    past = 0.0 if new else state[b, e, n]
                    decay = math.exp(delta * v["A"][e, n])
                    state[b, e, n] = decay * past + delta * v["B"][b, t, n] * v["u"][b, t, e]
                    total += v["C"][b, t, n] * state[b, e, n]
                z = v["z"][b, t, e]
                y[b, t, e] = total * z / (1 + math.exp(-z))
    found_y, found_state = reference(x)
    np.testing.assert_allclose(found_y.numpy(), y, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found_state.numpy(), state, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", [reference, loop])
def test_gradcheck(function: Any) -> None:
    x = leaves(make(1, 2, 4, 3, 2, dtype=torch.float64, packed=True))
    names = [name for name in FLOATS if x[name] is not None]
    assert torch.autograd.gradcheck(
        lambda *values: function({**x, **dict(zip(names, values, strict=True))}),
        [x[name] for name in names],
    )


# --- against the reference in float64 ------------------------------------------------------------


@pytest.mark.parametrize("block", range(10))
def test_float32_on_random_shapes(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        compare(public, random_case(seed, torch.float32), 1e-5)


@pytest.mark.parametrize("block", range(10))
def test_bfloat16_on_random_shapes(block: int) -> None:
    for seed in range(1000 + 20 * block, 1000 + 20 * block + 20):
        compare(public, random_case(seed, torch.bfloat16), 2e-2)


@pytest.mark.parametrize("isa", available_isas()[:-1])
def test_every_instruction_set(isa: str, use: Any) -> None:
    use(RECSYS_SSM_MAX_ISA=isa)
    assert kernel_library().isa == isa
    for seed in range(2000, 2040):
        compare(public, random_case(seed, torch.float32), 1e-5)
    for seed in range(2040, 2050):
        compare(public, random_case(seed, torch.bfloat16), 2e-2)


def test_plain_pytorch_on_random_shapes() -> None:
    for seed in range(3000, 3040):
        compare(loop, random_case(seed, torch.float32), 1e-5)
        compare(loop, random_case(seed, torch.bfloat16), 2e-2)


def test_float64_and_float16_run_too() -> None:
    compare(public, random_case(5, torch.float64), 1e-12)
    compare(public, random_case(5, torch.float16), 1e-2)


def test_long_and_perturbed() -> None:
    """Use A as in a trained model: away from -(1 ... N), with steps from .001 to .1."""
    x = make(9, 2, 300, 70, 16, leave_out=("initial_state",))
    spread = 1 + 0.3 * torch.randn(70, 16, generator=torch.Generator().manual_seed(1))
    x["A"] = -(torch.arange(1.0, 17.0) * spread.abs())
    x["dt_bias"] = torch.linspace(-7, -2, 70)
    compare(public, x, 1e-5)


def test_mixed_dtypes() -> None:
    x = make(3, 2, 9, 20, 4, dtype=torch.bfloat16)
    x["dt"], x["z"] = x["dt"].float(), x["z"].float()
    compare(public, x, 2e-2)
    x["A"] = x["A"].bfloat16()
    assert public(x)[1].dtype == torch.float32


# --- packing, padding, steps -----------------------------------------------------------------------


def rows(x: Inputs, b: int, where: Tensor) -> Inputs:
    """Take the positions `where` of row b as a batch of their own."""
    alone = dict(x, seq_idx=None, initial_state=None)
    for name in ("u", "dt", "B", "C", "z"):
        alone[name] = x[name][b : b + 1, where]
    return alone


def test_packed_is_padded_is_one_at_a_time() -> None:
    x = make(4, 3, 45, 24, 5, leave_out=("initial_state",))
    x["seq_idx"] = torch.full((3, 45), -1)
    for b, lengths in enumerate(((7, 33), (1, 1, 20, 4), (45,))):
        position = 5 if b == 1 else 0
        for i, n in enumerate(lengths):
            x["seq_idx"][b, position : position + n] = i
            position += n
    y, state = public(x)
    for b in range(3):
        for i in range(int(x["seq_idx"][b].max()) + 1):
            where = x["seq_idx"][b] == i
            alone = rows(x, b, where)
            expected, last = public(alone)
            torch.testing.assert_close(y[b, where], expected[0], rtol=1e-5, atol=1e-6)
            for left, right in ((3, 0), (0, 4), (2, 2)):  # padding on either side
                n = int(where.sum())
                padded = {
                    name: torch.nn.functional.pad(value, (0, 0, left, right), value=float("nan"))
                    if name in ("u", "dt", "B", "C", "z")
                    else value
                    for name, value in alone.items()
                }
                padded["seq_idx"] = torch.full((1, left + n + right), -1)
                padded["seq_idx"][:, left : left + n] = i
                y_padded, state_padded = public(padded)
                torch.testing.assert_close(y_padded[0, left : left + n], expected[0])
                torch.testing.assert_close(state_padded, last)
                assert (y_padded[0, :left] == 0).all()
                assert (y_padded[0, left + n :] == 0).all()
        torch.testing.assert_close(state[b], last[0], rtol=1e-5, atol=1e-6)


def test_no_gradient_between_packed_sequences_or_from_padding() -> None:
    x = make(6, 1, 40, 20, 3)
    x["seq_idx"] = torch.tensor([[0] * 15 + [-1] * 5 + [1] * 20])
    x = leaves(x)
    y, _ = public(x)
    first = torch.autograd.grad(y[:, :15].sum(), [x[n] for n in ("u", "dt", "B", "C", "z")],
                                retain_graph=True)  # fmt: skip
    assert all(g[:, :15].abs().sum() > 0 and g[:, 15:].abs().sum() == 0 for g in first)
    names = ("u", "dt", "B", "C", "z", "initial_state")
    second = torch.autograd.grad(y[:, 20:].sum(), [x[n] for n in names])
    assert all(g[:, 20:].abs().sum() > 0 and g[:, :20].abs().sum() == 0 for g in second[:5])
    assert second[5].abs().sum() == 0


def test_nan_in_padding_reaches_nothing() -> None:
    x = make(7, 2, 20, 18, 3)
    x["seq_idx"] = torch.zeros(2, 20, dtype=torch.long)
    x["seq_idx"][0, 12:] = -1
    for name in ("u", "dt", "B", "C", "z"):
        x[name][0, 12:] = float("nan")
    for function in (public, loop, reference):
        found = run(function, leaves(x), (torch.ones(2, 20, 18), torch.ones(2, 18, 3)))
        assert all(torch.isfinite(value).all() for value in found.values()), function


def test_rows_of_padding_alone() -> None:
    x = make(8, 3, 20, 17, 4)
    x["seq_idx"] = torch.tensor([[-1] * 20, [0] * 20, [-1] * 20])
    compare(public, x, 1e-5)
    y, state = public(x)
    assert (y[[0, 2]] == 0).all()
    assert torch.equal(state[[0, 2]], x["initial_state"][[0, 2]])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_any_integer_names_the_sequence(dtype: torch.dtype) -> None:
    x = make(8, 2, 12, 5, 4, packed=True)
    expected = public(x)[0]
    x["seq_idx"] = x["seq_idx"].to(dtype)
    assert torch.equal(public(x)[0], expected)


def test_step_is_forward() -> None:
    x = make(10, 3, 40, 20, 6)
    y, state = public(x)
    h = x["initial_state"]
    for t in range(40):
        before = h.clone()
        out, following = selective_scan_step(
            h, *(x[n][:, t] if n in ("u", "dt", "B", "C", "z") else x[n]
                 for n in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")), dt_softplus=True,
        )  # fmt: skip
        assert torch.equal(h, before)
        h = following
        torch.testing.assert_close(out, y[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h, state, rtol=1e-5, atol=1e-5)


def test_two_halves_are_the_whole() -> None:
    """Pass the state from one half to the other, with gradients through both."""
    x = make(11, 2, 41, 20, 4)
    weights = (torch.randn(2, 41, 20), torch.randn(2, 20, 4))

    def halves(inputs: Inputs) -> tuple[Tensor, Tensor]:
        parts = ("u", "dt", "B", "C", "z")
        y1, h1 = public({k: v[:, :17] if k in parts else v for k, v in inputs.items()})
        rest = {k: v[:, 17:] if k in parts else v for k, v in inputs.items()}
        y2, h2 = public({**rest, "initial_state": h1})
        return torch.cat([y1, y2], 1), h2

    whole, split = run(public, leaves(x), weights), run(halves, leaves(x), weights)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=2e-5, atol=2e-5, msg=name)


# --- layouts, shapes and values that must not hurt ----------------------------------------------


def test_strided_views_are_taken_as_they_are() -> None:
    """Pass u and z as halves of one projection, and dt, B and C as slices of another, as a Mamba block does."""
    g = torch.Generator().manual_seed(0)
    xz = torch.randn(2, 21, 80, generator=g)
    dbc = torch.randn(2, 21, 40 + 5 + 5, generator=g)
    A = -torch.rand(40, 5, generator=g)

    def scan(xz: Tensor, dbc: Tensor, copy: bool) -> Tensor:
        u, z = xz.chunk(2, -1)
        dt, B, C = dbc.split([40, 5, 5], -1)
        if copy:
            u, z, dt, B, C = (x.contiguous() for x in (u, z, dt, B, C))
        out = selective_scan(u, dt, A, B, C, z=z, dt_softplus=True)
        assert isinstance(out, Tensor)
        return out

    found = []
    for copy in (False, True):
        a, b = xz.clone().requires_grad_(), dbc.clone().requires_grad_()
        y = scan(a, b, copy)
        found.append((y, *torch.autograd.grad(y.sin().sum(), [a, b])))
    for view, dense in zip(*found, strict=True):
        torch.testing.assert_close(view, dense, rtol=1e-5, atol=1e-4)


def test_other_strides() -> None:
    x = make(12, 3, 19, 20, 4)
    expected = public(x)
    for name in ("u", "dt", "z", "B", "C", "initial_state"):
        x[name] = x[name].transpose(1, 2).contiguous().transpose(1, 2)
    x["A"] = x["A"].t().contiguous().t()
    x["D"] = torch.stack([x["D"], x["D"]], 1)[:, 0]
    x["C"] = x["C"][:1].expand(3, -1, -1)
    found = public(x)
    assert torch.equal(found[0][0], expected[0][0])
    compare(public, x, 1e-5)


@pytest.mark.parametrize(
    "shape", [(0, 5, 8, 4), (2, 0, 8, 4), (2, 5, 0, 4), (2, 5, 8, 0), (0, 0, 0, 0), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_too_small(
    shape: tuple[int, int, int, int], packed: bool, count: int, threads: Any
) -> None:
    threads(count)
    x = leaves(make(0, *shape, packed=packed))
    y, state = public(x)
    assert y.shape == x["u"].shape
    assert state.shape == x["initial_state"].shape
    (y.sum() + state.sum()).backward()
    for name in FLOATS:
        gradient = x[name].grad
        if shape[1] or gradient is not None:  # plain PyTorch gives None where it took no step
            assert gradient.shape == x[name].shape
    if shape[1] == 0:
        assert torch.equal(state, x["initial_state"])
    if shape[3] == 0 and not packed and shape[0]:
        z = x["z"]
        torch.testing.assert_close(y, x["D"] * x["u"] * z * torch.sigmoid(z))


def test_wrong_arguments_are_named() -> None:
    x = make(0, 2, 5, 8, 4)
    for name, shape in (
        ("dt", (2, 5, 7)),
        ("B", (2, 5, 3)),
        ("C", (2, 4, 4)),
        ("A", (7, 4)),
        ("D", (9,)),
        ("z", (1, 5, 8)),
        ("dt_bias", (8, 1)),
        ("initial_state", (2, 4, 8)),
    ):
        with pytest.raises(UserError, match=f"selective_scan: {name} must have shape"):
            public({**x, name: torch.zeros(shape)})
    with pytest.raises(UserError, match="u must be"):
        public({**x, "u": torch.zeros(5, 8)})
    with pytest.raises(UserError, match="seq_idx must have shape"):
        public({**x, "seq_idx": torch.zeros(2, 6, dtype=torch.long)})
    with pytest.raises(UserError, match="seq_idx must be an integer"):
        public({**x, "seq_idx": torch.zeros(2, 5)})
    with pytest.raises(UserError, match="B must be floating point"):
        public({**x, "B": torch.zeros(2, 5, 4, dtype=torch.long)})
    with pytest.raises(UserError, match="z is on meta"):
        public({**x, "z": x["z"].to("meta")})
    with pytest.raises(UserError, match="state"):
        selective_scan_step(torch.zeros(2, 8), x["u"][:, 0], x["dt"][:, 0], x["A"],
                            x["B"][:, 0], x["C"][:, 0])  # fmt: skip


def test_extreme_values_do_not_crash_and_stay_where_they_are() -> None:
    for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e30):
        for name in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"):
            x = make(0, 2, 20, 17, 3)
            x[name].view(-1)[0] = value
            found = run(public, leaves(x), (torch.ones(2, 20, 17), torch.ones(2, 17, 3)))
            if name not in ("A", "D", "dt_bias"):  # these two rows share nothing else
                for part in ("y", "state", "du", "ddt", "dz"):
                    assert torch.isfinite(found[part][1]).all(), (name, value, part)
            if math.isnan(value):
                assert torch.isnan(found["y"]).any(), name


def test_large_steps_forget() -> None:
    """Check that exp(dt A) far below the smallest float is 0, not NaN."""
    x = make(0, 1, 3, 16, 2, leave_out=("z", "D", "dt_bias"))
    x["dt"][:, 1] = 1e4
    y, _ = public(x)
    expected = (x["dt"] * x["u"])[:, 1] * (x["B"] * x["C"])[:, 1].sum(-1, keepdim=True)
    torch.testing.assert_close(y[:, 1], expected)


# --- bits, threads, processes ----------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_same_bits_on_every_run(batch: int, threads: Any) -> None:
    x = make(13, batch, 50, 130, 5, packed=True)
    weights = (torch.randn(batch, 50, 130), torch.randn(batch, 130, 5))
    for count in (1, 2, 3):
        threads(count)
        first = run(public, leaves(x), weights)
        for _ in range(3):
            again = run(public, leaves(x), weights)
            assert all(torch.equal(first[name], again[name]) for name in first)
        compare(public, x, 1e-5)


def _script(body: str, **environment: str) -> str:
    head = """
        import os, threading, torch
        from recsys_ssm.ops import selective_scan
        from recsys_ssm.ops._dispatch import kernel_library
        torch.manual_seed(0)
        torch.set_num_threads(2)
        x = [torch.randn(4, 40, 70), torch.rand(4, 40, 70), -torch.rand(70, 8),
             torch.randn(4, 40, 8), torch.randn(4, 40, 8)]
        def scan():
            leaves = [t.clone().requires_grad_() for t in x]
            y = selective_scan(*leaves)
            return [y, *torch.autograd.grad(y.square().sum(), leaves)]
        def same(a, b):
            return all(torch.equal(p, q) for p, q in zip(a, b))
        expected = scan()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("own_threads", [False, True])
def test_survives_a_fork(own_threads: bool, kernel: None) -> None:
    """Check that a child forked after the threads have started works without them."""
    out = _script(f"""
        if {own_threads}:
            kernel_library().handle.recsys_use_gomp(None)
            assert same(scan(), expected)
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if same(scan(), expected) and same(scan(), expected) else 1)
            assert os.waitpid(pid, 0)[1] == 0
        assert same(scan(), expected)
        print("survived")
    """)
    assert "survived" in out


@pytest.mark.parametrize("own_threads", [False, True])
def test_many_callers_at_once(own_threads: bool, kernel: None) -> None:
    out = _script(f"""
        if {own_threads}:
            kernel_library().handle.recsys_use_gomp(None)
        wrong = []
        def work():
            torch.set_num_threads(2)
            for _ in range(30):
                if not same(scan(), expected):
                    wrong.append(1)
        workers = [threading.Thread(target=work) for _ in range(4)]
        [w.start() for w in workers]
        [w.join() for w in workers]
        print("wrong", len(wrong))
    """)
    assert "wrong 0" in out


# --- PyTorch's machinery ---------------------------------------------------------------------------


def _op_arguments(x: Inputs) -> tuple[Any, ...]:
    return (x["u"], x["dt"], x["A"], x["B"], x["C"], x["D"], x["z"], x["dt_bias"],
            x["dt_softplus"], x["seq_idx"], x["initial_state"], True, False)  # fmt: skip


@pytest.mark.parametrize("leave_out", [(), ("D", "z", "dt_bias", "initial_state")])
def test_opcheck(leave_out: tuple[str, ...], kernel: None) -> None:
    x = leaves(make(14, 2, 40, 20, 3, leave_out=leave_out, packed=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(torch.ops.recsys_ssm.selective_scan.default, _op_arguments(x))


def test_compile_takes_it_as_one_node() -> None:
    x = make(15, 2, 21, 20, 3)
    weights = (torch.randn(2, 21, 20), torch.randn(2, 20, 3))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(public, backend=backend, fullgraph=True)
    found, expected = run(compiled, leaves(x), weights), run(public, leaves(x), weights)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert len(graphs) == 1
    if kernel_library().handle is not None:
        assert "recsys_ssm.selective_scan" in graphs[0].code


def test_compile_with_aot_autograd() -> None:
    x = make(15, 2, 21, 20, 3, packed=True)
    weights = (torch.randn(2, 21, 20), torch.randn(2, 20, 3))
    torch._dynamo.reset()
    compiled = torch.compile(public, backend="aot_eager", fullgraph=True)
    found, expected = run(compiled, leaves(x), weights), run(public, leaves(x), weights)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


class _Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(20, 3))

    def forward(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        out = selective_scan(u, dt, self.A, B, C, dt_softplus=True)
        assert isinstance(out, Tensor)
        return out


def test_export() -> None:
    x = make(16, 2, 21, 20, 3)
    arguments = (x["u"], x["dt"], x["B"], x["C"])
    module = _Module()
    program = torch.export.export(module, arguments)
    torch.testing.assert_close(program.module()(*arguments), module(*arguments))


def test_autocast_runs_in_the_inputs_dtype() -> None:
    x = make(17, 2, 21, 20, 3, dtype=torch.bfloat16)
    expected = public(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = public(x)
        plain = loop(x)
        single = public(make(17, 2, 21, 20, 3))
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == plain[1].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    assert single[0].dtype == torch.float32
    torch.testing.assert_close(plain[1], expected[1], rtol=1e-4, atol=1e-4)


def test_only_the_gradients_asked_for() -> None:
    x = make(18, 2, 9, 20, 3)
    x["u"].requires_grad_()
    y, state = public(x)
    (gradient,) = torch.autograd.grad(y.sum(), [x["u"]], retain_graph=True)
    assert gradient.shape == x["u"].shape
    (through_state,) = torch.autograd.grad(state.sum(), [x["u"]])
    assert through_state.abs().sum() > 0
    with torch.no_grad():
        assert not public(x)[0].requires_grad


def test_inputs_are_left_as_they_are() -> None:
    x = make(19, 2, 40, 20, 3, packed=True)
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in x.items()}
    run(public, leaves(x), (torch.ones(2, 40, 20), torch.ones(2, 20, 3)))
    public(x)
    for name, value in before.items():
        assert not isinstance(value, Tensor) or torch.equal(x[name], value)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Make PyTorch fill memory that nobody has written to with NaN."""
    torch.use_deterministic_algorithms(True)  # without it the fill is off
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("channels", "states"), [(0, 4), (4, 0)])
def test_no_channels_or_no_states_leave_no_memory_uninitialised(
    uninitialised_is_nan: None, channels: int, states: int
) -> None:
    torch.manual_seed(0)
    shapes = {
        "u": (2, 3, channels), "dt": (2, 3, channels), "A": (channels, states),
        "B": (2, 3, states), "C": (2, 3, states), "D": (channels,), "z": (2, 3, channels),
        "dt_bias": (channels,), "initial_state": (2, channels, states),
    }  # fmt: skip
    inputs = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    found, wanted = (
        torch.autograd.grad(
            sum((x + x * x).sum() for x in outputs),
            list(inputs.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        for outputs in (
            selective_scan(**inputs, dt_softplus=True, return_final_state=True),
            selective_scan_reference(**inputs, dt_softplus=True),
        )
    )
    for name, a, b in zip(inputs, found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("length", [200, 256, 257, 2048])
def test_slow_decays_over_long_rows(length: int, isa: str, use: Any) -> None:
    """Small errors of the rate add up along the row: the bound of docs/kernels.md holds at every length."""
    if isa != "plain":
        use(RECSYS_SSM_MAX_ISA=isa)
    torch.manual_seed(0)
    shape = (1, length, 16)
    x = {
        "u": torch.randn(shape), "dt": torch.rand(shape) * 0.009 + 0.001,
        "A": -torch.arange(1.0, 5).repeat(16, 1), "B": torch.randn(1, length, 4), "C": torch.randn(1, length, 4),
    }  # fmt: skip
    weight = torch.randn(shape)

    def results(x: dict[str, Tensor], scan: Any) -> list[Tensor]:
        given = {name: value.requires_grad_() for name, value in x.items()}
        y = scan(**given)
        return [y, *torch.autograd.grad((y * weight).sum(), list(given.values()))]

    plain = (None, None, None, False, None, None)
    expected = results(
        {name: value.double() for name, value in x.items()},
        lambda u, dt, A, B, C: _scan_loop(u, dt, A, B, C, *plain)[0],
    )
    for value, exact in zip(results(x, selective_scan), expected, strict=True):
        assert (value - exact).abs().max() < 1e-5 * exact.abs().max()
