"""Check how an implementation on a GPU is chosen, without a GPU."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops import backends, describe_backends, set_backend
from recsys_ssm.ops._choice import choose, forget_choices
from recsys_ssm.ops._dispatch import Operator


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    forget_choices()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)
    forget_choices()
    set_backend("auto")


class Runs:
    """Two implementations of x · 2, one of them slow."""

    def __init__(self, slow: str = "triton") -> None:
        self.slow = slow
        self.calls: list[str] = []

    def __call__(self, name: str, arguments: Mapping[str, Any]) -> Tensor:
        self.calls.append(name)
        if name == self.slow:
            time.sleep(0.01)
        return arguments["x"] * 2


PATHS = ("triton", "mamba_ssm")


def test_the_faster_one_is_measured_once_for_a_class_of_shapes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs = Runs()
    with caplog.at_level(logging.INFO):
        for size in (5, 6, 8):
            assert choose("scan", PATHS, runs, {"x": torch.ones(size)}) == "mamba_ssm"
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("scan at (5,) in float32: triton ")
    assert line.endswith("ms; using mamba_ssm")
    measured = len(runs.calls)
    assert {"triton", "mamba_ssm"} == set(runs.calls)
    choose("scan", PATHS, runs, {"x": torch.ones(9)})
    assert len(runs.calls) == 2 * measured
    choose("scan", PATHS, runs, {"x": torch.ones(5, dtype=torch.bfloat16)})
    assert len(runs.calls) == 3 * measured


def test_the_arguments_keep_their_values_and_gradients() -> None:
    x = torch.ones(3, requires_grad=True)
    assert choose("scan", PATHS, Runs(slow="mamba_ssm"), {"x": x}) == "triton"
    assert x.grad is None and torch.equal(x, torch.ones(3))


def test_one_candidate_is_not_measured() -> None:
    runs = Runs()
    assert choose("scan", ("triton",), runs, {"x": torch.ones(3)}) == "triton"
    assert not runs.calls


def test_one_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def run(name: str, arguments: Mapping[str, Any]) -> Tensor:
        if name == "triton":
            raise RuntimeError("no such instruction\nmore")
        return arguments["x"]

    assert choose("scan", PATHS, run, {"x": torch.ones(3)}) == "mamba_ssm"
    assert "triton does not run (no such instruction)" in caplog.text


def test_reference_is_plain_pytorch_on_the_cpu_too() -> None:
    scan, x = Operator.registered["selective_scan"], torch.ones(3)
    could = scan.takes(x)
    set_backend("reference")
    assert not scan.takes(x) and scan.gpu_paths(x) == ()
    row = backends()["selective_scan"]
    assert row["cpu"] == "plain PyTorch"
    if could:
        assert row["cpu_why"] == "ops.backend=reference"
        assert "ops.backend=reference" in describe_backends()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"ops\.backend=cuda: must be one of auto, triton"):
        set_backend("cuda")


class OnGpu:
    """A tensor as far as the choice looks at one."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator of which both implementations are there."""
    monkeypatch.setattr("recsys_ssm.ops._dispatch._has", lambda *_: True)
    return Operator.registered["selective_scan"]


def paths(operator: Operator, *tensors: Any, **options: Any) -> tuple[str, ...]:
    return operator.gpu_paths(*tensors, **options)


def test_what_serves_a_call_on_a_gpu(both: Operator) -> None:
    assert paths(both, OnGpu()) == ("triton", "mamba_ssm")
    assert paths(both, OnGpu(), public=False) == ("triton",)
    assert paths(both, OnGpu(), OnGpu(torch.float64)) == ()
    assert paths(both, torch.ones(3)) == ()
    torch.use_deterministic_algorithms(True)
    assert paths(both, OnGpu()) == ("triton",)
    set_backend("mamba_ssm")
    assert paths(both, OnGpu()) == ("mamba_ssm",)
    assert paths(both, OnGpu(), public=False) == ()


@pytest.mark.parametrize(
    ("name", "there", "shown"),
    [
        ("auto", {"triton"}, ("Triton", "float64 runs on plain PyTorch")),
        ("auto", {"triton", "mamba_ssm"}, ("Triton or mamba_ssm", "measured at the first call")),
        ("mamba_ssm", set(), ("plain PyTorch", "cannot import triton or mamba_ssm")),
        ("reference", {"triton"}, ("plain PyTorch", "ops.backend=reference")),
    ],
)
def test_the_table_says_what_a_gpu_uses(
    name: str, there: set[str], shown: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("recsys_ssm.ops._dispatch._has", lambda _, path: path in there)
    set_backend(name)
    row = backends()["selective_scan"]
    assert row["cuda"] == shown[0] and shown[1] in row["cuda_why"]


def test_kernels_for_a_gpu_are_not_imported_on_a_cpu() -> None:
    code = (
        "import sys, torch, recsys_ssm.ops as ops; x = torch.ones(1, 2, 3); "
        "ops.causal_conv1d(x, torch.ones(3, 2)); ops.describe_backends(); "
        "sys.exit(any(name.startswith('recsys_ssm.ops.triton') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
