"""Run Triton kernels on a GPU, or else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from recsys_ssm.ops import set_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    if DEVICE.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("no GPU, and TRITON_INTERPRET=1 was not set before triton was imported")
        scan_by_rows(monkeypatch)
    set_backend("triton")
    yield
    set_backend("auto")


def scan_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter scan a tile row by row; it takes element by element, which needs seconds for a tile."""
    from triton.runtime.interpreter import ScanOps

    def generic_scan(self: Any, given: Any) -> list[Any]:
        rows = [np.moveaxis(x.handle.data, self.axis, 0) for x in given]
        done = [np.empty_like(x) for x in rows]

        def tensors(of: list[np.ndarray], i: int) -> tuple[Any, ...]:
            pairs = zip(of, given, strict=True)
            return tuple(self.to_tensor(np.ascontiguousarray(x[i]), g.dtype) for x, g in pairs)

        for i in range(len(rows[0])):
            here = tensors(rows, i)
            if i:
                combined = self.combine_fn.fn(*tensors(done, i - 1), *here)
                here = combined if isinstance(combined, tuple) else (combined,)
            for x, value in zip(done, here, strict=True):
                x[i] = value.handle.data
        return [
            self.to_tensor(np.ascontiguousarray(np.moveaxis(x, 0, self.axis)), g.dtype)
            for x, g in zip(done, given, strict=True)
        ]

    assert hasattr(ScanOps, "generic_scan")
    monkeypatch.setattr(ScanOps, "generic_scan", generic_scan)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max|a - b| / max|b|."""
    assert found.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item() or 1.0
    return (found.detach().cpu().double() - expected.detach()).abs().max().item() / scale
