"""Compute the softmax loss over a whole catalogue without the matrix of its logits.

``loss = mean_p (logsumexp_i x_p·w_i − x_p·w_target(p))``. The (P, I) logits of a batch are by far the largest tensor of
next-item training (4,096 positions over a million items: 16 GB). Here they exist for a few positions at a time, and the
forward pass computes the gradients from them. With p_i = softmax,

    dx_p = Σ_i p_i w_i − w_target,        dw_i = Σ_p (p_i(p) − [i = target(p)]) x_p.

Fused linear cross-entropies introduced gradients in the forward pass (Liger Kernel, arXiv 2410.10989).

Legend: P positions, I items, D = d_model, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops._operators import (
    KernelFunction,
    empty_like,
    kernels_differentiate,
    register_operator,
)
from recsys_ssm.ops._vmap import each_call

_CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
"""Number of logits in memory at once: 2 MiB stay in a core's cache; a GPU needs more work at a time."""
_LEAST_ROWS = 64
"""Least positions of a chunk: each chunk reads and writes the whole of dw once, which is too much for fewer. Twice as
many if the products are twice as fast."""


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute :func:`linear_cross_entropy` from all logits at once."""
    return F.cross_entropy(x @ weight.T, target) if target.numel() else (x.sum() + weight.sum()) * 0


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    chunk: int | None = None,
    matmul: torch.dtype | None = None,
) -> Tensor:
    """Return the mean cross-entropy of ``softmax(x @ weight.T)``; the forward pass computes the gradients too.

    Args:
        x: (P, D).
        weight: (I, D).
        target: (P,) int64 in [0, I).
        chunk: Positions at a time; None chooses by device and catalogue.
        matmul: Dtype of the three matrix products; None for the dtype of ``weight``. bfloat16 is two to three times
            faster on processors that multiply it (AVX-512 BF16, AMX, GPUs). Softmax and sums stay in float32, and the
            error of the gradients is about 0.3 % of their size.

    Returns:
        Scalar in float32 or wider; 0 without positions.

    Raises:
        UserError: Shapes do not fit together, a dtype is wrong, or ``chunk`` is below 1.
    """
    if (
        x.dim() != 2
        or weight.dim() != 2
        or x.shape[1] != weight.shape[1]
        or target.shape != x.shape[:1]
    ):
        raise UserError(
            f"expected x (P, D), weight (I, D), target (P,), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(target.shape)}"
        )
    if not (x.is_floating_point() and weight.is_floating_point() and target.dtype == torch.int64):
        raise UserError(
            f"linear_cross_entropy: x is {x.dtype}, weight {weight.dtype}, target {target.dtype}; pass floating point "
            "x and weight, and int64 target"
        )
    if chunk is None:
        elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS["cuda"])
        rows = _LEAST_ROWS if matmul in (None, torch.float32) else 2 * _LEAST_ROWS
        chunk = max(rows, elements // max(weight.shape[0], 1))
    if chunk < 1:
        raise UserError(f"chunk={chunk}: below 1; pass at least one position")
    if not kernels_differentiate():
        return linear_cross_entropy_reference(x, weight, target)
    return torch.ops.recsys_ssm.linear_cross_entropy.default(
        x, weight, target, chunk, matmul or weight.dtype, False, False
    )[0]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return True if a device has instructions for products in bfloat16. Without them float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # These functions are private to PyTorch. If they disappear, float32 is used.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


_LIBRARY = torch.library.Library("recsys_ssm", "FRAGMENT")
# Returns the loss and the gradients that are wanted.
_LIBRARY.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, SymInt chunk, ScalarType matmul, bool want_x, "
    "bool want_weight) -> Tensor[]"
)
# Returns the gradients times the loss's. ``x`` and ``weight`` are passed because the gradients depend on them.
_LIBRARY.define(
    "linear_cross_entropy_backward(Tensor grad, Tensor? dx, Tensor? dweight, Tensor x, Tensor weight) -> Tensor[]"
)


def _fake(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    chunk: int,
    matmul: torch.dtype,
    want_x: bool,
    want_weight: bool,
) -> list[Tensor]:
    """Allocate the outputs of the forward operator."""
    loss = x.new_empty(x.shape[:-2], dtype=torch.promote_types(x.dtype, torch.float32))
    return [loss, *(empty_like(t) for t, want in ((x, want_x), (weight, want_weight)) if want)]


def _forward(*arguments: Any) -> list[Tensor]:
    outputs = _fake(*arguments)
    for found, one in each_call(2, 0, outputs, arguments):
        _forward_into(found, *one)
    return outputs


def _forward_into(
    outputs: Sequence[Tensor],
    x_PD: Tensor,
    weight_ID: Tensor,
    target_P: Tensor,
    chunk: int,
    matmul: torch.dtype,
    want_x: bool,
    want_weight: bool,
) -> None:
    n_positions = x_PD.shape[0]
    wide = torch.promote_types(x_PD.dtype, torch.float32)
    left = iter(outputs)
    loss_out = next(left)
    dx_PD = next(left) if want_x else None
    dweight_out = next(left) if want_weight else None
    dw_ID = torch.zeros_like(weight_ID, dtype=wide) if want_weight else None
    loss = x_PD.new_zeros((), dtype=wide)
    factor_ID = weight_ID.to(matmul)
    buffer_CI = factor_ID.new_empty(min(chunk, n_positions), weight_ID.shape[0])
    for start in range(0, n_positions, chunk):
        x_CD, target_C1 = x_PD[start : start + chunk], target_P[start : start + chunk, None]
        logits_CI = torch.mm(x_CD.to(matmul), factor_ID.T, out=buffer_CI[: x_CD.shape[0]]).to(wide)
        top_C1 = logits_CI.amax(1, keepdim=True)
        own_C1 = logits_CI.gather(1, target_C1)
        weights_CI = logits_CI.sub_(top_C1).exp_()  # softmax before the division by its sum
        sum_C1 = weights_CI.sum(1, keepdim=True)
        loss += (sum_C1.log() + top_C1 - own_C1).sum()
        if not (want_x or want_weight):
            continue
        # Dividing x and the result by the sum takes D divisions for each position; dividing the weights takes I.
        own_weight_C1 = weights_CI.gather(1, target_C1) - sum_C1
        weights_CI.scatter_(1, target_C1, own_weight_C1)
        factor_CI, scale_C1 = weights_CI.to(matmul), sum_C1 * n_positions
        if dx_PD is not None:
            dx_PD[start : start + chunk] = torch.mm(factor_CI, factor_ID) / scale_C1
        if dw_ID is not None:
            scaled_CD = (x_CD / scale_C1).to(matmul)
            if matmul == wide:
                dw_ID.addmm_(factor_CI.T, scaled_CD)
            else:
                dw_ID += torch.mm(factor_CI.T, scaled_CD)
    loss_out.copy_(loss / max(n_positions, 1))
    if dweight_out is not None and dw_ID is not None:
        dweight_out.copy_(dw_ID)


def _backward(
    grad: Tensor, dx: Tensor | None, dweight: Tensor | None, x: Tensor, weight: Tensor
) -> list[Tensor]:
    scale = grad[..., None, None]
    return [(t * scale).to(t.dtype) for t in (dx, dweight) if t is not None]


def _backward_fake(
    grad: Tensor, dx: Tensor | None, dweight: Tensor | None, x: Tensor, weight: Tensor
) -> list[Tensor]:
    return [empty_like(t) for t in (dx, dweight) if t is not None]


class _LinearCrossEntropy(KernelFunction):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            loss, *found = torch.ops.recsys_ssm.linear_cross_entropy.default(*arguments)
        x, weight, _, _, _, want_x, want_weight = arguments
        left = iter(found)
        dx, dweight = (next(left) if want else None for want in (want_x, want_weight))
        ctx.save_for_backward(dx, dweight, x, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, x, weight = ctx.saved_tensors
        found = torch.ops.recsys_ssm.linear_cross_entropy_backward.default(
            grad, dx, dweight, x, weight
        )
        left = iter(found)
        return (
            *(None if t is None else next(left) for t in (dx, dweight)),
            None,
            None,
            None,
            None,
            None,
        )


def _differentiable(*arguments: Any) -> list[Tensor]:
    x, weight, target, chunk, matmul, *_ = arguments
    wanted = x.requires_grad, weight.requires_grad
    return [_LinearCrossEntropy.apply(x, weight, target, chunk, matmul, *wanted)]


register_operator(
    "linear_cross_entropy",
    _LIBRARY,
    forward=_forward,
    backward=_backward,
    forward_fake=_fake,
    backward_fake=_backward_fake,
    differentiable=_differentiable,
    device="CompositeExplicitAutograd",
    remedy="call linear_cross_entropy_reference",
)
