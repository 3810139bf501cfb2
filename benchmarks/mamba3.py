"""Time one Mamba-3 block (forward and backward) beside a Mamba-2 block of the same sizes.

    python benchmarks/mamba3.py [--threads 1] [--mimo-rank 4] [--json FILE]

The blocks take turns on the same tokens. Figures are medians of wall time and of processor time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import let_threads_sleep, machine, table, take_turns, write_json
from torch import Tensor, nn

from recsys_ssm import ops
from recsys_ssm.models.backbones.mamba2 import Mamba2Block
from recsys_ssm.models.backbones.mamba3 import Mamba3Block

D_MODEL = 64
SIZES = ((64, 32), (128, 64))  # d_state, headdim
ROWS = ((256, 50), (64, 200))  # rows, tokens


def step_of(block: nn.Module, tokens: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Return a function that runs the block forward and backward once."""

    def step() -> None:
        torch.autograd.grad(block(tokens), [tokens, *block.parameters()], gradient)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--mimo-rank", type=int, help="also time MIMO of this rank")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same as JSON")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    print(ops.describe_backends())
    rows: list[dict[str, Any]] = []
    for d_state, headdim in SIZES:
        sizes: dict[str, Any] = {"d_model": D_MODEL, "d_state": d_state, "headdim": headdim}
        for batch, length in ROWS:
            torch.manual_seed(0)
            blocks: dict[str, nn.Module] = {
                "Mamba-2": Mamba2Block(**sizes),
                "Mamba-3": Mamba3Block(**sizes),
            }
            if options.mimo_rank:
                name = f"Mamba-3, MIMO {options.mimo_rank}"
                blocks[name] = Mamba3Block(**sizes, mimo_rank=options.mimo_rank)
            tokens = torch.randn(batch, length, D_MODEL, requires_grad=True)
            gradient = torch.randn_like(tokens)
            timings = take_turns(
                {name: step_of(block, tokens, gradient) for name, block in blocks.items()},
                options.repetitions,
                budget=60,
            )
            rows += [
                {
                    "d_state": d_state,
                    "headdim": headdim,
                    "rows x tokens": f"{batch} x {length}",
                    "block": name,
                    "parameters": sum(parameter.numel() for parameter in block.parameters()),
                    "wall ms": timings[name].wall,
                    "CPU ms": timings[name].cpu,
                    "CPU x Mamba-2": timings[name].cpu / timings["Mamba-2"].cpu,
                }
                for name, block in blocks.items()
            ]
    print(table(rows))
    if options.json:
        write_json(options.json, {"machine": machine(), "threads": options.threads, "rows": rows})


if __name__ == "__main__":
    let_threads_sleep()
    main()
