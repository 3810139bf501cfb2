"""Write outputs and gradients of the public Mamba, Mamba-2 and Hydra blocks to ``tests/fixtures/blocks.npz``.

The public code runs its own reference paths (plain PyTorch) in float64. The file holds only numbers: parameters,
inputs, outputs and gradients of a few small blocks. The script needs einops, a checkout of state-spaces/mamba and one
of goombalab/hydra. It does not need CUDA or Triton.

    pip install einops
    python scripts/make_block_fixtures.py path/to/mamba path/to/hydra
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import nn

OUTPUT = Path(__file__).parents[1] / "tests" / "fixtures" / "blocks.npz"

# Each case is one block: constructor arguments, (batch, length).
CASES: dict[str, list[tuple[dict[str, Any], tuple[int, int]]]] = {
    "mamba": [
        ({"d_model": 8, "d_state": 4}, (2, 9)),
        ({"d_model": 8, "d_state": 4, "d_conv": 16, "dt_rank": 3}, (2, 21)),
        ({"d_model": 6, "d_state": 5, "expand": 3, "d_conv": 2}, (3, 7)),
        ({"d_model": 8, "d_state": 4, "bias": True}, (1, 12)),
        ({"d_model": 8, "d_state": 4, "conv_bias": False}, (2, 5)),
        ({"d_model": 8, "d_state": 16, "expand": 1, "d_conv": 3}, (2, 1)),
    ],
    "mamba2": [
        ({"d_model": 8, "d_state": 4, "headdim": 4}, (2, 9)),
        ({"d_model": 8, "d_state": 6, "headdim": 2, "ngroups": 2}, (2, 7)),
        ({"d_model": 8, "d_state": 4, "headdim": 16}, (1, 40)),
        ({"d_model": 8, "d_state": 4, "headdim": 4, "norm_before_gate": True}, (2, 12)),
        (
            {"d_model": 6, "d_state": 5, "headdim": 3, "expand": 3, "bias": True, "d_conv": 3},
            (3, 11),
        ),
        ({"d_model": 8, "d_state": 4, "headdim": 1, "conv_bias": False, "d_conv": 2}, (2, 1)),
        ({"d_model": 8, "d_state": 3, "headdim": 2, "ngroups": 4, "expand": 1}, (2, 33)),
    ],
    "hydra": [
        ({"d_model": 8, "d_state": 4, "headdim": 4}, (2, 9)),
        ({"d_model": 8, "d_state": 6, "headdim": 2, "ngroups": 2}, (2, 7)),
        ({"d_model": 8, "d_state": 4, "headdim": 16, "d_conv": 5}, (1, 40)),
        (
            {"d_model": 6, "d_state": 5, "headdim": 3, "expand": 3, "bias": True, "d_conv": 3},
            (3, 11),
        ),
        ({"d_model": 8, "d_state": 4, "headdim": 1, "conv_bias": False, "d_conv": 5}, (2, 1)),
        (
            {"d_model": 8, "d_state": 3, "headdim": 2, "ngroups": 4, "expand": 1, "d_conv": 1},
            (2, 33),
        ),
    ],
}


def load_public_blocks(mamba: Path, hydra: Path) -> dict[str, type[nn.Module]]:
    """Load the public classes, with their CUDA and Triton operators replaced by the public references."""
    for name in (
        "triton",
        "triton.language",
        "selective_scan_cuda",
        "mamba_ssm.ops.triton.layer_norm",
    ):
        sys.modules[name] = MagicMock(__version__="3.0.0")
    # A module reads the block sizes of its autotuned kernels on import.
    triton = sys.modules["triton"]
    triton.Config = lambda sizes, **_: types.SimpleNamespace(kwargs=sizes)  # type: ignore[attr-defined]
    triton.autotune = lambda configs, **_: lambda _: types.SimpleNamespace(configs=configs)  # type: ignore[attr-defined]
    hub = types.ModuleType("huggingface_hub")
    hub.PyTorchModelHubMixin = type("PyTorchModelHubMixin", (), {})  # type: ignore[attr-defined]
    sys.modules["huggingface_hub"] = hub
    # Packages without their __init__, because that would import everything.
    for name, folder in (
        ("mamba_ssm", mamba / "mamba_ssm"),
        ("mamba_ssm.modules", mamba / "mamba_ssm" / "modules"),
        ("hydra", hydra / "hydra"),
        ("hydra.modules", hydra / "hydra" / "modules"),
    ):
        if not folder.is_dir():
            sys.exit(
                f"{folder}: no such folder; give the checkouts of state-spaces/mamba and goombalab/hydra"
            )
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package

    gated = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
    combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface")

    class RMSNormGated(nn.Module):
        """Parameters of the public module around the public reference."""

        def __init__(
            self,
            d: int,
            eps: float,
            norm_before_gate: bool,
            group_size: int | None = None,
            **_: Any,
        ) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(d))
            self.options = {
                "eps": eps,
                "norm_before_gate": norm_before_gate,
                "group_size": group_size,
            }

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return gated.rms_norm_ref(x, self.weight, None, z=z, **self.options)

    def ssd(
        x: torch.Tensor, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, **options: Any
    ) -> Any:
        kept = {key: options.get(key) for key in ("D", "z", "dt_bias")}
        softplus = options.get("dt_softplus", False)
        return combined.ssd_chunk_scan_combined_ref(
            x, dt, A, B, C, x.shape[1], dt_softplus=softplus, **kept
        )

    blocks: dict[str, type[nn.Module]] = {}
    for key, module, name in (
        ("mamba", "mamba_ssm.modules.mamba_simple", "Mamba"),
        ("mamba2", "mamba_ssm.modules.mamba2", "Mamba2"),
        ("hydra", "hydra.modules.hydra", "Hydra"),
    ):
        source = importlib.import_module(module)
        source.RMSNormGated = RMSNormGated  # type: ignore[attr-defined]
        source.mamba_chunk_scan_combined = ssd  # type: ignore[attr-defined]
        source.selective_scan_fn = scan.selective_scan_ref  # type: ignore[attr-defined]
        source.causal_conv1d_fn = None  # type: ignore[attr-defined]
        blocks[key] = getattr(source, name)
    return blocks


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Let ``.float()`` mean float64 in the block, since the references cast to float32 in places."""
    single = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.float = single  # type: ignore[method-assign]


