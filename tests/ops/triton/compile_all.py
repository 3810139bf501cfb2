"""Compile every Triton kernel for a GPU, on a machine without one.

    python tests/ops/triton/compile_all.py [--arch 90] [--report] [--quick]

Calls the operators on CPU tensors with the launch replaced: each launch is compiled, for the arguments that it has, to
PTX and by ptxas to machine code. With ``--report``, print registers, spilled bytes and instructions of each.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from recsys_ssm.ops.triton import causal_conv1d, selective_scan  # noqa: F401

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
         torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8"}  # fmt: skip
INSTRUCTIONS = ("MUFU", "SHFL", "LDG", "STG", "BAR", "HMMA", "LDL", "STL", "FFMA")
OPTIONS = ("num_warps", "num_stages")


class Compiled:
    """Kernels that were launched, each with its machine code."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.found: dict[Any, Any] = {}

    def launch(self, fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        given = {**dict(zip(fn.arg_names, args, strict=False)), **kwargs}
        fixed = {p.name for p in fn.params if p.is_constexpr}
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(fn.arg_names):
            value = given[name]
            if name in fixed or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{TYPES[value.dtype]}"
                if value.data_ptr() % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if value and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        key = (fn.fn.__module__, fn.fn.__name__, tuple(signature.items()), tuple(constants.items()))
        if key in self.found:
            return
        source = ASTSource(fn, signature, constants, attributes)
        target = GPUTarget("cuda", self.arch, 32)
        self.found[key] = triton.compile(source, target=target, options=options)


def calls(quick: bool) -> None:
    """Call every operator with and without its options, in both precisions."""
    ops = torch.ops.recsys_ssm
    B, L, E, N = 4, 50, 128, 16
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):

        def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype)

        seq = torch.zeros(B, L, dtype=torch.int64)
        for width, ahead in ((4, 0),) if quick else ((4, 0), (4, 1), (16, 0)):
            x = new(B, L, E)
            for packed, state in ((None, None), (seq, None if ahead else new(B, E, width - 1))):
                inputs = (x, new(E, width), new(E), packed, state, True, ahead)
                ops.triton_causal_conv1d(*inputs)
                ops.triton_causal_conv1d_backward(x, *inputs)
        for full, states in ((True, N),) if quick else ((False, N), (True, N), (True, 2 * N)):
            u, short = new(B, L, E), new(B, L, states)
            wide = torch.float32
            inputs = (
                u, u, new(E, states, dtype=wide), short, short,
                new(E, dtype=wide), u if full else None, new(E, dtype=wide), True,
                seq if full else None, new(B, E, states, dtype=wide) if full else None,
            )  # fmt: skip
            *_, kept = ops.triton_selective_scan(*inputs, full, True)
            final = new(B, E, states, dtype=wide) if full else None
            ops.triton_selective_scan_backward(u, final, *inputs, kept)


def run(arch: int, quick: bool) -> Compiled:
    compiled = Compiled(arch)
    JITFunction.run = lambda fn, *args, **kwargs: compiled.launch(fn, *args, **kwargs)
    calls(quick)
    return compiled


def report(compiled: Compiled) -> Iterator[str]:
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for (module, name, signature, _), kernel in compiled.found.items():
        pointers = sorted({kind for _, kind in signature if kind.startswith("*")})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            usage = subprocess.run([nvidia / "cuobjdump", "-res-usage", file.name],
                                   capture_output=True, text=True, check=True).stdout  # fmt: skip
            sass = subprocess.run([nvidia / "cuobjdump", "-sass", file.name],
                                  capture_output=True, text=True, check=True).stdout  # fmt: skip
        counts = Counter(
            re.findall(r"^\s+/\*\w{4,6}\*/\s+(?:@!?U?P\w+ )?(\w+)", sass, re.MULTILINE)
        )
        most = ", ".join(f"{counts[key]} {key}" for key in INSTRUCTIONS)
        used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        assert used is not None
        kind = f"{module.rpartition('.')[2]}.{name} {'/'.join(pointers)}"
        yield (
            f"{kind}: {used[1]} registers, {used[2]} bytes of stack, {used[3]} shared, "
            f"{sum(counts.values())} instructions, {most}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one call of each operator")
    chosen = parser.parse_args()
    done = run(chosen.arch, chosen.quick)
    atomics = [
        key[1] for key, k in done.found.items() if re.search(r"\b(atom|red)\.", k.asm["ptx"])
    ]
    for line in report(done) if chosen.report else ():
        print(line)
    print(f"{len(done.found)} kernels for sm_{chosen.arch}, {len(atomics)} with atomics {atomics}")
