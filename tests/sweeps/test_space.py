"""The options of a search: ranges, choices, and how values are spelled in overrides."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from recsys_ssm.errors import UserError
from recsys_ssm.sweeps.space import distribution, flatten_space, spell

optuna = pytest.importorskip("optuna", minversion="4")


def test_a_nested_space_is_flat_options() -> None:
    lr = {"low": 1e-5, "high": 1e-3, "log": True}
    space = {"optimizer": {"lr": lr, "eps": None}, "scheduler": ["none"], "empty": {}}
    assert flatten_space(space) == {"optimizer.lr": lr, "scheduler": ["none"]}
    # A group of options may have the name of a range's part.
    assert flatten_space({"low": {"a": [1, 2]}}) == {"low.a": [1, 2]}


def test_ranges_and_choices() -> None:
    d = optuna.distributions
    assert distribution("a", {"low": 1, "high": 4}) == d.IntDistribution(1, 4)
    assert distribution("a", {"low": 1, "high": 5, "step": 2}) == d.IntDistribution(1, 5, step=2)
    assert distribution("a", {"low": 0, "high": 0.5}) == d.FloatDistribution(0, 0.5)
    log = distribution("a", {"low": 1e-5, "high": 1e-3, "log": True})
    assert log == d.FloatDistribution(1e-5, 1e-3, log=True)
    choices = distribution("a", [16, None, True, "a b", [1, 2], {"k": 1.5}])
    spelled = ("16", "null", "true", "'a b'", "[1,2]", "{k:1.5}")
    assert choices == d.CategoricalDistribution(spelled)
    assert spell("none") == "none" and spell("true") == "'true'" and spell("it's") == r"'it\'s'"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (3, "a=3: neither a range nor choices; give {low"),
        ({"low": 1, "hig": 2}, "a.hig: unknown; did you mean 'high'?"),
        ({"low": 1}, "a.high=null: expected a number"),
        ({"low": "x", "high": 2}, "a.low=x: expected a number"),
        ({"low": 1, "high": 2, "step": "x"}, "a.step=x: expected a number"),
        ({"low": 1, "high": 2, "log": 1}, "a.log=1: expected true or false"),
        ({"low": 3, "high": 2}, "a: .*low=3, high=2"),
        ({"low": 0, "high": 2, "log": True}, "a: "),
        ({"choices": []}, "a: expected only a list of choices"),
        ({"choices": [1], "low": 1}, "a: expected only a list of choices"),
    ],
)
def test_a_mistake_in_the_space_is_named(node: object, message: str) -> None:
    with pytest.raises(UserError, match=r"^search\.space\." + message):
        distribution("a", node)


@pytest.mark.parametrize(
    "value", [None, True, "true", "none", "a b", "it's", "1e-3", 1e-3, 7, [1, "x"], {"k": None}, ""]
)
def test_a_spelled_value_is_read_back_by_hydra(value: object) -> None:
    [parsed] = OverridesParser.create().parse_overrides([f"option={spell(value)}"])
    assert parsed.value() == value and type(parsed.value()) is type(value)
