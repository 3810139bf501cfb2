"""Test the contract of every backbone; a new file in the folder is found without being named here."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

from recsys_ssm.models import backbones
from recsys_ssm.models.backbones.base import Backbone
from recsys_ssm.models.backbones.filter_mamba2 import FilterMamba2
from recsys_ssm.models.backbones.hydra import Hydra
from recsys_ssm.models.backbones.ligr import Ligr
from recsys_ssm.models.backbones.mamba import Mamba
from recsys_ssm.models.backbones.mamba2 import Mamba2
from recsys_ssm.models.backbones.mamba3 import Mamba3
from recsys_ssm.models.backbones.matrrec import MaTrRec
from recsys_ssm.models.backbones.sigma import Sigma
from recsys_ssm.models.backbones.transformer import Transformer

for module in pkgutil.iter_modules(backbones.__path__):
    importlib.import_module(f"{backbones.__name__}.{module.name}")


def concrete(kind: type[Backbone]) -> list[type[Backbone]]:
    below = [each for child in kind.__subclasses__() for each in concrete(child)]
    named = not kind.__module__.endswith(".base") and kind.__module__.startswith("recsys_ssm.")
    return [kind, *below] if named else below


KINDS = concrete(Backbone)
# Each class with its defaults, and with options that change what a token sees.
OPTIONS: list[tuple[type[Backbone], dict[str, object]]] = [
    *((kind, {}) for kind in KINDS),
    (Transformer, {"causal": True}),
    (Transformer, {"causal": True, "norm_first": True, "activation": "gelu", "init": "normal"}),
    (Ligr, {"n_layers": 2, "nhead": 4}),
    (Mamba3, {"mimo_rank": 3, "headdim": 16, "ngroups": 2, "d_state": 8}),
    (MaTrRec, {"n_layers": 2, "nhead": 4}),
    (FilterMamba2, {"filter_length": 4, "adaptive": False, "norm": "pre"}),
    (Sigma, {"n_layers": 2, "norm": "pre"}),
    (Sigma, {"published": True, "mixing": "raw"}),
    *((kind, {"ffn": 2, "init": "normal"}) for kind in (Mamba, Mamba2, Mamba3, Hydra)),
    *(
        (
            kind,
            {
                "norm": "pre",
                "residual": True,
                "gated": True,
                "ffn": 2,
                "ffn_activation": "swiglu",
                "n_layers": 2,
            },
        )
        for kind in (Mamba, Mamba2, Mamba3, Hydra)
    ),
]


def build(kind: type[Backbone], **options: object) -> Backbone:
    torch.manual_seed(0)
    return kind(d_model=32, **options).double().eval()


CAUSAL = [(kind, options) for kind, options in OPTIONS if build(kind, **options).causal]
BIDIRECTIONAL = [each for each in OPTIONS if each not in CAUSAL]


def test_all_are_found() -> None:
    assert {kind.__name__ for kind in KINDS} >= {"Mamba", "Transformer", "Ligr", "Identity"}
    assert len(CAUSAL) >= 9
    assert len(BIDIRECTIONAL) >= 4


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 1), (2, 7), (1, 20)])
def test_shape_and_gradients(
    kind: type[Backbone], options: dict[str, object], rows: int, length: int
) -> None:
    backbone = build(kind, **options)
    tokens = torch.randn(rows, length, 32, dtype=torch.float64, requires_grad=True)
    out = backbone(tokens)
    assert out.shape == tokens.shape
    out.sin().sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("kind", "options"), CAUSAL)
def test_a_causal_backbone_does_not_look_ahead(
    kind: type[Backbone], options: dict[str, object]
) -> None:
    backbone = build(kind, **options)
    tokens = torch.randn(2, 9, 32, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 5:] = torch.randn(2, 4, 32, dtype=torch.float64)
    torch.testing.assert_close(
        backbone(tokens)[:, :5], backbone(changed)[:, :5], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("kind", "options"), CAUSAL)
def test_nor_within_packed_rows(kind: type[Backbone], options: dict[str, object]) -> None:
    """Change each token in turn: only its output and later ones of its own sequence may change."""
    backbone = build(kind, **options)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, -1, -1]])
    tokens = torch.randn(1, 10, 32, dtype=torch.float64)
    before = backbone(tokens, seq_idx)
    for t in range(10):
        changed = tokens.clone()
        changed[:, t] += torch.randn(32, dtype=torch.float64)
        moved = (backbone(changed, seq_idx) - before).abs().amax(-1)[0]
        allowed = (torch.arange(10) >= t) & (seq_idx[0] == seq_idx[0, t])
        assert moved[~allowed & (seq_idx[0] >= 0)].max() < 1e-12
        assert seq_idx[0, t] < 0 or moved[t] > 1e-6


@pytest.mark.parametrize(("kind", "options"), BIDIRECTIONAL)
def test_a_bidirectional_backbone_looks_ahead(
    kind: type[Backbone], options: dict[str, object]
) -> None:
    backbone = build(kind, **options)
    tokens = torch.randn(1, 6, 32, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 1:] += torch.randn(5, 32, dtype=torch.float64)
    assert (backbone(tokens)[:, 0] - backbone(changed)[:, 0]).abs().max() > 1e-6


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_packed_equals_padded_equals_one_at_a_time(
    kind: type[Backbone], options: dict[str, object]
) -> None:
    backbone = build(kind, **options)
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


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize("at", [[4], [11, 3, 8, 3], []])
def test_outputs_at_some_places_alone(
    kind: type[Backbone], options: dict[str, object], at: list[int]
) -> None:
    backbone = build(kind, **options)
    tokens = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 1, 1, 1, 1]])
    places = torch.tensor(at, dtype=torch.long)
    expected = backbone(tokens, seq_idx).flatten(0, 1)[places]
    (gradient,) = torch.autograd.grad(expected.sin().sum(), tokens)
    found = backbone(tokens, seq_idx, places)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), tokens)[0], gradient, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_a_row_of_padding_only_gives_no_nan(
    kind: type[Backbone], options: dict[str, object]
) -> None:
    backbone = build(kind, **options)
    tokens = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)
    out = backbone(tokens, torch.tensor([[-1] * 4, [0] * 4]))
    out[1].sum().backward()
    assert out[1].isfinite().all() and tokens.grad is not None and tokens.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "options"), CAUSAL)
def test_step_equals_forward(kind: type[Backbone], options: dict[str, object]) -> None:
    backbone = build(kind, **options)
    tokens = torch.randn(3, 8, 32, dtype=torch.float64)
    state = backbone.init_state(3)
    outputs = []
    for t in range(8):
        out, state = backbone.step(tokens[:, t], state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), backbone(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "options"), BIDIRECTIONAL)
def test_a_bidirectional_backbone_does_not_step(
    kind: type[Backbone], options: dict[str, object]
) -> None:
    backbone = build(kind, **options)
    with pytest.raises(NotImplementedError, match="sees the whole row"):
        backbone.init_state(1)