def run(block: nn.Module, batch: int, length: int, d_model: int) -> dict[str, np.ndarray]:
    """Return parameters, an input, the output, and the gradients that a random gradient of the output gives."""
    block.double()
    with torch.no_grad():  # ones and zeros would hide mistakes
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    x = torch.randn(batch, length, d_model, dtype=torch.float64, requires_grad=True)
    with float64_throughout():
        y = block(x)
        dy = torch.randn_like(y)
        y.backward(dy)
    assert y.dtype == torch.float64 and x.grad is not None
    numbers = {"x": x, "y": y, "dy": dy, "dx": x.grad}
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        numbers[f"parameter/{name}"] = parameter
        numbers[f"gradient/{name}"] = parameter.grad
    return {name: tensor.detach().numpy() for name, tensor in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("mamba", type=Path, help="checkout of state-spaces/mamba")
    parser.add_argument("hydra", type=Path, help="checkout of goombalab/hydra")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args()

    blocks = load_public_blocks(options.mamba, options.hydra)
    torch.manual_seed(0)
    arrays: dict[str, np.ndarray] = {}
    cases: dict[str, dict[str, Any]] = {}
    for kind, listed in CASES.items():
        for i, (arguments, (batch, length)) in enumerate(listed):
            path = {"use_fast_path": False} if kind == "mamba" else {"use_mem_eff_path": False}
            block = blocks[kind](**arguments, **path)
            cases[f"{kind}-{i}"] = arguments
            for name, numbers in run(block, batch, length, arguments["d_model"]).items():
                arrays[f"{kind}-{i}/{name}"] = numbers
    arrays["cases"] = np.array(json.dumps(cases))

    options.output.parent.mkdir(parents=True, exist_ok=True)
    beside = options.output.with_name(f"{options.output.stem}.{os.getpid()}.tmp.npz")
    np.savez_compressed(beside, **arrays)
    beside.replace(options.output)
    print(f"{options.output}: {len(cases)} cases, {options.output.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
