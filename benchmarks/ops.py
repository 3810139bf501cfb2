"""Measure the operators of recsys_ssm.ops beside their alternatives: time, memory, error, and the floor.

    python benchmarks/ops.py                        # everything, one and two threads
    python benchmarks/ops.py --only 'selective_scan (32' --threads 1 --json ops.json

"floor" is the least time that the machine needs, measured in the same run in processor time of one thread. "x floor" is
the time of forward and backward divided by it. The cases are in op_cases/, one module for each operator.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import op_cases
import torch
from timing import Floors, let_threads_sleep, machine, peak_memory, table, take_turns, write_json
from torch import Tensor

from recsys_ssm.ops import describe_backends
from recsys_ssm.ops._dispatch import Operator, kernel_library

Tensors = dict[str, Tensor]


def main() -> None:
    options = _options()
    floors = Floors()
    rows = []
    for case in _cases(options.only):
        torch.manual_seed(0)
        rows += _run(case, options, floors)
        print(f"\n{case.name}\n{table([r for r in rows if r['case'] == case.name])}", flush=True)
    facts = {
        "machine": machine(),
        "backends": describe_backends(),
        "exponentials_per_second": floors.exponentials,
        "exponentials_by": floors.source,
        "bytes_per_second": floors.bandwidth,
    }
    print(f"\n{facts}")
    if options.json:
        write_json(options.json, {**facts, "rows": rows})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--contenders", nargs="*", help="run these only, by name")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument(
        "--budget", type=float, default=10, help="approximate seconds for each contender"
    )
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    return parser.parse_args()


def _cases(only: str) -> list[op_cases.Case]:
    found = []
    for module in pkgutil.iter_modules(op_cases.__path__, "op_cases."):
        found += importlib.import_module(module.name).cases()
    return [case for case in found if only in case.name]


def _run(case: op_cases.Case, options: argparse.Namespace, floors: Floors) -> list[dict[str, Any]]:
    wanted = options.contenders
    contenders = [
        c for c in case.contenders if (c.name in wanted if wanted else not c.slow_to_start)
    ]
    inputs, gradient, size = {}, {}, 0.0
    for contender in contenders:
        tensors = case.tensors()
        size = sum(x.nbytes for x in tensors.values()) / 2**20
        if contender.prepare is not None:
            tensors = contender.prepare(tensors)
        inputs[contender.name] = {k: x.requires_grad_() for k, x in tensors.items()}
        gradient[contender.name] = torch.randn_like(_forward(contender, inputs[contender.name]))
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        calls: dict[str, Callable[[], Any]] = {"floor": floors.measure}
        for c in contenders:
            x, dy = inputs[c.name], gradient[c.name]
            calls[f"{c.name}/forward"] = _without_gradients(c, x)
            calls[f"{c.name}/both"] = lambda c=c, x=x, dy=dy: _both(c, x, dy)
        times = take_turns(calls, options.repetitions, options.budget)
        floor = case.floor(floors) if case.floor is not None else None
        for c in contenders:
            both, forward = times[f"{c.name}/both"], times[f"{c.name}/forward"]
            x, dy = inputs[c.name], gradient[c.name]
            rows.append({
                "case": case.name,
                "contender": c.name,
                "threads": threads,
                "forward ms": forward.wall,
                "forward+backward ms": both.wall,
                "CPU ms": both.cpu,
                "floor ms": floor and 1e3 * floor,
                "x floor": floor and both.wall / (1e3 * floor),
                "CPU x floor": floor and both.cpu / (1e3 * floor),
                "peak MiB": peak_memory(lambda c=c, x=x, dy=dy: _both(c, x, dy)),
                "inputs MiB": size,
                "error": _error(case, c, x, dy) if threads == options.threads[0] else None,
            })  # fmt: skip
    ours = {r["threads"]: r for r in rows if r["contender"] == contenders[0].name}
    for row in rows:
        fastest = ours[row["threads"]]
        row["x ours"] = row["forward+backward ms"] / fastest["forward+backward ms"]
        row["CPU x ours"] = row["CPU ms"] / fastest["CPU ms"]
    return rows


def _forward(contender: op_cases.Contender, x: Tensors) -> Tensor:
    _use(contender.environment)
    return contender.forward(**x)


def _without_gradients(contender: op_cases.Contender, x: Tensors) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return _forward(contender, x)

    return call


def _both(contender: op_cases.Contender, x: Tensors, dy: Tensor) -> tuple[Tensor, ...]:
    y = _forward(contender, x)
    return (y.detach(), *torch.autograd.grad(y, list(x.values()), dy))


_current: dict[str, str] = {}


def _use(environment: dict[str, str]) -> None:
    """Load the kernels that an environment selects, unless the last contender selected the same."""
    global _current  # noqa: PLW0603
    if environment == _current:
        return
    for name in _current:
        os.environ.pop(name, None)
    os.environ.update(environment)
    _current = environment
    kernel_library.cache_clear()
    for operator in Operator.registered.values():
        operator.forget()
        _ = operator.functions


def _error(
    case: op_cases.Case, contender: op_cases.Contender, x: Tensors, dy: Tensor
) -> float | None:
    """Return max|a - b| / max|b| against float64, the largest of the output and each gradient."""
    elements = max(t.numel() for t in x.values()) * (x["A"].shape[-1] if "A" in x else 1)
    if not contender.exact or contender.prepare is not None or elements > 5e7:
        return None
    wide = {k: t.detach().double().requires_grad_() for k, t in x.items()}
    y = case.reference(**wide)
    expected = (y.detach(), *torch.autograd.grad(y, list(wide.values()), dy.double()))
    found = _both(contender, x, dy)
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    )


if __name__ == "__main__":
    let_threads_sleep()
    main()
