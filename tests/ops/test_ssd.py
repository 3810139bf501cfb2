"""Check every path of state space duality against the formula, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops._dispatch import kernel_library
from recsys_ssm.ops.ssd import (
    _LONGEST_CHUNK,
    _OPERATOR,
    _kernel_chunk,
    ssd,
    ssd_reference,
    ssd_step,
)
from tests.ops.conftest import available_isas

needs_kernel = pytest.mark.skipif(
    _OPERATOR.functions is None, reason="the compiled kernel is not there"
)
SUMMED = {"A", "D", "dt_bias"}
FLOATS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def random_sequences(batch: int, length: int, rng: random.Random) -> Tensor:
    """Make rows of sequences of 1 to 40 positions, with padding before, between and after; some rows are empty."""
    seq_idx = torch.full((batch, length), -1)
    for row in seq_idx:
        t, name = rng.randint(0, 2), 0
        while t < length and rng.random() > 0.05:
            size = rng.randint(1, 40)
            row[t : t + size] = name
            t, name = t + size + rng.choice([0, 0, 0, 2]), name + 1
    return seq_idx


def random_inputs(
    batch: int,
    length: int,
    heads: int,
    headdim: int,
    groups: int,
    states: int,
    dtype: torch.dtype = torch.float64,
    decay: float = 4.0,
    state: bool = True,
) -> dict[str, Any]:
    """Make arguments of ``ssd``; x, B and C are views of one tensor, as they come from the convolution."""
    channels, width = heads * headdim, groups * states
    xBC = torch.randn(batch, length, channels + 2 * width).to(dtype)
    x, B, C = xBC.split([channels, width, width], dim=-1)
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "x": x.unflatten(2, (heads, headdim)).requires_grad_(),
        "dt": torch.randn(batch, length, heads).to(dtype).requires_grad_(),
        "A": (-decay * torch.rand(heads, dtype=wide)).requires_grad_(),
        "B": B.unflatten(2, (groups, states)).requires_grad_(),
        "C": C.unflatten(2, (groups, states)).requires_grad_(),
        "D": torch.randn(heads, dtype=wide, requires_grad=True),
        "dt_bias": torch.randn(heads, dtype=wide, requires_grad=True),
        "dt_softplus": True,
        "initial_state": torch.randn(batch, heads, headdim, states, dtype=wide).requires_grad_()
        if state
        else None,
    }


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().double().requires_grad_()
        if isinstance(value, Tensor) and name in FLOATS
        else value
        for name, value in inputs.items()
    }


def gradients(
    outputs: tuple[Tensor, ...], inputs: dict[str, Any], given: list[Tensor]
) -> list[Tensor]:
    leaves = [value for name, value in inputs.items() if name in FLOATS and value is not None]
    zero = 0 * sum(
        leaf.double().sum() for leaf in leaves
    )  # an input that nothing depends on counts too
    return list(torch.autograd.grad((*outputs, zero), leaves, (*given, torch.ones_like(zero))))


def relative_error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Return max|a - b| / max|b|."""
    scale = max(scale, expected.abs().max().item())
    error = (found.double() - expected).abs().max().item()
    return error / scale if scale else error


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_random_shapes(dtype: torch.dtype, bound: float) -> None:
    check_random_shapes(dtype, bound, 200)


@needs_kernel
@pytest.mark.parametrize("isa", available_isas()[:-1])
def test_every_instruction_set(isa: str, use: Any) -> None:
    use(RECSYS_SSM_MAX_ISA=isa)
    assert kernel_library().isa == isa
    check_random_shapes(torch.float32, 1e-5, 40)
    check_random_shapes(torch.bfloat16, 2e-2, 10)


