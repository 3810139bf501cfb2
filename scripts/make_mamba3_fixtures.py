"""Write outputs and gradients of the public Mamba-3 block to ``tests/fixtures/mamba3.npz``.

The public module runs here with the plain PyTorch references of the public tests in place of its CUDA kernels, all in
float64. The file holds only numbers: parameters, inputs, outputs and gradients of a few small blocks. The script needs
einops and a checkout of state-spaces/mamba. It does not need CUDA or Triton.

    pip install einops
    python scripts/make_mamba3_fixtures.py path/to/mamba
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
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
import torch.nn.functional as F
from make_block_fixtures import run
from torch import Tensor, nn

OUTPUT = Path(__file__).parents[1] / "tests" / "fixtures" / "mamba3.npz"

# Each case is one block: constructor arguments, (batch, length).
CASES: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({"d_model": 8, "d_state": 8, "headdim": 4}, (2, 9)),
    ({"d_model": 8, "d_state": 6, "headdim": 2, "ngroups": 2}, (2, 7)),
    ({"d_model": 8, "d_state": 4, "headdim": 16, "rope_fraction": 1.0}, (1, 40)),
    ({"d_model": 6, "d_state": 10, "headdim": 3, "expand": 3, "is_outproj_norm": True}, (3, 11)),
    ({"d_model": 8, "d_state": 4, "headdim": 1, "A_floor": 1.5}, (2, 1)),
    ({"d_model": 8, "d_state": 8, "headdim": 4, "is_mimo": True, "mimo_rank": 4}, (2, 13)),
    (
        {"d_model": 8, "d_state": 4, "headdim": 2, "ngroups": 2, "rope_fraction": 1.0}
        | {"is_mimo": True, "mimo_rank": 2, "chunk_size": 4},
        (2, 21),
    ),
    ({"d_model": 6, "d_state": 12, "headdim": 4} | {"is_mimo": True, "mimo_rank": 3, "chunk_size": 8}, (1, 24)),
    (
        {"d_model": 8, "d_state": 8, "headdim": 8, "is_outproj_norm": True}
        | {"is_mimo": True, "mimo_rank": 2, "chunk_size": 4},
        (2, 10),
    ),
    (
        {"d_model": 8, "d_state": 4, "headdim": 8, "is_outproj_norm": True, "fuse_pregate_headwise_norm": False}
        | {"is_mimo": True, "mimo_rank": 1, "chunk_size": 16},
        (2, 5),
    ),
]  # fmt: skip


def load_public_block(mamba: Path) -> type[nn.Module]:
    """Load the public class, with its kernels replaced by the references of the public tests."""
    if not (mamba / "mamba_ssm" / "modules" / "mamba3.py").is_file():
        sys.exit(
            f"{mamba}: no mamba_ssm/modules/mamba3.py there; give a checkout of state-spaces/mamba"
        )
    for name in ("triton", "triton.language"):
        sys.modules[name] = MagicMock(__version__="3.0.0")
    # Packages without their __init__, because that would import everything.
    for name in ("mamba_ssm", "mamba_ssm.modules", "mamba_ssm.ops"):
        package = types.ModuleType(name)
        package.__path__ = [str(mamba.joinpath(*name.split(".")))]
        sys.modules[name] = package
    gated = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated")
    stubs = {
        "triton.mamba3.mamba3_siso_combined": "mamba3_siso_combined",
        "triton.mamba3.mamba3_siso_step": "mamba3_siso_step",
        "tilelang.mamba3.mamba3_mimo": "mamba3_mimo",
        "triton.mamba3.mamba3_mimo_rotary_step": "apply_rotary_qk_inference_fwd",
        "cute.mamba3.mamba3_step_fn": "mamba3_step_fn",
    }
    for name, function in stubs.items():
        module = types.ModuleType(f"mamba_ssm.ops.{name}")
        setattr(module, function, None)
        parent = module.__name__.rpartition(".")[0]
        for above in (parent.rpartition(".")[0], parent):
            sys.modules.setdefault(above, types.ModuleType(above))
        sys.modules[module.__name__] = module
    siso = _module(mamba / "tests" / "ops" / "triton" / "test_mamba3_siso.py")
    mimo = _module(mamba / "tests" / "ops" / "tilelang" / "test_mamba3_mimo.py")

    class RMSNormGated(nn.Module):
        """Parameters of the public module around the public reference."""

        def __init__(self, d: int, eps: float, **options: Any) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(d)), eps
            self.options = {key: options.get(key) for key in ("norm_before_gate", "group_size")}

        def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
            return gated.rms_norm_ref(x, self.weight, None, z=z, eps=self.eps, **self.options)

    def run_siso(**given: Any) -> Tensor:
        names = ("Q", "K", "V", "ADT", "DT", "Trap", "Q_bias", "K_bias", "Angles", "D", "Z")
        return siso.mamba3_siso_fwd_ref(*(given[name] for name in names), dtype=torch.float64)[0]

    def run_mimo(**given: Any) -> Tensor:
        size = given["chunk_size"]
        log_decay = given["ADT"]
        length = log_decay.shape[-1]
        chunks = F.pad(log_decay, (0, -length % size)).unflatten(-1, (-1, size))
        sums = chunks.cumsum(-1)
        until, after = ((t.flatten(-2)[..., :length]) for t in (sums, sums[..., -1:] - sums))
        return mimo.mamba3_MIMO_chunk_ref(
            *(given[name] for name in ("Q", "K", "V", "Q_bias", "K_bias", "MIMO_V", "MIMO_Out", "Z")),
            given["MIMO_Z"] if given["Z"] is not None else None,
            mimo.apply_angle_dt_reference(given["Angles"], given["DT"].transpose(1, 2)),
            until,
            after,
            given["DT"],
            given["Trap"],
            given["D"],
            chunk_size=size,
            rotary_dim_divisor=given["rotary_dim_divisor"],
            dtype=torch.float64,
            contract_mimo_out=given["MIMO_Out"] is not None,
            fused_norm=given["fuse_pregate_headwise_rms_norm"],
            outproj_norm_weight=given["outproj_norm_weight"],
            outproj_norm_eps=given["outproj_norm_eps"],
        )[0]  # fmt: skip

    source = importlib.import_module("mamba_ssm.modules.mamba3")
    source.RMSNormGated = RMSNormGated  # type: ignore[attr-defined]
    source.mamba3_siso_combined = run_siso  # type: ignore[attr-defined]
    source.mamba3_mimo_combined = run_mimo  # type: ignore[attr-defined]
    return source.Mamba3


def _module(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def casts_to_float64() -> Iterator[None]:
    """Let ``.to(torch.float32)`` mean float64 in the block."""
    cast = torch.Tensor.to

    def to(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        wide = (torch.float64 if each is torch.float32 else each for each in arguments)
        return cast(x, *wide, **options)

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.to = cast  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("mamba", type=Path, help="checkout of state-spaces/mamba")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args()

    block_class = load_public_block(options.mamba)
    torch.manual_seed(0)
    arrays: dict[str, np.ndarray] = {}
    for i, (arguments, (batch, length)) in enumerate(CASES):
        block = block_class(**arguments)
        with torch.no_grad():  # the small steps that it begins with would hide mistakes
            block.dt_bias += 3
        with casts_to_float64():
            numbers = run(block, batch, length, arguments["d_model"])
        arrays.update({f"{i}/{name}": each for name, each in numbers.items()})
    arrays["cases"] = np.array(json.dumps([arguments for arguments, _ in CASES]))

    options.output.parent.mkdir(parents=True, exist_ok=True)
    beside = options.output.with_name(f"{options.output.stem}.{os.getpid()}.tmp.npz")
    np.savez_compressed(beside, **arrays)
    beside.replace(options.output)
    print(f"{options.output}: {len(CASES)} cases, {options.output.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
