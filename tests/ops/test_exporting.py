"""Operators as they are exported equal the references, for rows of one sequence with padding at the end or in front."""

from __future__ import annotations

import pytest
import torch

from recsys_ssm.ops import causal_conv1d, same_conv1d, selective_scan, ssd
from recsys_ssm.ops._dispatch import exporting, is_exporting
from recsys_ssm.ops.selective_scan import selective_scan_reference
from recsys_ssm.ops.ssd import ssd_reference
from recsys_ssm.ops.trapezoidal_ssd import trapezoidal_ssd, trapezoidal_ssd_reference

LENGTHS = (1, 2, 15, 16, 17, 50, 200)


def padding(length: int, back: bool) -> torch.Tensor:
    """Return ``seq_idx`` of three rows: full, one position short, and of one position."""
    n = torch.tensor([length, max(length - 1, 1), 1]).unsqueeze(1)
    here = torch.arange(length)
    return torch.where(here.flip(0) < n if back else here < n, 0, -1)


@pytest.mark.parametrize("back", [False, True, None])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan(length: int, back: bool | None) -> None:
    torch.manual_seed(length)
    u, dt, z = (torch.randn(3, length, 6) for _ in range(3))
    B, C = (torch.randn(3, length, 4) for _ in range(2))
    A, D, bias, state = -torch.rand(6, 4) * 8, torch.randn(6), torch.randn(6), torch.randn(3, 6, 4)
    seq_idx = None if back is None else padding(length, back)
    inputs = (u, dt, A, B, C, D, z, bias, True, seq_idx, state)
    wide = [x.double() if isinstance(x, torch.Tensor) and x is not seq_idx else x for x in inputs]
    expected, end = selective_scan_reference(*wide)
    with exporting(), torch.no_grad():
        found, found_end = selective_scan(*inputs, return_final_state=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_end.double(), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("back", [False, True, None])
@pytest.mark.parametrize("length", LENGTHS)
def test_ssd(length: int, back: bool | None, groups: int) -> None:
    torch.manual_seed(length)
    x, dt = torch.randn(3, length, 4, 3), torch.randn(3, length, 4)
    B, C = (torch.randn(3, length, groups, 5) for _ in range(2))
    A, D, bias, state = -torch.rand(4) * 16, torch.randn(4), torch.randn(4), torch.randn(3, 4, 3, 5)
    seq_idx = None if back is None else padding(length, back)
    inputs = (x, dt, A, B, C, D, bias, True, seq_idx, state)
    wide = [y.double() if isinstance(y, torch.Tensor) and y is not seq_idx else y for y in inputs]
    expected, end = ssd_reference(*wide)
    with exporting(), torch.no_grad():
        found, found_end = ssd(*inputs, return_final_state=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found_end.double(), end, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("rank", "groups", "halves"), [(1, 1, False), (1, 2, True), (3, 2, True)])
@pytest.mark.parametrize("back", [False, True, None])
@pytest.mark.parametrize("length", LENGTHS)
def test_trapezoidal_ssd(
    length: int, back: bool | None, rank: int, groups: int, halves: bool
) -> None:
    torch.manual_seed(length)
    x, angle = torch.randn(3, length, rank, 4, 3), torch.randn(3, length, 4, 2) * 3
    log_decay = -torch.rand(3, length, 4) * 4
    past, own = (torch.rand(3, length, 4) for _ in range(2))
    B, C = (torch.randn(3, length, rank, groups, 6) for _ in range(2))
    B_bias, C_bias, D = torch.randn(4, rank, 6), torch.randn(4, rank, 6), torch.randn(4)
    seq_idx = None if back is None else padding(length, back)
    inputs = (x, log_decay, past, own, B, C, B_bias, C_bias, angle, D)
    expected = trapezoidal_ssd_reference(
        *(t.double() for t in inputs), halves=halves, seq_idx=seq_idx
    )
    with exporting(), torch.no_grad():
        found = trapezoidal_ssd(*inputs, halves=halves, seq_idx=seq_idx)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=5e-5)


def test_no_kernel_is_called_in_an_export() -> None:
    x, weight = torch.randn(2, 9, 5), torch.randn(5, 4)
    for convolve in (causal_conv1d, same_conv1d):
        expected = convolve(x, weight)
        with exporting():
            assert is_exporting()
            program = torch.export.export(_Conv(convolve, weight), (x,), strict=False)
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert names and not any("recsys" in name for name in names)
        torch.testing.assert_close(program.module()(x), expected)
    assert not is_exporting()


class _Conv(torch.nn.Module):
    def __init__(self, convolve: object, weight: torch.Tensor) -> None:
        super().__init__()
        self.convolve, self.weight = convolve, weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, self.weight)  # type: ignore[operator]
