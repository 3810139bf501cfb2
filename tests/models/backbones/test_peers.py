"""Test that layers equal those of RecBole (SASRec), RecTools (LiGR) and skrecsys (Mamba4Rec) in float64.

Outputs and gradients of the peers' own code come from scripts/make_layer_fixtures.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.models.backbones.ligr import Ligr
from recsys_ssm.models.backbones.mamba import Mamba
from recsys_ssm.models.backbones.transformer import Transformer

FIXTURES = Path(__file__).parents[2] / "fixtures"


def sasrec() -> Backbone:
    return Transformer(
        d_model=8,
        dim_feedforward=32,
        activation="gelu",
        causal=True,
        dropout=0.5,
        inner_dropout=0.0,
        norm_eps=1e-12,
    )


def mamba4rec(n_layers: int) -> Backbone:
    return Mamba(
        d_model=8,
        n_layers=n_layers,
        d_state=4,
        d_conv=4,
        ffn=4,
        norm_eps=1e-12,
        residual=n_layers > 1,
        dropout=0.2,
    )


# Patterns of a peer's names and our names for them, in order.
NAMES = {
    "recbole": {
        r"^layer\.": "layers.",
        "multi_head_attention.dense": "self_attn.out_proj",
        "multi_head_attention.LayerNorm": "norm1",
        "multi_head_attention.": "self_attn.in_proj.",
        "feed_forward.dense_": "linear",
        "feed_forward.LayerNorm": "norm2",
    },
    "rectools": {
        "transformer_blocks.": "layers.",
        "multi_head_attn": "mixer.attention",
        "layer_norm_1": "norm",
        "layer_norm_2": "ffn_norm",
        "feed_forward.ff_linear_": "ffn.linear",
        "gating_linear_1": "gate",
        "gating_linear_2": "ffn_gate",
    },
    "skrecsys": {
        r"^": "layers.",
        r"feedforward_out": "ffn.linear2",
        r"feedforward_norm": "ffn_norm",
        r"feedforward\.": "ffn.linear1.",
        r"conv_": "conv1d.",
        r"a_log": "A_log",
        r"mamba\.d$": "mamba.D",
        r"mamba": "mixer",
    },
}
CASES = [
    ("recbole", "sasrec", sasrec),
    ("rectools", "ligr", lambda: Ligr(d_model=8, n_layers=2, nhead=2)),
    ("skrecsys", "mamba4rec_1", lambda: mamba4rec(1)),
    ("skrecsys", "mamba4rec_2", lambda: mamba4rec(2)),
]


def ours(peer: str, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a peer's tensors by our names; three of theirs that are one of ours are concatenated."""
    found: dict[str, Tensor] = {}
    for name, tensor in numbers.items():
        for theirs, mine in NAMES[peer].items():
            name = re.sub(theirs, mine, name)
        if name.endswith("conv1d.weight"):
            tensor = tensor.unsqueeze(1)
        found[name] = tensor
    for query in [name for name in found if ".in_proj.query." in name]:
        parts = [found.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        found[query.replace(".query.", "_")] = torch.cat(parts)
    return found


@pytest.mark.parametrize(("peer", "case", "make"), CASES, ids=[case for _, case, _ in CASES])
def test_layers_equal_the_peers(peer: str, case: str, make: Callable[[], Backbone]) -> None:
    with np.load(FIXTURES / f"layers_{peer}.npz", allow_pickle=False) as archive:
        numbers = {
            name.removeprefix(f"{case}/"): torch.from_numpy(archive[name])
            for name in archive.files
            if name.startswith(f"{case}/")
        }

    def part(kind: str) -> dict[str, Tensor]:
        named = {n.removeprefix(kind): t for n, t in numbers.items() if n.startswith(kind)}
        return ours(peer, named)

    backbone = make().double().eval()
    backbone.load_state_dict(part("parameter/"), strict=True)
    x = numbers["x"].requires_grad_()
    y = backbone(x)
    y.backward(numbers["dy"])
    torch.testing.assert_close(y, numbers["y"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(x.grad, numbers["dx"], rtol=1e-9, atol=1e-9)
    gradients = part("gradient/")
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-9, msg=name)
