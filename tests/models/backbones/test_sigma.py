"""Test SIGMA against its equations written out plainly, its size, its flip and the objectives it may be trained on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.models.backbones.sigma import Sigma, SigmaBlock
from recsys_ssm.models.next_item import NextItem


def block(**options: object) -> SigmaBlock:
    torch.manual_seed(0)
    return SigmaBlock(d_model=8, d_state=4, **options).double().eval()


def history(length: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, length, 8, dtype=torch.float64)


def plain(b: SigmaBlock, x: Tensor, flipped: Tensor, weights: Tensor) -> Tensor:
    """Return the outputs (L, D) of one history from SIGMA's equations, with PyTorch's own layers."""
    x, flipped = x[None], flipped[None]
    a = x + b.ahead(x)
    gate = b.gate_silu(F.silu(a)) + b.gate_sigmoid(torch.sigmoid(a))
    a = flipped + b.flipped(flipped)
    flipped_gate = b.gate_silu(F.silu(a)) + b.gate_sigmoid(torch.sigmoid(gate))
    gru, _ = b.gru(b.conv1d(x.mT).mT)
    m, flipped_m = b.mamba(x), b.mamba(flipped)
    mixed = weights[0] * gru
    mixed = mixed + weights[1] * (flipped_m * flipped_gate + flipped_m)
    mixed = mixed + weights[2] * (m * gate + m)
    return b.out_proj(mixed)[0]


def test_published_parameter_counts() -> None:
    """The published 129,987 include the LayerNorm of the item embeddings, 2·64, which is the tokenizer's."""
    for options in ({}, {"published": True}):
        assert sum(p.numel() for p in Sigma(**options).parameters()) == 129_987 - 128
    model = NextItem(item_ids=["a", "b"], max_length=5, backbone=Sigma, objective="last")
    assert model.parameter_counts()["without_embeddings"] == 129_987


@pytest.mark.parametrize("length", [1, 2, 9, 10, 30, 60])
def test_the_flip_is_a_share_of_the_real_length(length: int) -> None:
    """Nine of ten tokens, rounded down: the last of a history stays last."""
    b, x = block(), history(length)[0]
    k = 9 * length // 10
    flipped = torch.cat((x[:k].flip(0), x[k:]))
    expected = plain(b, x, flipped, torch.tensor([0.1, 0.1, 0.8]).double().softmax(0))
    torch.testing.assert_close(b(x[None])[0], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("length", [1, 10, 23, 44, 45, 46, 50])
@pytest.mark.parametrize("mixing", ["raw", "fixed"])
def test_published_flips_45_tokens_of_a_padded_row_of_50(length: int, mixing: str) -> None:
    b, x = block(published=True, mixing=mixing), history(length)[0]
    row = torch.cat((x, torch.zeros(50 - length, 8, dtype=torch.float64)))
    flipped = torch.cat((row[:45].flip(0), row[45:]))
    weights = torch.tensor([0.1, 0.1, 0.8]).double()
    weights = weights if mixing == "raw" else weights.softmax(0)
    # Beyond the history the convolution sees zeros in both.
    expected = plain(b, row, flipped, weights)[:length]
    torch.testing.assert_close(b(x[None])[0], expected, rtol=0, atol=1e-7)


def test_the_mixing_is_trained_unless_it_is_fixed() -> None:
    for options, trained in [
        ({}, True),
        ({"published": True}, False),
        ({"published": True, "mixing": "raw"}, True),
        ({"mixing": "fixed"}, False),
    ]:
        torch.manual_seed(0)
        (layer,) = Sigma(d_model=8, **options).layers
        layer(torch.randn(2, 5, 8)).sin().sum().backward()
        mix = layer.mixer.mix
        assert (mix.grad is not None and bool(mix.grad.any())) == trained


def depends(b: SigmaBlock, length: int) -> list[list[int]]:
    """Return, for each position, the positions whose tokens change its output."""
    x = history(length)
    before = b(x)
    seen: list[list[int]] = [[] for _ in range(length)]
    for place in range(length):
        changed = x.clone()
        changed[:, place] += torch.randn(8, dtype=torch.float64)
        for t in ((b(changed) - before).abs().amax(-1)[0] > 1e-9).nonzero().flatten().tolist():
            seen[t].append(place)
    return seen


def test_what_each_position_sees() -> None:
    """With 10 tokens 9 are flipped: position t sees t + 1 by the convolution, and 8 - t to 8 by the flip."""
    seen = depends(block(), 10)
    for t in range(10):
        earlier, ahead, flipped = range(t + 1), range(t + 2), range(8 - t, 9)
        expected = {*earlier, *ahead, *flipped} & set(range(10))
        assert seen[t] == sorted(expected)
    # Without a flip the convolution alone looks ahead.
    assert depends(block(flip=0.0), 10)[3] == [0, 1, 2, 3, 4]
    # The published flip brings nothing but padding to the first 22 positions of a short history.
    assert depends(block(published=True), 10)[3] == [0, 1, 2, 3, 4]


def test_a_loss_at_every_position_is_refused() -> None:
    for backbone in (Sigma, {"_target_": f"{Sigma.__module__}.Sigma", "published": True}):
        with pytest.raises(UserError, match="sees the whole history"):
            NextItem(item_ids=["a"], max_length=5, backbone=backbone, objective="all")


def test_the_layer_has_a_residual_if_there_are_several() -> None:
    assert not Sigma().layers[0].residual
    assert all(layer.residual for layer in Sigma(n_layers=2).layers)


def test_wrong_arguments() -> None:
    for options, message in [
        ({"flip": 1.0}, "flip=1.0"),
        ({"flip": -0.1}, "flip=-0.1"),
        ({"mixing": "mean"}, "mixing='mean'"),
        ({"n_layers": 0}, "n_layers=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Sigma(**options)
