"""Test WEARec against its equations with PyTorch's Fourier transform, its size and its training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.models.backbones.wearec import WEARec, WEARecLayer, fourier
from recsys_ssm.models.next_item import NextItem


def model(max_length: int, **options: object) -> WEARec:
    torch.manual_seed(0)
    sizes = {"d_model": 12, "n_heads": 3, "n_layers": 2, "max_length": max_length, "alpha": 0.3}
    backbone = WEARec(**{**sizes, **options}).double().eval()
    for parameter in backbone.parameters():  # the initial biases are all equal
        parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone


def plain_layer(layer: WEARecLayer, x: Tensor) -> Tensor:
    """Return the outputs (M, D) of one padded row, one head and one pair of positions at a time."""
    M, D = x.shape
    N, E = M // 2 + 1, D // layer.n_heads
    adapted = layer.adapt2(F.gelu(layer.adapt1(x.mean(0)))).view(layer.n_heads, N, 2)
    heads = []
    for h in range(layer.n_heads):
        own = x[:, h * E : (h + 1) * E]
        scale = layer.filter[h] * (1 + adapted[h, :, 0])
        bias = layer.filter_bias[h] + adapted[h, :, 1]
        z = torch.fft.rfft(own, dim=0, norm="ortho") * scale[:, None] + bias[:, None]
        heads.append(torch.fft.irfft(z, n=M, dim=0, norm="ortho"))
    waves = torch.zeros_like(x)
    for k in range(M // 2):
        mean, half = (x[2 * k] + x[2 * k + 1]) / 2, (x[2 * k] - x[2 * k + 1]) / 2
        waves[2 * k] = mean + half * layer.detail[k]
        waves[2 * k + 1] = mean - half * layer.detail[k]
    mixed = layer.alpha * torch.cat(heads, 1) + (1 - layer.alpha) * waves
    x = layer.norm(x + mixed)
    return layer.ffn_norm(x + layer.linear2(F.gelu(layer.linear1(x))))


def plain(backbone: WEARec, tokens: Tensor) -> Tensor:
    """Return the outputs (L, D) of one history."""
    empty = backbone.max_length - tokens.shape[0]
    x = torch.cat((backbone.empty.expand(empty, -1), tokens)) + backbone.position.weight
    x = backbone.norm(x)
    for layer in backbone.layers:
        x = plain_layer(layer, x)
    return x[empty:]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 50])
def test_the_matrices_are_the_fourier_transform_and_its_inverse(length: int) -> None:
    forward, inverse = fourier(length, torch.float64, torch.device("cpu"))
    x = torch.randn(length, 4, dtype=torch.float64)
    z = torch.fft.rfft(x, dim=0, norm="ortho")
    torch.testing.assert_close(forward @ x, torch.cat((z.real, z.imag)), rtol=0, atol=1e-13)
    back = torch.fft.irfft(z * 0.3 + 2, n=length, dim=0, norm="ortho")
    both = torch.cat((z.real * 0.3 + 2, z.imag * 0.3))
    torch.testing.assert_close(inverse @ both, back, rtol=0, atol=1e-13)


@pytest.mark.parametrize("max_length", [1, 2, 7, 10])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_outputs_and_gradients_are_those_of_the_equations(max_length: int, alpha: float) -> None:
    backbone = model(max_length, alpha=alpha)
    lengths = [n for n in (max_length, max_length // 2, 1) if n]
    tokens = torch.randn(1, sum(lengths) + 2, 12, dtype=torch.float64, requires_grad=True)
    numbers = [i for i, n in enumerate(lengths) for _ in range(n)]
    seq_idx = torch.tensor([[*numbers, -1, -1]])
    expected = torch.cat([plain(backbone, x) for x in tokens[0, :-2].split(lengths)])
    found = backbone(tokens, seq_idx)[0, :-2]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    leaves = [tokens, *backbone.parameters()]
    last = torch.tensor(lengths).cumsum(0) - 1
    for places in (torch.arange(sum(lengths)), last):
        chosen = backbone(tokens, seq_idx, places)
        torch.testing.assert_close(chosen, expected[places], rtol=0, atol=1e-11)
        want = torch.autograd.grad(
            expected[places].sin().sum(), leaves, retain_graph=True, allow_unused=True
        )
        have = torch.autograd.grad(chosen.sin().sum(), leaves, allow_unused=True)
        for a, b in zip(have, want, strict=True):
            assert (a is None or not a.numel()) if b is None else a is not None
            if b is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("n_items", "n_heads", "published"),
    [(12_101, 8, 910_978), (18_357, 4, 1_283_906), (3_416, 2, 313_954)],
)
def test_published_parameter_counts(n_items: int, n_heads: int, published: int) -> None:
    """The logs of Beauty, Sports and ML-1M; the public code has one number a layer that it never uses."""
    made = NextItem(
        item_ids=[str(i) for i in range(n_items)],
        max_length=50,
        backbone={"_target_": "recsys_ssm.models.backbones.wearec.WEARec", "n_heads": n_heads},
        objective="last",
        tokenizer={"norm": False},
    )
    D, M, N, H, rows = 64, 50, 26, n_heads, n_items + 1
    layer = M // 2 * D + 2 * H * N + D * D + D + D * 2 * H * N + 2 * H * N
    layer += 2 * 2 * D + 2 * 4 * D * D + 4 * D + D
    total = rows * D + M * D + 2 * D + 2 * layer
    assert made.parameter_counts()["total"] == total == published - 2
    assert made.parameter_counts()["without_embeddings"] == 2 * layer + 2 * D


def test_a_longer_history_than_there_are_positions_is_one_line() -> None:
    with pytest.raises(UserError, match=r"backbone.max_length=4: a history has 5 items; give"):
        model(4)(torch.randn(1, 5, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "n_heads=5 does not divide d_model=12"),
        ({"alpha": 1.5}, r"alpha=1.5: expected a share"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WEARec(**{"d_model": 12, "n_heads": 3, **options})


def test_a_loss_at_every_position_is_refused() -> None:
    with pytest.raises(UserError, match="sees the whole history"):
        NextItem(item_ids=["a", "b"], max_length=5, backbone=WEARec)


def test_a_start_token_is_an_empty_place() -> None:
    """A history after the tokenizer's row of zeros is the history alone."""
    backbone = model(6)
    tokens = torch.randn(1, 3, 12, dtype=torch.float64)
    before = F.pad(tokens, (0, 0, 1, 0))
    torch.testing.assert_close(backbone(before)[:, 1:], backbone(tokens), rtol=0, atol=1e-12)


def test_the_vector_of_empty_places_is_kept_and_not_trained() -> None:
    one, other = model(6), model(6)
    other.empty.normal_()
    tokens = torch.randn(1, 3, 12, dtype=torch.float64)
    assert (one(tokens) - other(tokens)).abs().max() > 1e-3
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(tokens), other(tokens))
    assert "empty" not in dict(one.named_parameters())
