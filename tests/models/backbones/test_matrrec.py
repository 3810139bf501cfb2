"""Test MaTrRec against its layer written out plainly, its size and the objectives it may be trained on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recsys_ssm.models.backbones.matrrec import MaTrRec
from recsys_ssm.models.next_item import NextItem
from recsys_ssm.ops.dropout import dropout


def scrambled(backbone: MaTrRec) -> MaTrRec:
    """Draw biases and norms anew, since 0 and 1 would hide mistakes."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return backbone.double()


def test_published_parameter_counts() -> None:
    """The published 89,024 include the LayerNorm of the item embeddings, 2·64, which is the tokenizer's."""
    assert sum(p.numel() for p in MaTrRec().parameters()) == 89_024 - 128
    model = NextItem(item_ids=["a", "b"], max_length=5, backbone=MaTrRec)
    assert model.parameter_counts()["without_embeddings"] == 89_024


@pytest.mark.parametrize("n_layers", [1, 2])
def test_layers_are_the_published_ones(n_layers: int) -> None:
    """Compare in training mode: dropout draws the same numbers in the same places, none within the network."""
    torch.manual_seed(0)
    backbone = scrambled(MaTrRec(d_model=16, d_state=4, n_layers=n_layers, dropout=0.3))
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    torch.manual_seed(1)
    found = backbone(x)
    torch.manual_seed(1)
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for mamba, attention in zip(backbone.layers[::2], backbone.layers[1::2], strict=True):
        x = mamba.norm(x + dropout(mamba.mixer(x), 0.3))
        weights = attention.mixer.attention
        q, k, v = F.linear(x, weights.in_proj_weight, weights.in_proj_bias).chunk(3, -1)
        scores = (q @ k.mT / 4).masked_fill(later, -torch.inf).softmax(-1)
        x = attention.norm(x + dropout(weights.out_proj(dropout(scores, 0.3) @ v), 0.3))
        inner = attention.ffn.linear2(F.gelu(attention.ffn.linear1(x)))
        x = attention.ffn_norm(x + dropout(inner, 0.3))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_every_position_may_be_trained() -> None:
    """No output depends on a later item (test_contract proves it for packed rows too): both objectives are allowed."""
    torch.manual_seed(0)
    backbone = scrambled(MaTrRec(d_model=16)).eval()
    tokens = torch.randn(1, 8, 16, dtype=torch.float64)
    for place in range(8):
        changed = tokens.clone()
        changed[:, place] += torch.randn(16, dtype=torch.float64)
        moved = (backbone(changed) - backbone(tokens)).abs().amax(-1)[0] > 1e-9
        assert moved.tolist() == [t >= place for t in range(8)]
    for objective in ("all", "last"):
        NextItem(item_ids=["a"], max_length=5, backbone=MaTrRec, objective=objective)


def test_wrong_arguments() -> None:
    for options, message in [({"n_layers": 0}, "n_layers=0"), ({"ffn": 0}, "ffn=0")]:
        with pytest.raises(ValueError, match=message):
            MaTrRec(**options)
    with pytest.raises(ValueError, match="d_model=30 is not a multiple of nhead=4"):
        MaTrRec(d_model=30, nhead=4)
