"""Run a few of the calls of scripts/try_kernels.py."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.ops.conftest import available_isas


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "try_kernels.py"
    spec = importlib.util.spec_from_file_location("try_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["try_kernels"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("isa", available_isas())
def test_random_calls_are_equal_or_refused(isa: str, script: Any, use: Any) -> None:
    if isa != "plain":
        use(RECSYS_SSM_MAX_ISA=isa)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [(seed, *script.try_one(seed)) for seed in range(150)]
    assert not [one for one in found if one[2] == "wrong"]
    assert {one[1] for one in found} == {
        "causal_conv1d", "same_conv1d", "selective_scan", "ssd", "linear_cross_entropy", "rank_products", "dropout",
    }  # fmt: skip
    assert sum(one[2] == "refused" for one in found) >= 5


def test_a_wrong_result_is_found(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = script.selective_scan

    def off_by_little(**given: Any) -> Any:
        y, state = scan(**given)
        return y * 1.5, state

    monkeypatch.setattr(script, "selective_scan", off_by_little)
    assert "wrong" in {script.try_one(seed)[1] for seed in range(60)}
