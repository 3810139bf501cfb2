"""Test that outputs and gradients of the blocks equal those of the public implementations in float64.

The numbers come from the public code's own reference paths, by scripts/make_block_fixtures.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys_ssm.models.backbones.base import Mixer
from recsys_ssm.models.backbones.hydra import HydraBlock
from recsys_ssm.models.backbones.mamba import MambaBlock
from recsys_ssm.models.backbones.mamba2 import Mamba2Block

BLOCKS: dict[str, type[Mixer]] = {"mamba": MambaBlock, "mamba2": Mamba2Block, "hydra": HydraBlock}
with np.load(Path(__file__).parents[1] / "fixtures" / "blocks.npz", allow_pickle=False) as archive:
    NUMBERS = {name: archive[name] for name in archive.files}
CASES = json.loads(str(NUMBERS.pop("cases")))


@pytest.mark.parametrize("kind", BLOCKS)
def test_there_are_five_cases_of_each(kind: str) -> None:
    assert sum(case.startswith(f"{kind}-") for case in CASES) >= 5


@pytest.mark.parametrize("case", CASES)
def test_block_equals_the_public_one(case: str) -> None:
    kind, _ = case.split("-")
    block = BLOCKS[kind](**CASES[case]).double()
    expected = {
        name.removeprefix(f"{case}/"): torch.from_numpy(numbers)
        for name, numbers in NUMBERS.items()
        if name.startswith(f"{case}/")
    }
    parameters = {
        name.removeprefix("parameter/"): tensor
        for name, tensor in expected.items()
        if name.startswith("parameter/")
    }
    # Strict: the same names and shapes, so public checkpoints load.
    block.load_state_dict(parameters, strict=True)

    x = expected["x"].requires_grad_()
    y = block(x)
    y.backward(expected["dy"])
    torch.testing.assert_close(y, expected["y"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(x.grad, expected["dx"], rtol=1e-9, atol=1e-11)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[f"gradient/{name}"], rtol=1e-9, atol=1e-11, msg=name
        )
