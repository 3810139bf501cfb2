import itertools
import sys

import polars as pl
import pytest
import torch

from recsys_ssm.errors import UserError
from recsys_ssm.features import CategoricalField, Features, FeatureSchema, NumericField
from recsys_ssm.models.backbones.mamba import Mamba
from recsys_ssm.models.tokenizers import FeatureTokenizer, MambaTabTokenizer, MambularTokenizer

FEATURES = Features(torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 0, 2]]))


def schema(n_numeric: int, cardinalities: list[int]) -> FeatureSchema:
    """A schema of so many numbers, and categories of so many codes (the missing one included)."""
    return FeatureSchema(
        numeric=tuple(NumericField(f"n{i}") for i in range(n_numeric)),
        categorical=tuple(
            CategoricalField(f"c{i}", tuple(str(code) for code in range(1, n)))
            for i, n in enumerate(cardinalities)
        ),
    )


def tokenizer(**options: object) -> FeatureTokenizer:
    torch.manual_seed(0)
    return FeatureTokenizer(schema=schema(2, [2, 1, 3]), d_model=4, **options)


def test_every_token_is_the_formula_and_cls_is_last() -> None:
    t = tokenizer()
    tokens = t(FEATURES)
    assert tokens.shape == (1, 6, 4)
    expected = [
        2.0 * t.weight[0] + t.bias[0],
        -1.0 * t.weight[1] + t.bias[1],
        t.embedding[1] + t.bias[2],  # feature 0: rows 0-1
        t.embedding[2] + t.bias[3],  # feature 1: row 2
        t.embedding[5] + t.bias[4],  # feature 2: rows 3-5
        t.weight[2] + t.bias[5],  # CLS
    ]
    torch.testing.assert_close(tokens[0], torch.stack(expected))


def test_cls_does_not_depend_on_the_row() -> None:
    t = tokenizer()
    other = Features(torch.randn(3, 2), torch.zeros(3, 3, dtype=torch.long))
    torch.testing.assert_close(t(other)[:, -1], t(FEATURES)[:, -1].expand(3, -1))


def test_missing_has_a_row_of_its_own() -> None:
    t = tokenizer()
    seen = {
        tuple(t(Features(torch.zeros(1, 2), torch.tensor([[0, 0, code]])))[0, 4].tolist())
        for code in range(3)
    }
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("init", "scale", "std"),
    [("normal", 1.0, 1.0), ("normal", 0.02, 0.02), ("uniform", 1.0, 1 / 768**0.5)],
)
def test_initialisation(init: str, scale: float, std: float) -> None:
    torch.manual_seed(0)
    t = FeatureTokenizer(schema=schema(50, [50]), d_model=256, init=init, init_scale=scale)
    for parameter in t.parameters():
        assert parameter.std().item() == pytest.approx(std, rel=0.05)
    if init == "uniform":
        assert t.weight.abs().max() <= scale / 16


def test_only_numbers_or_only_categories() -> None:
    only_numbers = FeatureTokenizer(schema=schema(2, []), d_model=4)
    assert only_numbers(Features(torch.ones(3, 2), torch.zeros(3, 0, dtype=torch.long))).shape == (
        3,
        3,
        4,
    )
    only_categories = FeatureTokenizer(schema=schema(0, [5]), d_model=4)
    assert only_categories(
        Features(torch.ones(3, 0), torch.zeros(3, 1, dtype=torch.long))
    ).shape == (3, 2, 4)


def test_unknown_initialisation() -> None:
    with pytest.raises(ValueError, match="init='zeros'"):
        tokenizer(init="zeros")


def test_a_side_without_categories_has_no_parameter_for_them() -> None:
    schema = FeatureSchema((NumericField("age", 0.0, 1.0),), ())
    tokenizer = FeatureTokenizer(schema=schema, d_model=4)
    assert all(parameter.numel() for parameter in tokenizer.parameters())
    side = Features(torch.randn(3, 1), torch.zeros(3, 0, dtype=torch.long))
    assert tokenizer(side).shape == (3, 2, 4)

    old = tokenizer.state_dict() | {"embedding": torch.zeros(0, 4)}  # as version 0.1 saved it
    again = FeatureTokenizer(schema=schema, d_model=4)
    torch.nn.Sequential(again).load_state_dict({f"0.{name}": x for name, x in old.items()})
    assert torch.equal(again(side), tokenizer(side))
    with pytest.raises(RuntimeError, match="embedding"):
        again.load_state_dict(old | {"embedding": torch.zeros(2, 4)})


TABLE = pl.DataFrame(
    {
        "x": [float(i * i % 97) for i in range(97)],
        "same": [4.0] * 97,
        "c": [str(i % 3) for i in range(97)],
        "d": [str(i % 7) for i in range(97)],
    }
)


