"""The contract, held by every backbone there is: a new file in the folder is tested without being named here."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

from recsys_ssm.models import backbones
from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.models.backbones.mamba import Mamba
from recsys_ssm.models.backbones.transformer import Transformer

for module in pkgutil.iter_modules(backbones.__path__):
    importlib.import_module(f"{backbones.__name__}.{module.name}")


def concrete(kind: type[Backbone]) -> list[type[Backbone]]:
    below = [each for child in kind.__subclasses__() for each in concrete(child)]
    named = not kind.__module__.endswith(".base") and kind.__module__.startswith("recsys_ssm.")
    return [kind, *below] if named else below


BACKBONES = concrete(Backbone)
CAUSAL = [kind for kind in BACKBONES if kind.causal]


def build(kind: type[Backbone], **options: object) -> Backbone:
    torch.manual_seed(0)
    return kind(d_model=32, **options).double().eval()


def test_all_are_found() -> None:
    assert {kind.__name__ for kind in BACKBONES} >= {"Mamba", "Transformer", "Identity"}


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 1), (2, 7), (1, 20)])
def test_shape_and_gradients(kind: type[Backbone], rows: int, length: int) -> None:
    backbone = build(kind)
    tokens = torch.randn(rows, length, 32, dtype=torch.float64, requires_grad=True)
    out = backbone(tokens)
    assert out.shape == tokens.shape
    out.sin().sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_backbone_does_not_look_ahead(kind: type[Backbone]) -> None:
    backbone = build(kind)
    tokens = torch.randn(2, 9, 32, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 5:] = torch.randn(2, 4, 32, dtype=torch.float64)
    torch.testing.assert_close(
        backbone(tokens)[:, :5], backbone(changed)[:, :5], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind", [kind for kind in BACKBONES if not kind.causal])
def test_a_bidirectional_backbone_looks_ahead(kind: type[Backbone]) -> None:
    backbone = build(kind)
    tokens = torch.randn(1, 6, 32, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 5] += 1
    assert (backbone(tokens)[:, 0] - backbone(changed)[:, 0]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", BACKBONES)
def test_packed_equals_padded_equals_one_at_a_time(kind: type[Backbone]) -> None:
    backbone = build(kind)
    a = torch.randn(1, 5, 32, dtype=torch.float64)
    b = torch.randn(1, 3, 32, dtype=torch.float64)
    alone_a, alone_b = backbone(a), backbone(b)
    junk = torch.full((1, 2, 32), 7.0, dtype=torch.float64)

    packed = backbone(torch.cat((a, b, junk), 1), torch.tensor([[0] * 5 + [1] * 3 + [-1] * 2]))
    torch.testing.assert_close(packed[:, :5], alone_a, rtol=0, atol=1e-10)
    torch.testing.assert_close(packed[:, 5:8], alone_b, rtol=0, atol=1e-10)

    padded = backbone(
        torch.cat((torch.cat((a, junk), 1), torch.cat((junk, junk, b), 1))),
        torch.tensor([[0] * 5 + [-1] * 2, [-1] * 4 + [0] * 3]),
    )
    torch.testing.assert_close(padded[:1, :5], alone_a, rtol=0, atol=1e-10)
    torch.testing.assert_close(padded[1:, 4:], alone_b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_row_of_padding_only_gives_no_nan(kind: type[Backbone]) -> None:
    backbone = build(kind)
    tokens = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)
    out = backbone(tokens, torch.tensor([[-1] * 4, [0] * 4]))
    out[1].sum().backward()
    assert out[1].isfinite().all() and tokens.grad is not None and tokens.grad.isfinite().all()


@pytest.mark.parametrize("kind", CAUSAL)
def test_step_equals_forward(kind: type[Backbone]) -> None:
    backbone = build(kind)
    tokens = torch.randn(3, 8, 32, dtype=torch.float64)
    state = backbone.init_state(3)
    outputs = []
    for t in range(8):
        out, state = backbone.step(tokens[:, t], state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), backbone(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("norm", "residual"), [("post", True), ("pre", True), ("none", False), ("pre", False)]
)
def test_arrangements_of_a_stack(norm: str, residual: bool) -> None:
    backbone = build(Mamba, n_layers=2, norm=norm, residual=residual)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = x
    for layer in backbone.layers:
        y = layer.mixer(layer.norm(expected) if norm == "pre" else expected)
        y = expected + y if residual else y
        expected = layer.norm(y) if norm == "post" else y
    if norm == "pre":
        expected = backbone.final_norm(expected)
    torch.testing.assert_close(backbone(x), expected, rtol=0, atol=1e-12)


def test_published_parameter_counts() -> None:
    assert sum(p.numel() for p in Mamba().parameters()) == 479_232
    assert sum(p.numel() for p in Transformer().parameters()) == 1_186_048


def test_layers_do_not_start_equal() -> None:
    first, second = (layer.linear1.weight for layer in Transformer(d_model=16).layers)
    assert not torch.equal(first, second)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="d_model=30 is no multiple of nhead=4"):
        Transformer(d_model=30, nhead=4)
    with pytest.raises(ValueError, match="norm='middle'"):
        Mamba(norm="middle")
