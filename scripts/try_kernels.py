"""Call every operator at random, and hold outputs and gradients against float64.

    python scripts/try_kernels.py [--calls 10000] [--seed 0]      # exit 1 if a call is wrong

A call has sizes from 0 on, tensors that are transposed, sliced or expanded, dtypes that differ between arguments,
packed sequences with padding, and initial states. Now and then one argument does not fit. A call must be equal to the
formula in float64 within the tolerance of its dtype, or end with one UserError that names the operator.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops import causal_conv1d, rank_products, same_conv1d, selective_scan, ssd
from recsys_ssm.ops.causal_conv1d import _final_state, _reference
from recsys_ssm.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from recsys_ssm.ops.dropout import dropout
from recsys_ssm.ops.selective_scan import selective_scan_reference
from recsys_ssm.ops.ssd import ssd_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest error, over the largest value or the root sum of squares of the terms, by the coarsest dtype of a call."""

Arguments = dict[str, Any]


@dataclass
class Case:
    """One call: the operator, its reference, its arguments, and the dtypes drawn."""

    name: str
    operator: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Arguments
    misfit: str = ""


class Draw:
    """Draw sizes, dtypes, strides and values."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtypes = self.random.choice(
            [
                [torch.float32],
                [torch.float32],
                [torch.bfloat16],
                [torch.float64],
                [torch.float16],
                [torch.float32, torch.bfloat16],
                [torch.float32, torch.float64],
                [torch.bfloat16, torch.float64],
                [torch.float32, torch.float16],
            ]
        )

    def size(self, most: int) -> int:
        """Return a size from 0 on; sizes about a register's or a block's are likely."""
        if self.random.random() < 0.06:
            return 0
        near = [n for n in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65) if n <= most]
        return self.random.choice([*near, self.random.randint(1, most)])

    def maybe(self, value: Callable[[], Tensor], share: float = 0.5) -> Tensor | None:
        return value() if self.random.random() < share else None

    def normal(self, *shape: int) -> Tensor:
        """Return normal numbers as a leaf tensor's view: dense, transposed, sliced, or expanded."""
        dtype = self.random.choice(self.dtypes)
        kind = self.random.choice(["dense", "dense", "transposed", "sliced", "expanded"])
        if kind == "transposed" and len(shape) > 1:
            i, j = self.random.sample(range(len(shape)), 2)
            swapped = list(shape)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            return self._values(swapped, dtype).transpose(i, j)
        if kind == "sliced":
            larger = [n * 2 + 1 for n in shape]
            return self._values(larger, dtype)[tuple(slice(1, 2 * n + 1, 2) for n in shape)]
        if kind == "expanded":
            at = self.random.randrange(len(shape))
            small = [1 if i == at else n for i, n in enumerate(shape)]
            return self._values(small, dtype).expand(*shape)
        return self._values(list(shape), dtype)

    def _values(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def rate(self, *shape: int) -> Tensor:
        """Return decay rates, negative."""
        x = self.normal(*shape)
        return -(x.float() * 0.5).exp().to(x.dtype)

    def sequences(self, batch: int, length: int) -> Tensor | None:
        if self.random.random() < 0.5:
            return None
        steps = torch.rand(batch, length, generator=self.generator)
        rows = (steps < 0.2).long().cumsum(1)
        rows = rows.masked_fill(torch.rand(batch, length, generator=self.generator) < 0.15, -1)
        dtype = self.random.choice([torch.int64, torch.int32, torch.int16])
        rows = rows.to(dtype)
        return rows.t().contiguous().t() if self.random.random() < 0.3 else rows


def convolution(draw: Draw) -> Case:
    batch, length, channels, width = draw.size(3), draw.size(33), draw.size(65), 1 + draw.size(6)
    centred = draw.random.random() < 0.4
    arguments: Arguments = {
        "x": draw.normal(batch, length, channels),
        "weight": draw.normal(channels, width),
        "bias": draw.maybe(lambda: draw.normal(channels)),
        "activation": draw.random.choice([None, "silu"]),
        "seq_idx": draw.sequences(batch, length),
    }
    if not centred:
        arguments["initial_state"] = draw.maybe(lambda: draw.normal(batch, channels, width - 1))
        arguments["return_final_state"] = draw.random.random() < 0.4

    def reference(
        x: Tensor, weight: Tensor, bias: Any, activation: Any, seq_idx: Any,
        initial_state: Any = None, return_final_state: bool = False,
    ) -> Any:  # fmt: skip
        width = weight.shape[1]
        ahead = (width - 1) // 2 if centred else 0
        y = _reference(x, weight, bias, activation, seq_idx, initial_state, ahead)
        return (y, _final_state(x, width, seq_idx, initial_state)) if return_final_state else y

    operator: Any = same_conv1d if centred else causal_conv1d
    return Case(operator.__name__, operator, reference, arguments)


def scan(draw: Draw) -> Case:
    batch, length, channels, states = draw.size(3), draw.size(65), draw.size(70), draw.size(17)
    wide, narrow = (batch, length, channels), (batch, length, states)
    arguments = {
        "u": draw.normal(*wide),
        "dt": draw.normal(*wide),
        "A": draw.rate(channels, states),
        "B": draw.normal(*narrow),
        "C": draw.normal(*narrow),
        "D": draw.maybe(lambda: draw.normal(channels)),
        "z": draw.maybe(lambda: draw.normal(*wide)),
        "dt_bias": draw.maybe(lambda: draw.normal(channels)),
        "seq_idx": draw.sequences(batch, length),
        "initial_state": draw.maybe(lambda: draw.normal(batch, channels, states)),
    }

    def operator(**given: Any) -> Any:
        return selective_scan(**given, dt_softplus=True, return_final_state=True)

    def reference(**given: Any) -> Any:
        return selective_scan_reference(**given, dt_softplus=True)

    return Case("selective_scan", operator, reference, arguments)


def duality(draw: Draw) -> Case:
    batch, length, groups = draw.size(3), draw.size(65), max(1, draw.size(3))
    heads, headdim, states = groups * draw.size(3), draw.size(17), draw.size(17)
    matrix = (batch, length, groups, states)
    arguments = {
        "x": draw.normal(batch, length, heads, headdim),
        "dt": draw.normal(batch, length, heads),
        "A": draw.rate(heads),
        "B": draw.normal(*matrix),
        "C": draw.normal(*matrix),
        "D": draw.maybe(lambda: draw.normal(heads)),
        "dt_bias": draw.maybe(lambda: draw.normal(heads)),
        "seq_idx": draw.sequences(batch, length),
        "initial_state": draw.maybe(lambda: draw.normal(batch, heads, headdim, states)),
    }

    def operator(**given: Any) -> Any:
        return ssd(**given, dt_softplus=True, return_final_state=True)

    def reference(**given: Any) -> Any:
        return ssd_reference(**given, dt_softplus=True)

    return Case("ssd", operator, reference, arguments)


def cross_entropy(draw: Draw) -> Case:
    positions, items, width = draw.size(33), max(1, draw.size(65)), draw.size(17)
    target = torch.randint(items, (positions,), generator=draw.generator)
    arguments = {
        "x": draw.normal(positions, width),
        "weight": draw.normal(items, width),
        "target": target.repeat_interleave(2)[::2] if draw.random.random() < 0.3 else target,
    }
    chunk = draw.random.choice([None, 1, 5])

    def operator(**given: Any) -> Any:
        return linear_cross_entropy(**given, chunk=chunk)

    return Case("linear_cross_entropy", operator, linear_cross_entropy_reference, arguments)


def ranking(draw: Draw) -> Case:
    users, items, width, k = draw.size(33), draw.size(65), draw.size(17), 1 + draw.size(20)
    # Products of small integers are exact, so ties are ties.
    drawn = (draw.normal(users, width), draw.normal(items, width))
    query, catalogue = (x.float().round().clamp(-3, 3).to(x.dtype) for x in drawn)
    arguments: Arguments = {"query": query, "items": catalogue}
    pairs = None
    if users and items and draw.random.random() < 0.6:
        count = draw.size(65)
        pairs = tuple(torch.randint(n, (count,), generator=draw.generator) for n in (users, items))

    def operator(query: Tensor, items: Tensor) -> Any:
        return rank_products(query, items, k, pairs)

    def reference(query: Tensor, items: Tensor) -> Any:
        scores = query @ items.T
        excluded = torch.zeros(scores.shape, dtype=torch.bool)
        if pairs is not None:
            excluded[pairs] = True
        return tuple(
            _sorted_items(scores, left, k) for left in (~torch.zeros_like(excluded), ~excluded)
        )

    return Case("rank_products", operator, reference, arguments)


def _sorted_items(scores: Tensor, left: Tensor, k: int) -> Tensor:
    """Rank by the formula: the largest score first, then the lowest index, among the items that are left."""
    key = scores.masked_fill(~left, -math.inf)
    order = key.argsort(dim=1, descending=True, stable=True)[:, :k]
    order = order.masked_fill(~left.gather(1, order), -1)
    return F.pad(order, (0, k - order.shape[1]), value=-1)


def dropping(draw: Draw) -> Case:
    shape = [draw.size(9) for _ in range(draw.random.randint(1, 3))]
    share = draw.random.choice([0.0, 0.25, 0.5, 1.0])
    arguments = {"x": draw.normal(*shape)}
    seed = draw.random.randrange(1000)

    def operator(x: Tensor) -> Tensor:
        torch.manual_seed(seed)
        y = dropout(x, share)
        kept = (y != 0).to(x.dtype)
        assert share or torch.equal(y, x)
        return torch.where(kept != 0, y * (1 - share) - x, 0 * y)

    def reference(x: Tensor) -> Tensor:
        return x * 0

    return Case("dropout", operator, reference, arguments)


CASES = (convolution, scan, duality, cross_entropy, ranking, dropping)


def spoil(case: Case, draw: Draw) -> None:
    """Make one argument unfit: another shape, or not floating point."""
    names = [
        name
        for name, x in case.arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point() and case.name != "dropout"
    ]
    if not names or draw.random.random() > 0.1:
        return
    name = draw.random.choice(names)
    before = x = case.arguments[name]
    how = draw.random.choice(["longer", "flat", "more", "complex"])
    if how == "longer":
        x = F.pad(x, (0, 1))
    elif how == "flat":
        x = x.flatten()
    elif how == "more":
        x = x.unsqueeze(0)
    else:
        x = x.to(torch.complex64)
    free = {"causal_conv1d": "weight", "same_conv1d": "weight", "ssd": "x"}.get(case.name)
    any_width = name == free and case.arguments.get("initial_state") is None
    if (x.shape, x.dtype) != (before.shape, before.dtype) and not (how == "longer" and any_width):
        case.arguments[name], case.misfit = x, name


def run(
    function: Callable[..., Any], arguments: Arguments, exact: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return outputs, and the gradients of a weighted sum of them."""
    given = dict(arguments)
    leaves: dict[str, Tensor] = {}
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.detach().double() if exact else x.detach()
            leaves[name] = given[name] = x.requires_grad_()
    found = function(**given)
    outputs = list(found) if isinstance(found, tuple) else [found]
    sums = [
        (
            y.double()
            * torch.linspace(-1, 1, max(y.numel(), 1), dtype=torch.float64)[: y.numel()].view(
                y.shape
            )
        ).sum()
        for y in outputs
        if y.is_floating_point()
    ]
    if not sums or not sum(sums).requires_grad:  # type: ignore[union-attr]
        return outputs, {}
    gradients = torch.autograd.grad(sum(sums), list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
    return outputs, {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(leaves.items(), gradients, strict=True)
    }


def difference(case: Case) -> str:
    """Describe how a call differs from float64; empty if it does not."""
    dtypes = [
        x.dtype for x in case.arguments.values() if isinstance(x, Tensor) and x.is_floating_point()
    ]
    bound = max(TOLERANCE[dtype] for dtype in dtypes)
    outputs, gradients = run(case.operator, case.arguments, False)
    wanted, wanted_gradients = run(case.reference, case.arguments, True)
    named = {f"output {i}": pair for i, pair in enumerate(zip(outputs, wanted, strict=True))}
    for name, gradient in wanted_gradients.items():
        named[f"d{name}"] = gradients[name], gradient
    scale = max(
        [1.0, *(float(x.abs().max()) for x in wanted if x.is_floating_point() and x.numel())]
    )
    for name, (value, exact) in named.items():
        if value.shape != exact.shape:
            return f"{name} is {tuple(value.shape)}, not {tuple(exact.shape)}"
        if not exact.is_floating_point():
            if not torch.equal(value, exact):
                return f"{name} differs"
            continue
        if not exact.numel():
            continue
        # Sums over positions cancel, so their error is measured by the number of terms too.
        terms = (
            math.sqrt(max(1, max(x.numel() for x in outputs) / exact.numel()))
            if name[0] == "d"
            else 1
        )
        size = max(float(exact.abs().max()), scale if name[0] == "o" else terms)
        error = float((value.double() - exact).abs().max()) / size
        if not error <= bound:
            return f"{name} differs by {error:.1e} (bound {bound:.0e})"
    return ""


def try_one(seed: int) -> tuple[str, str, str]:
    """Make and judge one call.

    Returns:
        The operator, ``equal``, ``refused`` or ``wrong``, and what is wrong.
    """
    draw = Draw(seed)
    case = draw.random.choice(CASES)(draw)
    spoil(case, draw)
    try:
        if case.misfit:
            run(case.operator, case.arguments, False)
            return case.name, "wrong", f"takes {case.misfit} of {case.arguments[case.misfit].shape}"
        found = difference(case)
        return case.name, "wrong" if found else "equal", found
    except UserError as error:
        line = str(error)
        fine = "\n" not in line and len(line) <= 400
        empty = case.name == "rank_products" and not len(case.arguments["items"])
        if fine and (case.misfit or empty):
            return case.name, "refused", line
        return case.name, "wrong", f"refused: {line}"
    except Exception as error:
        return case.name, "wrong", f"{type(error).__name__}: {str(error).splitlines()[0]:.200}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    counts: Counter[tuple[str, str]] = Counter()
    for seed in range(options.seed, options.seed + options.calls):
        name, verdict, why = try_one(seed)
        counts[name, verdict] += 1
        if verdict == "wrong":
            print(f"seed {seed}: {name}: {why}", flush=True)
    names = sorted({name for name, _ in counts})
    print(f"\n{'operator':24}{'equal':>8}{'refused':>9}{'wrong':>7}")
    for name in names:
        print(
            f"{name:24}{counts[name, 'equal']:8}{counts[name, 'refused']:9}{counts[name, 'wrong']:7}"
        )
    wrong = sum(n for (_, verdict), n in counts.items() if verdict == "wrong")
    print(f"{options.calls} calls, {wrong} wrong, {time.perf_counter() - start:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
