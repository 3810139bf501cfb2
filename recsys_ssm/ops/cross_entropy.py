"""Compute the softmax loss over a whole catalogue without the matrix of its logits.

``loss = mean_p (logsumexp_i x_p·w_i − x_p·w_target(p))``. The (P, I) logits of a batch are by far the largest tensor of
next-item training (4,096 positions over a million items: 16 GB). Here they exist for a few positions at a time, and the
forward pass computes the gradients from them. With p_i = softmax,

    dx_p = Σ_i p_i w_i − w_target,        dw_i = Σ_p (p_i(p) − [i = target(p)]) x_p.

Fused linear cross-entropies introduced gradients in the forward pass (Liger Kernel, arXiv 2410.10989).

Legend: P positions, I items, D = d_model, C positions of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_ssm.errors import UserError

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
        UserError: Shapes do not fit together, or ``chunk`` is below 1.
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
    if chunk is None:
        elements = _CHUNK_ELEMENTS.get(x.device.type, _CHUNK_ELEMENTS["cuda"])
        rows = _LEAST_ROWS if matmul in (None, torch.float32) else 2 * _LEAST_ROWS
        chunk = max(rows, elements // weight.shape[0])
    if chunk < 1:
        raise UserError(f"chunk={chunk}: below 1; pass at least one position")
    return _LinearCrossEntropy.apply(x, weight, target, chunk, matmul or weight.dtype)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return True if a device has instructions for products in bfloat16. Without them float32 is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # These functions are private to PyTorch. If they disappear, float32 is used.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        weight_ID: Tensor,
        target_P: Tensor,
        chunk: int,
        matmul: torch.dtype,
    ) -> Tensor:
        n_positions = x_PD.shape[0]
        wide = torch.promote_types(x_PD.dtype, torch.float32)
        want_x, want_weight = ctx.needs_input_grad[:2]
        dx_PD = torch.empty_like(x_PD) if want_x else None
        dw_ID = torch.zeros_like(weight_ID, dtype=wide) if want_weight else None
        loss = x_PD.new_zeros((), dtype=wide)
        factor_ID = weight_ID.to(matmul)
        buffer_CI = factor_ID.new_empty(min(chunk, n_positions), weight_ID.shape[0])
        for start in range(0, n_positions, chunk):
            x_CD, target_C1 = x_PD[start : start + chunk], target_P[start : start + chunk, None]
            logits_CI = torch.mm(x_CD.to(matmul), factor_ID.T, out=buffer_CI[: x_CD.shape[0]]).to(
                wide
            )
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
        ctx.save_for_backward(dx_PD, None if dw_ID is None else dw_ID.to(weight_ID.dtype))
        return loss / max(n_positions, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        dx_PD, dw_ID = ctx.saved_tensors
        return (
            None if dx_PD is None else dx_PD * grad,
            None if dw_ID is None else dw_ID * grad,
            None,
            None,
            None,
        )
