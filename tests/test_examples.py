"""Run the examples in the docstrings of the public classes."""

from __future__ import annotations

import doctest
import inspect

import polars as pl
import pytest

import recsys_ssm
from recsys_ssm import Backbone, Interactions, TableData

PUBLIC = {name: getattr(recsys_ssm, name) for name in recsys_ssm.__all__}
EXAMPLES = {
    name: [each for each in doctest.DocTestFinder(recurse=False).find(value, name) if each.examples]
    for name, value in PUBLIC.items()
    if inspect.isclass(value) or inspect.isfunction(value)
}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def frames_are_read() -> bool:
    """Return True if datasets take data frames; examples of models need one."""
    events = {"user_id": [0, 0, 0, 1, 1, 1], "item_id": [1, 2, 3, 2, 3, 1]}
    frame = pl.DataFrame({**events, "timestamp": [1, 2, 3, 1, 2, 3]})
    try:
        TableData(interactions=frame)  # type: ignore[arg-type]
        Interactions(interactions=frame)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", [name for name, examples in EXAMPLES.items() if examples])
def test_an_example_runs(name: str) -> None:
    (example,) = EXAMPLES[name]
    if "interactions=" in example.docstring and not frames_are_read():
        pytest.skip("datasets do not take data frames yet")
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    outcome = runner.run(example, out=report.append)
    assert outcome.attempted and not outcome.failed, "".join(report)


def test_who_has_an_example() -> None:
    backbones = {
        name
        for name, value in PUBLIC.items()
        if inspect.isclass(value) and issubclass(value, Backbone) and not inspect.isabstract(value)
    } - {"Stack"}
    assert backbones >= {"Mamba", "Mamba2", "Hydra", "Transformer", "Ligr", "Identity"}
    for name in (*backbones, "TwoTower", "NextItem", "RankingMetrics", "FeatureSchema"):
        assert EXAMPLES[name], f"{name} has no example in its docstring"
