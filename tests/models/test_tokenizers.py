import pytest
import torch

from recsys_ssm.features import CategoricalField, Features, FeatureSchema, NumericField
from recsys_ssm.models.tokenizers import FeatureTokenizer

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