def fitted(scale: bool = True) -> FeatureSchema:
    return FeatureSchema.fit(TABLE, numeric=["x", "same"], categorical=["c", "d"], scale=scale)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_mambatab_has_the_published_parameters() -> None:
    """13,601 with its linear head of 33, in whose place a tower has the two-tower head."""
    fifteen = FeatureSchema.fit(
        TABLE.select(pl.col("x").alias(str(i)) for i in range(15)), numeric=[*map(str, range(15))]
    )
    tokenizer = MambaTabTokenizer(schema=fifteen, d_model=32)
    block = Mamba(d_model=32, n_layers=1, d_state=32, d_conv=4, norm="none")
    assert count(tokenizer) == 576 and count(block) == 12_992
    assert count(tokenizer) + count(block) + count(torch.nn.Linear(32, 1)) == 13_601


@pytest.mark.parametrize("scale", [True, False])
def test_mambatab_is_one_token_of_min_max_numbers_and_ordinal_codes(scale: bool) -> None:
    torch.manual_seed(0)
    schema = fitted(scale)
    t = MambaTabTokenizer(schema=schema, d_model=8)
    torch.nn.init.normal_(t.norm.weight)
    torch.nn.init.normal_(t.norm.bias)
    rows = pl.DataFrame(
        {"x": [0.0, 48.0, 96.0], "same": [4.0] * 3, "c": ["0", None, "2"], "d": ["6", "0", None]}
    )
    tokens = t(schema.encode(rows))
    assert tokens.shape == (3, 1, 8)
    x = torch.tensor([[0, 0, 1 / 3, 1], [0.5, 0, 0, 1 / 7], [1, 0, 1, 0]])
    expected = torch.nn.functional.layer_norm(t.linear(x), (8,), t.norm.weight, t.norm.bias).relu()
    torch.testing.assert_close(tokens[:, 0], expected, rtol=0, atol=1e-5)


def test_the_published_mambatab_warns() -> None:
    assert not MambaTabTokenizer(schema=fitted(), d_model=8).across_rows
    with pytest.warns(UserWarning, match="depend on the other rows"):
        assert MambaTabTokenizer(schema=fitted(), d_model=8, published=True).across_rows


def test_mambular_has_the_published_parameters_a_layer() -> None:
    backbone = Mamba(
        d_model=64,
        d_state=128,
        d_conv=4,
        dt_rank=4,
        conv_bias=False,
        norm="pre",
        norm_kind="rms",
        residual=True,
    )
    assert [count(layer) for layer in backbone.layers] == [75_584] * 4
    x = torch.randn(2, 5, 64)
    expected = x
    for layer in backbone.layers:
        normed = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = expected + layer.mixer(normed)
    expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(backbone(x), expected, rtol=0, atol=1e-5)


def test_mambular_encodes_piecewise_linearly_and_puts_categories_first() -> None:
    torch.manual_seed(0)
    schema = fitted()
    t = MambularTokenizer(schema=schema, d_model=8, n_bins=4)
    row = pl.DataFrame({"x": [60.0], "same": [4.0], "c": ["1"], "d": [None]})
    tokens = t(schema.encode(row))
    assert tokens.shape == (1, 4, 8) and t.pooling == "mean"
    torch.testing.assert_close(tokens[0, 0], t.embedding[2])
    torch.testing.assert_close(tokens[0, 1], t.embedding[4])
    field = schema.numeric[0]
    low, *_, high = edges = field.edges(4).tolist()
    value = (60.0 - field.mean) / field.std
    assert low < value < high
    steps = [min(max((value - a) / (b - a), 0.0), 1.0) for a, b in itertools.pairwise(edges)]
    assert sorted(steps, reverse=True) == steps and 1.0 in steps and 0.0 in steps
    expected = torch.tensor(steps) @ t.numbers.linear.weight[0]
    torch.testing.assert_close(tokens[0, 2], expected, rtol=0, atol=1e-5)


def test_mambular_encodes_periodically() -> None:
    torch.manual_seed(0)
    schema = fitted()
    t = MambularTokenizer(schema=schema, d_model=8, encoding="periodic", n_frequencies=3)
    assert t.numbers.periodic.weight.shape == (2, 3)
    features = schema.encode(TABLE[:4])
    angle = 2 * torch.pi * features.numeric[:, :1] * t.numbers.periodic.weight[0]
    expected = torch.cat((angle.cos(), angle.sin()), 1) @ t.numbers.linear.weight[0]
    torch.testing.assert_close(t(features)[:, 2], expected, rtol=0, atol=1e-5)
    wide = MambularTokenizer(schema=schema, d_model=64, encoding="periodic")
    assert wide.numbers.periodic.weight.shape == (2, 48)
    assert 0.005 < wide.numbers.periodic.weight.std().item() < 0.015


def test_mambular_of_categories_alone() -> None:
    t = MambularTokenizer(schema=schema(0, [5, 2]), d_model=4)
    assert t(Features(torch.ones(3, 0), torch.zeros(3, 2, dtype=torch.long))).shape == (3, 2, 4)


def test_mambular_needs_its_package_and_known_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"tokenizer.encoding=fourier"):
        MambularTokenizer(schema=fitted(), d_model=8, encoding="fourier")
    monkeypatch.setitem(sys.modules, "rtdl_num_embeddings", None)
    with pytest.raises(UserError, match=r"pip install 'recsys-ssm\[tabular\]'"):
        MambularTokenizer(schema=fitted(), d_model=8)