def check_random_shapes(dtype: torch.dtype, bound: float, count: int) -> None:
    rng = random.Random(1)
    torch.manual_seed(1)
    for _ in range(count):
        groups = rng.choice([1, 1, 2])
        heads, headdim = groups * rng.randint(1, 3), rng.choice([1, 3, 4, 16, 20])
        batch, length = rng.randint(1, 3), rng.choice([1, 2, 15, 16, 17, 33, 50])
        states = rng.choice([1, 4, 5, 16])
        inputs = random_inputs(
            batch, length, heads, headdim, groups, states, dtype,
            decay=rng.choice([0.1, 4.0]), state=rng.random() < 0.5,
        )  # fmt: skip
        inputs["D"] = inputs["D"] if rng.random() < 0.7 else None
        if rng.random() < 0.5:
            inputs["seq_idx"] = random_sequences(batch, length, rng)
        final = rng.random() < 0.5
        found = ssd(**inputs, return_final_state=True) if final else (ssd(**inputs),)
        given = [torch.randn_like(output) for output in found]
        doubles = in_double(inputs)
        expected = ssd_reference(**doubles)[: len(found)]
        assert found[0].dtype == dtype and (not final or found[1].dtype == torch.float32)

        names = [name for name in FLOATS if inputs[name] is not None]
        found_grads = gradients(found, inputs, given)
        wide_given = [each.double() for each in given]
        expected_grads = gradients(expected, doubles, wide_given)
        shape = (batch, length, heads, headdim, groups, states)
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) <= bound, shape
        for name, a, b in zip(names, found_grads, expected_grads, strict=True):
            # Of A, D and dt_bias there is one number a head, a sum over all positions. Where it
            # happens to cancel, float32 keeps the digits of its terms, not of what is left.
            scale = cancelled_scale(name, doubles, wide_given) if name in SUMMED else 0.0
            error = relative_error(a, b, scale)
            assert error <= (3 * bound if name in SUMMED else bound), (name, error, shape)


def cancelled_scale(name: str, inputs: dict[str, Any], given: list[Tensor]) -> float:
    """Return the root of the summed squares of the terms that each channel of each position adds to the gradient of
    A, D or dt_bias: the same scan with every channel a head and every position's parameter its own."""
    batch, length, heads, headdim = inputs["x"].shape
    spread = inputs[name].detach()[:, None].expand(batch, length, heads, headdim).flatten(2)
    spread = spread.clone().requires_grad_()
    dt, dt_bias, A = (
        inputs[each].detach()[..., None].expand(*inputs[each].shape, headdim).flatten(-2)
        for each in ("dt", "dt_bias", "A")
    )
    x, state = inputs["x"].detach().flatten(2)[..., None], inputs["initial_state"]
    dt = torch.nn.functional.softplus(dt + (spread if name == "dt_bias" else dt_bias))
    if name == "A":  # with A = 1 and dt · A for dt, dt · x stays what it was for x / A
        A, dt, x = torch.ones_like(A), dt * spread, x / spread[..., None]
    y, final = ssd(
        x, dt, A, inputs["B"].detach(), inputs["C"].detach(), seq_idx=inputs.get("seq_idx"),
        initial_state=None if state is None else state.detach().flatten(1, 2).unsqueeze(2),
        return_final_state=True,
    )  # fmt: skip
    if name == "D":
        y = y + spread[..., None] * x
    outputs = (y, final + 0 * spread.sum())[: len(given)]  # D is in y alone
    (terms,) = torch.autograd.grad(
        outputs, spread, [g.reshape(o.shape) for g, o in zip(given, outputs, strict=True)]
    )
    return terms.square().sum((0, 1)).unflatten(0, (heads, headdim)).sum(1).sqrt().max().item()


@pytest.mark.parametrize("chunk_size", [1, 5, 16, None])
def test_plain_path_equals_the_formula(chunk_size: int | None) -> None:
    rng = random.Random(2)
    torch.manual_seed(2)
    for length in (1, 2, 16, 37):
        for packed in (False, True):
            inputs = random_inputs(2, length, 4, 3, 2, 5)
            if packed:
                inputs["seq_idx"] = random_sequences(2, length, rng)
            found = ssd(**inputs, return_final_state=True, chunk_size=chunk_size)
            expected = ssd_reference(**inputs)
            given = [torch.randn_like(output) for output in found]
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
            for a, b in zip(
                gradients(found, inputs, given), gradients(expected, inputs, given), strict=True
            ):
                torch.testing.assert_close(a, b)


