"""Test the layers of a stack against the papers' code, written out plainly; their sizes and initialisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.models.backbones.hydra import Hydra
from recsys_ssm.models.backbones.ligr import Ligr
from recsys_ssm.models.backbones.mamba import Mamba
from recsys_ssm.models.backbones.mamba2 import Mamba2
from recsys_ssm.models.backbones.transformer import Transformer
from recsys_ssm.ops.dropout import dropout

MAMBA4REC = {
    "d_model": 64,
    "n_layers": 1,
    "d_state": 32,
    "d_conv": 4,
    "ffn": 4,
    "norm_eps": 1e-12,
    "init": "normal",
}
MAMBA2_4REC = {**MAMBA4REC, "d_state": 128, "headdim": 4}
HYDRA4REC = {**MAMBA4REC, "headdim": 64}
SASREC = {
    "d_model": 64,
    "dim_feedforward": 256,
    "activation": "gelu",
    "inner_dropout": 0.0,
    "norm_eps": 1e-12,
    "causal": True,
    "init": "normal",
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (Mamba, {}, 479_232),
        (Transformer, {}, 1_186_048),
        # Without the LayerNorm of the item embeddings, 2·64.
        (Mamba, MAMBA4REC, 72_256 - 128),
        (Mamba2, MAMBA2_4REC, 78_624 - 128),
        (Hydra, HYDRA4REC, 68_166 - 128),
        (Transformer, SASREC, 100_096 - 128),
        # Attention with its bias, two gates, three matrices of 64·256, two LayerNorms.
        (Ligr, {}, 4 * (64 * 64 + 64) + 2 * (64 * 64 + 64) + 3 * 64 * 256 + 2 * 128),
    ],
)
def test_published_parameter_counts(
    kind: type[Backbone], options: dict[str, object], expected: int
) -> None:
    assert count(kind(**options)) == expected


def test_a_layer_without_a_network_has_the_names_it_always_had() -> None:
    parts = {name.split(".")[2] for name in Mamba(d_model=16, n_layers=1).state_dict()}
    assert parts == {"mixer", "norm"}


@pytest.mark.parametrize(
    ("norm", "residual"), [("post", True), ("pre", True), ("none", False), ("pre", False)]
)
def test_layers_of_a_mixer_alone(norm: str, residual: bool) -> None:
    backbone = Mamba(d_model=32, n_layers=2, norm=norm, residual=residual).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = x
    for layer in backbone.layers:
        y = layer.mixer(layer.norm(expected) if norm == "pre" else expected)
        y = expected + y if residual else y
        expected = layer.norm(y) if norm == "post" else y
    if norm == "pre":
        expected = backbone.final_norm(expected)
    torch.testing.assert_close(backbone(x), expected, rtol=0, atol=1e-12)


def scrambled(backbone: Backbone) -> Backbone:
    """Draw all parameters anew, since biases and norms of 0 and 1 would hide mistakes."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if parameter.dim() == 1 and "mixer" not in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    return backbone.double()


def network(layer: nn.Module, x: Tensor, p: float) -> Tensor:
    inner = dropout(F.gelu(F.linear(x, layer.ffn.linear1.weight, layer.ffn.linear1.bias)), p)
    return dropout(F.linear(inner, layer.ffn.linear2.weight, layer.ffn.linear2.bias), p)


def norm(norm: nn.LayerNorm, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_mamba4rec_layer(n_layers: int) -> None:
    """Compare in training mode: dropout draws the same numbers in the same places."""
    torch.manual_seed(0)
    options = {**MAMBA4REC, "n_layers": n_layers, "dropout": 0.2, "residual": n_layers > 1}
    backbone = scrambled(Mamba(**options))
    x = torch.randn(3, 7, 64, dtype=torch.float64)
    torch.manual_seed(1)
    found = backbone(x)
    torch.manual_seed(1)
    for layer in backbone.layers:
        y = dropout(layer.mixer(x), 0.2)
        y = norm(layer.norm, y if n_layers == 1 else y + x, 1e-12)
        x = norm(layer.ffn_norm, network(layer, y, 0.2) + y, 1e-12)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_pre_norm_layer() -> None:
    torch.manual_seed(0)
    backbone = scrambled(
        Mamba2(d_model=32, headdim=8, n_layers=2, norm="pre", residual=True, ffn=2, dropout=0.5)
    )
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    torch.manual_seed(1)
    found = backbone(x)
    torch.manual_seed(1)
    for layer in backbone.layers:
        x = x + dropout(layer.mixer(norm(layer.norm, x, 1e-5)), 0.5)
        x = x + network(layer, norm(layer.ffn_norm, x, 1e-5), 0.5)
    torch.testing.assert_close(found, norm(backbone.final_norm, x, 1e-5), rtol=0, atol=1e-12)


def test_weights_are_drawn_as_in_recbole() -> None:
    """Linear layers within Mamba are drawn too; other parameters keep the initialisation of their authors."""
    torch.manual_seed(0)
    (layer,) = Mamba(**MAMBA4REC).layers
    mamba = layer.mixer
    linears = [mamba.in_proj, mamba.x_proj, mamba.dt_proj, mamba.out_proj, layer.ffn.linear1]
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not mamba.dt_proj.bias.any() and not layer.ffn.linear1.bias.any()
    torch.testing.assert_close(mamba.A_log.exp()[5], torch.arange(1.0, 33.0))
    assert mamba.conv1d.weight.std().item() > 0.1

    attention = Transformer(**SASREC).layers[1].self_attn
    assert attention.in_proj_weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert attention.out_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_weights_are_drawn_as_in_rectools() -> None:
    torch.manual_seed(0)
    (layer,) = Ligr().layers
    for weight in (
        layer.mixer.attention.in_proj_weight,
        layer.mixer.attention.out_proj.weight,
        layer.ffn.linear1.weight,
        layer.ffn.linear3.weight,
        layer.gate.weight,
    ):
        assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.1)


def test_wrong_arguments() -> None:
    for options, message in [
        ({"norm": "middle"}, "norm='middle'"),
        ({"ffn": -1}, "ffn=-1"),
        ({"ffn_activation": "elu"}, "ffn_activation='elu'"),
        ({"init": "zeros"}, "init='zeros'"),
        ({"gated": True}, "needs residual=true"),
        ({"n_layers": 0}, "n_layers=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mamba(**{"d_model": 16, "n_layers": 1, **options})
    for kind in (Transformer, Ligr):
        with pytest.raises(ValueError, match="d_model=30 is not a multiple of nhead=4"):
            kind(d_model=30, nhead=4)
        with pytest.raises(ValueError, match="n_layers=0"):
            kind(n_layers=0)
