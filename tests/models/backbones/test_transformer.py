"""Test attention layers against PyTorch's own and against the formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ssm.models.backbones.ligr import Ligr
from recsys_ssm.models.backbones.transformer import Transformer

SEQ_IDX = torch.tensor([[0] * 5 + [1] * 4, [0] * 2 + [3] * 6 + [-1]])
HIDDEN = torch.tensor(
    [
        [[s != t or j > i for j, t in enumerate(row)] for i, s in enumerate(row)]
        for row in SEQ_IDX.tolist()
    ]
)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_pytorchs_layers(
    norm_first: bool, activation: str, causal: bool, packed: bool
) -> None:
    """Compare outputs and gradients for every mask."""
    torch.manual_seed(0)
    encoder = Transformer(
        d_model=16,
        nhead=4,
        dim_feedforward=24,
        activation=activation,
        norm_first=norm_first,
        norm_eps=1e-3,
        causal=causal,
    ).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(2, 9, 9, dtype=torch.bool)
    if causal:
        hidden |= torch.ones(9, 9, dtype=torch.bool).triu(1)
    if packed:
        hidden |= SEQ_IDX.unsqueeze(2) != SEQ_IDX.unsqueeze(1)
    expected = x
    for weights in encoder.layers:
        layer = nn.TransformerEncoderLayer(
            16, 4, 24, 0.0, activation, 1e-3, batch_first=True, norm_first=norm_first
        ).double()
        layer.load_state_dict(weights.state_dict())
        expected = layer(expected, src_mask=hidden.repeat_interleave(4, dim=0))
    expected = encoder.final_norm(expected)
    (gradient,) = torch.autograd.grad(expected.sin().sum(), x)

    found = encoder(x, SEQ_IDX if packed else None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), x)[0], gradient, rtol=0, atol=1e-12
    )


def attention(weights: nn.MultiheadAttention, x: Tensor, hidden: Tensor) -> Tensor:
    """Compute one head at a time, as in the paper."""
    q, k, v = F.linear(x, weights.in_proj_weight, weights.in_proj_bias).chunk(3, -1)
    heads = []
    for q_h, k_h, v_h in zip(
        *(tensor.chunk(weights.num_heads, -1) for tensor in (q, k, v)), strict=True
    ):
        scores = q_h @ k_h.transpose(1, 2) / math.sqrt(q_h.shape[-1])
        heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v_h)
    return F.linear(torch.cat(heads, -1), weights.out_proj.weight, weights.out_proj.bias)


def test_sasrec_layer_is_the_formula() -> None:
    torch.manual_seed(0)
    encoder = Transformer(
        d_model=16, dim_feedforward=64, activation="gelu", causal=True, norm_eps=1e-12, dropout=0.5
    ).double()
    x = expected = torch.randn(2, 9, 16, dtype=torch.float64)
    for layer in encoder.layers:
        a = layer.norm1(expected + attention(layer.self_attn, expected, HIDDEN))
        inner = layer.linear1(a)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        expected = layer.norm2(a + layer.linear2(inner))
    torch.testing.assert_close(encoder.eval()(x, SEQ_IDX), expected, rtol=0, atol=1e-12)


def test_ligr_layer_is_the_formula() -> None:
    torch.manual_seed(0)
    ligr = Ligr(d_model=16, n_layers=2, nhead=2).double().eval()
    x = expected = torch.randn(2, 9, 16, dtype=torch.float64)
    for layer in ligr.layers:
        mixed = attention(layer.mixer.attention, layer.norm(expected), HIDDEN)
        expected = expected + torch.sigmoid(layer.gate(expected)) * mixed
        normed = layer.ffn_norm(expected)
        inner = F.silu(normed @ layer.ffn.linear1.weight.T) * (normed @ layer.ffn.linear3.weight.T)
        expected = expected + torch.sigmoid(layer.ffn_gate(expected)) * (
            inner @ layer.ffn.linear2.weight.T
        )
    torch.testing.assert_close(ligr(x, SEQ_IDX), expected, rtol=0, atol=1e-12)


def test_sasrec_has_no_dropout_within_the_network() -> None:
    (layer,) = Transformer(
        d_model=16, n_layers=1, dropout=0.3, inner_dropout=0.0, attention_dropout=0.5
    ).layers
    rates = (layer.self_attn.dropout, layer.dropout1.p, layer.dropout.p, layer.dropout2.p)
    assert rates == (0.5, 0.3, 0.0, 0.3)
    (layer,) = Transformer(d_model=16, n_layers=1, dropout=0.3).layers
    rates = (layer.self_attn.dropout, layer.dropout1.p, layer.dropout.p, layer.dropout2.p)
    assert rates == (0.3, 0.3, 0.3, 0.3)


def test_dropout_of_the_attention_weights_only_in_training() -> None:
    torch.manual_seed(0)
    encoder = Transformer(d_model=16, causal=True, attention_dropout=0.5)
    x = torch.randn(1, 6, 16)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    torch.testing.assert_close(encoder(x), encoder(x), rtol=0, atol=0)


def test_layers_do_not_start_equal() -> None:
    first, second = (layer.linear1.weight for layer in Transformer(d_model=16).layers)
    assert not torch.equal(first, second)


def test_a_step_does_not_change_the_state_it_is_given() -> None:
    torch.manual_seed(0)
    encoder = Transformer(d_model=16, causal=True).eval()
    token = torch.randn(2, 16)
    _, state = encoder.step(token, encoder.init_state(2))
    first, after_first = encoder.step(token, state)
    again, _ = encoder.step(token, state)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert state[0].key.shape[2] == 1 and after_first[0].key.shape[2] == 2