@needs_kernel
@pytest.mark.parametrize("length", [100, 300, 520])
@pytest.mark.parametrize("states", [4, 64])
def test_several_chunks(length: int, states: int) -> None:
    assert _kernel_chunk(length, 32, states) < length
    torch.manual_seed(0)
    inputs = random_inputs(2, length, 2, 16, 1, states, torch.float32, decay=0.05)
    inputs["seq_idx"] = torch.zeros(2, length, dtype=torch.long)
    inputs["seq_idx"][1, length // 2 :] = 1
    found = ssd(**inputs, return_final_state=True)
    given = [torch.randn_like(output) for output in found]
    doubles = in_double(inputs)
    expected = ssd(**doubles, return_final_state=True)  # the plain path, held to the formula above
    for a, b in zip(
        [*found, *gradients(found, inputs, given)],
        [*expected, *gradients(expected, doubles, [each.double() for each in given])],
        strict=True,
    ):
        assert relative_error(a, b) <= 1e-5


def test_kernel_chunks_are_whole_blocks() -> None:
    for length in (1, 16, 17, 200, 5000):
        for channels, states in ((8, 128), (128, 128), (1024, 16)):
            chunk = _kernel_chunk(length, channels, states)
            assert chunk % 16 == 0 and 16 <= chunk <= _LONGEST_CHUNK


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_and_halves_equal_the_whole(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = random_inputs(2, 21, 4, 3, 2, 5, dtype)
    y, final = ssd(**inputs, return_final_state=True)
    state, stepped = inputs["initial_state"], []
    shared = {name: inputs[name] for name in ("A", "D", "dt_bias", "dt_softplus")}
    for t in range(21):
        now = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C")}
        out, state = ssd_step(state, **now, **shared)
        stepped.append(out)
    torch.testing.assert_close(torch.stack(stepped, 1), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)

    def part(where: slice, initial: Tensor) -> tuple[Tensor, Tensor]:
        now = {name: inputs[name][:, where] for name in ("x", "dt", "B", "C")}
        return ssd(**now, **shared, initial_state=initial, return_final_state=True)

    first, middle = part(slice(0, 8), inputs["initial_state"])
    second, last = part(slice(8, 21), middle)
    torch.testing.assert_close(torch.cat([first, second], 1), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_equals_padded_equals_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 20, 2]
    shared = random_inputs(1, 1, 4, 3, 2, 5, dtype, state=False)
    del shared["initial_state"]
    alone = [random_inputs(1, n, 4, 3, 2, 5, dtype) for n in lengths]
    moving = ("x", "dt", "B", "C")
    expected = [ssd(**shared | {k: each[k] for k in moving}) for each in alone]

    packed = shared | {k: torch.cat([each[k] for each in alone], 1) for k in moving}
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    torch.testing.assert_close(
        ssd(**packed, seq_idx=ids), torch.cat(expected, 1), rtol=1e-4, atol=1e-5
    )
    for left in (False, True):
        ids = torch.full((4, 21), -1)
        padded = shared | {
            k: torch.full((4, 21, *alone[0][k].shape[2:]), torch.nan, dtype=dtype) for k in moving
        }
        for row, (n, each) in enumerate(zip(lengths, alone, strict=True)):
            place = slice(21 - n, 21) if left else slice(0, n)
            ids[row, place] = 0
            for k in moving:
                padded[k][row, place] = each[k][0].detach()
        out = ssd(**padded, seq_idx=ids)
        assert (out[ids < 0] == 0).all()
        for row, y in enumerate(expected):
            torch.testing.assert_close(out[row][ids[row] == 0], y[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stands_at_padding_reaches_no_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = random_inputs(1, 20, 2, 4, 1, 3, dtype)
    inputs["seq_idx"] = torch.tensor([[-1] + [0] * 9 + [-1] * 2 + [1] * 8])
    for name in ("x", "dt", "B", "C"):
        with torch.no_grad():
            inputs[name][:, [0, 10, 11]] = torch.nan
    y, state = ssd(**inputs, return_final_state=True)
    assert y.isfinite().all() and state.isfinite().all()
    for gradient in gradients(
        (y, state), inputs | {"x": inputs["x"]}, [torch.ones_like(y), torch.ones_like(state)]
    ):
        assert gradient.isfinite().all()


def test_gradcheck() -> None:
    torch.manual_seed(0)
    inputs = random_inputs(1, 5, 2, 2, 1, 2)
    names = [name for name in FLOATS if inputs[name] is not None]
    for run in (ssd, ssd_reference):
        options = {"return_final_state": True, "chunk_size": 2} if run is ssd else {}
        for ids in (None, torch.tensor([[0, 0, 1, 1, -1]])):

            def call(
                *values: Tensor, run: Any = run, ids: Any = ids, options: Any = options
            ) -> Any:
                given = dict(zip(names, values, strict=True))
                return run(**given, dt_softplus=True, seq_idx=ids, **options)

            assert torch.autograd.gradcheck(call, [inputs[name] for name in names])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_every_time(threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    inputs = random_inputs(6, 60, 4, 8, 2, 16, torch.float32)
    runs = []
    for _ in range(3):
        outputs = ssd(**inputs, return_final_state=True)
        runs.append([*outputs, *gradients(outputs, inputs, [torch.ones_like(o) for o in outputs])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@needs_kernel
@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("heads", [1, 4, 6])
def test_one_row_on_several_threads(threads: int, heads: int) -> None:
    torch.manual_seed(0)
    inputs = random_inputs(1, 40, heads, 5, 1, 8, torch.float32)
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        outputs = ssd(**inputs, return_final_state=True)
        ones = [torch.ones_like(output) for output in outputs]
        found.append([*outputs, *gradients(outputs, inputs, ones)])
    torch.set_num_threads(1)
    for alone, together in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_registered_with_torch_library(packed: bool, final: bool) -> None:
    torch.manual_seed(0)
    inputs = random_inputs(2, 6, 2, 3, 1, 4, torch.float32)
    ids = torch.tensor([[0, 0, 1, 1, 1, -1]] * 2, dtype=torch.int32) if packed else None
    names = ("x", "dt", "A", "B", "C", "D")
    arguments = (*(inputs[name] for name in names), ids, inputs["initial_state"], final, False)
    torch.library.opcheck(torch.ops.recsys_ssm.ssd.default, arguments)


class Model(torch.nn.Module):
    """Combine a projection and the operator, as in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(6, 2 * 3 + 2 * 4 + 2)
        self.A_log = torch.nn.Parameter(torch.zeros(2))
        self.dt_bias = torch.nn.Parameter(torch.zeros(2))

    def forward(self, u: Tensor) -> Tensor:
        x, B, C, dt = self.project(u).split([6, 4, 4, 2], dim=-1)
        return ssd(
            x.unflatten(-1, (2, 3)), dt, -self.A_log.exp(), B.unflatten(-1, (1, 4)),
            C.unflatten(-1, (1, 4)), None, self.dt_bias, dt_softplus=True,
        )  # fmt: skip


def test_export() -> None:
    torch.manual_seed(0)
    model = Model()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(3, 9, 6),), dynamic_shapes={"u": {0: batch}})
    more = torch.randn(5, 9, 6)
    torch.testing.assert_close(program.module()(more), model(more))


def test_compile() -> None:
    torch.manual_seed(0)
    model, u = Model(), torch.randn(2, 9, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y, expected = compiled(u), model(u)
    torch.testing.assert_close(y, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), parameters),
        torch.autograd.grad(expected.sin().sum(), parameters),
    )


def test_autocast_keeps_the_recurrence_in_float32() -> None:
    torch.manual_seed(0)
    model, u = Model(), torch.randn(2, 9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(u)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(u), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 6, 4)}, r"x must be \(B, L, H, P\)"),
        ({"B": torch.zeros(2, 6, 3, 5)}, "not a multiple of 3 groups"),
        ({"B": torch.zeros(2, 6, 0, 5)}, "not a multiple of 0 groups"),
        ({"C": torch.zeros(2, 6, 2, 4)}, "C must have shape"),
        ({"dt": torch.zeros(2, 6, 3)}, "dt must have shape"),
        ({"A": torch.zeros(4, 2)}, "A must have shape"),
        ({"D": torch.zeros(3)}, "D must have shape"),
        ({"dt_bias": torch.zeros(3)}, "dt_bias must have shape"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.long)}, "seq_idx must have shape"),
        ({"seq_idx": torch.zeros(2, 6)}, "seq_idx must be an integer"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, "initial_state must have shape"),
        ({"dt": torch.zeros(2, 6, 4, dtype=torch.long)}, "dt must be floating point"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], words: str) -> None:
    arguments = {
        "x": torch.zeros(2, 6, 4, 3),
        "dt": torch.zeros(2, 6, 4),
        "A": torch.zeros(4),
        "B": torch.zeros(2, 6, 2, 5),
        "C": torch.zeros(2, 6, 2, 5),
        **changes,
    }
    with pytest.raises(UserError, match=words):
        ssd(**arguments)


@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 2, 1, 2), (2, 0, 2, 2, 1, 2), (2, 3, 2, 0, 1, 2), (2, 3, 2, 2, 1, 0)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_to_do(shape: tuple[int, ...], packed: bool) -> None:
    inputs = random_inputs(*shape, dtype=torch.float32)
    if packed:
        inputs["seq_idx"] = torch.zeros(shape[:2], dtype=torch.long)
    y, state = ssd(**inputs, return_final_state=True)
    assert y.shape == inputs["x"].shape and state.shape == inputs["initial_state"].shape
    (y.sum() + state.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = random_inputs(3, 18, 2, 4, 1, 6, dtype, state=False)
    y = ssd(**inputs)
    for name, dims in (("x", (2, 3)), ("B", (1, 3)), ("C", (0, 1)), ("dt", (0, 2))):
        turned = inputs[name].detach().transpose(*dims).contiguous().transpose(*dims)
        torch.testing.assert_close(ssd(**inputs | {name: turned}), y)
    # A gradient that is one number seen everywhere.
    (once,) = torch.autograd.grad(ssd(**inputs).sum(), inputs["x"])
    (again,) = torch.autograd.grad(ssd(**inputs), inputs["x"], torch.ones_like(y))
    torch.testing.assert_close(once, again)


@needs_kernel
def test_nan_and_infinity_stay_in_their_future() -> None:
    torch.manual_seed(0)
    inputs = random_inputs(1, 40, 2, 4, 1, 3, torch.float32)
    y = ssd(**inputs)
    for poison in (torch.nan, torch.inf):
        x = inputs["x"].detach().clone()
        x[0, 20] = poison
        torch.testing.assert_close(ssd(**inputs | {"x": x})[:, :20], y[:, :20])


@pytest.mark.parametrize("name", ["dt", "A", "D", "dt_bias", "initial_state"])
@pytest.mark.parametrize("packed", [False, True])
def test_one_float64_input_among_float32_ones(name: str, packed: bool) -> None:
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(2, 5, 4, 3), "dt": torch.rand(2, 5, 4), "A": -torch.rand(4),
        "B": torch.randn(2, 5, 2, 6), "C": torch.randn(2, 5, 2, 6), "D": torch.randn(4),
        "dt_bias": torch.randn(4), "initial_state": torch.randn(2, 4, 3, 6),
    }  # fmt: skip
    others = {"dt_softplus": True, "seq_idx": torch.tensor([[0, 0, 1, 1, -1]] * 2) * packed}
    mixed = inputs | {name: inputs[name].double()}
    y, state = ssd(**mixed, **others, return_final_state=True)
    assert (y.dtype, state.dtype) == (torch.float32, torch.float64)
    wanted = ssd_reference(**{name: x.double() for name, x in inputs.items()}, **others)
    torch.testing.assert_close(y.double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, wanted[1], rtol=1e-9, atol=1e-9)
