"""Causal convolution: FT-Mamba's (width 16) and Mamba4Rec's (width 4), beside PyTorch's depthwise layer."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from op_cases import Case, Contender, packed_rows
from recsys_ssm.ops import causal_conv1d
from recsys_ssm.ops.causal_conv1d import _reference

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((32, 21, 256, 16), (128, 200, 128, 4))
PACKED: Shape = (41, 50, 128, 4)  # a batch of next-item training


def cases() -> list[Case]:
    return [_case(shape) for shape in (*SHAPES, PACKED)]


def _case(shape: Shape) -> Case:
    batch, length, channels, _ = shape
    elements = batch * length * channels
    seq_idx = packed_rows(batch, length)
    return Case(
        name=f"causal_conv1d {shape}",
        tensors=partial(_tensors, shape),
        contenders=[
            Contender("kernel", _ours),
            Contender("kernel, packed", partial(_ours, seq_idx=seq_idx), exact=False),
            Contender("kernel, AVX2", _ours, environment={"RECSYS_SSM_MAX_ISA": "avx2"}),
            Contender("plain PyTorch", _plain),
            Contender("Conv1d", _conv1d),
            Contender("Conv1d, (B, E, L)", _conv1d_its_own_layout, prepare=_transposed),
        ],
        reference=_plain,
        # x read and y written; then x and dy read and dx written.
        floor=lambda floors: 5 * 4 * elements / floors.bandwidth,
    )


def _tensors(shape: Shape) -> dict[str, Tensor]:
    batch, length, channels, width = shape
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, length, channels, generator=g),
        "weight": torch.randn(channels, width, generator=g),
        "bias": torch.randn(channels, generator=g),
    }


def _transposed(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return x | {"x": x["x"].transpose(1, 2).contiguous()}


def _ours(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    y = causal_conv1d(x, weight, bias, seq_idx=seq_idx)
    assert isinstance(y, Tensor)
    return y


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _reference(x, weight, bias, None, None, None, 0)


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _conv1d_its_own_layout(x.transpose(1, 2), weight, bias).transpose(1, 2)


def _conv1d_its_own_layout(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run Conv1d without the transpositions that a Mamba block needs on both sides."""
    channels, width = weight.shape
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=width - 1, groups=channels)
    return y[..., : x.shape[-1]]
