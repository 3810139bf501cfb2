"""Check the chunked softmax loss against the plain one."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from recsys_ssm.errors import UserError
from recsys_ssm.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def inputs(P: int, I: int, D: int, dtype=torch.float64, seed: int = 0):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(P, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(I, D, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, I, (P,), generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), target


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
@pytest.mark.parametrize(("P", "I", "D"), [(1, 1, 1), (7, 5, 3), (64, 33, 8), (65, 200, 16)])
def test_loss_and_gradients_are_the_plain_ones(P: int, I: int, D: int, chunk: int | None) -> None:  # noqa: E741
    x, weight, target = inputs(P, I, D)
    loss = linear_cross_entropy(x, weight, target, chunk=chunk)
    found = torch.autograd.grad(3 * loss, (x, weight))
    reference = linear_cross_entropy_reference(x, weight, target)
    expected = torch.autograd.grad(3 * reference, (x, weight))
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(found, expected)


def test_gradcheck() -> None:
    x, weight, target = inputs(5, 7, 3)
    assert torch.autograd.gradcheck(
        lambda x, weight: linear_cross_entropy(x, weight, target, chunk=2), (x, weight)
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_is_near_float64(dtype: torch.dtype, bound: float) -> None:
    x, weight, target = inputs(300, 1000, 32, dtype)
    loss = linear_cross_entropy(x, weight, target)
    assert loss.dtype == torch.float32
    found = (loss, *torch.autograd.grad(loss, (x, weight)))
    assert found[1].dtype == dtype and found[2].dtype == dtype
    wide = (x.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    reference = linear_cross_entropy_reference(*wide, target)
    for ours, theirs in zip(found, (reference, *torch.autograd.grad(reference, wide)), strict=True):
        assert (ours.double() - theirs).abs().max() <= bound * theirs.abs().max()


def test_products_in_bfloat16_leave_the_sums_in_float32() -> None:
    x, weight, target = inputs(300, 1000, 32, torch.float32)
    loss = linear_cross_entropy(x / 6, weight, target, matmul=torch.bfloat16)
    found = (loss, *torch.autograd.grad(loss, (x, weight)))
    reference = linear_cross_entropy_reference(x / 6, weight, target)
    expected = (reference, *torch.autograd.grad(reference, (x, weight)))
    assert abs(found[0] - expected[0]) < 1e-3
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.dtype == torch.float32
        assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 1e-2  # it did use bfloat16


def test_logits_may_be_huge() -> None:
    x, weight, target = inputs(4, 10, 3, torch.float32)
    loss = linear_cross_entropy(x * 1e4, weight, target)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, weight)[0]).all()


def test_only_the_gradients_wanted_are_made() -> None:
    x, weight, target = inputs(9, 11, 4)
    loss = linear_cross_entropy(x.detach(), weight, target)
    (found,) = torch.autograd.grad(loss, weight)
    (expected,) = torch.autograd.grad(
        linear_cross_entropy_reference(x.detach(), weight, target), weight
    )
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, target), loss.detach())


def test_of_no_position_it_is_zero_and_so_are_the_gradients() -> None:
    x, weight, target = inputs(0, 11, 4)
    loss = linear_cross_entropy(x, weight, target)
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 4) and weight.grad.eq(0).all()


def test_shapes_are_checked() -> None:
    x, weight, target = inputs(4, 10, 3)
    with pytest.raises(UserError, match=r"got \(4, 3\), \(10, 3\), \(3,\)"):
        linear_cross_entropy(x, weight, target[:3])
    with pytest.raises(UserError, match="chunk=0"):
        linear_cross_entropy(x, weight, target, chunk=0)


def test_a_million_items_fit_into_two_gibibytes() -> None:
    """Use 4,096 positions: all logits would take 16 GB, the weights and their gradient take 2 × 256 MB."""
    script = """
import resource, torch
from recsys_ssm.ops.cross_entropy import linear_cross_entropy
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
weight = torch.full((1_000_000, 64), 0.01).requires_grad_()
x = torch.randn(192, 64).requires_grad_()
target = torch.arange(192)
linear_cross_entropy(x[:1].detach(), weight[:10].detach(), target[:1])
before = peak()
linear_cross_entropy(x, weight, target).backward()
print((peak() - before) / 2**30)
"""
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    # The weights' gradient is .24 of it; positions come in chunks, so more of them take no more.
    assert float(done.stdout) < 1.0


@pytest.mark.parametrize("matmul", [torch.float32, torch.bfloat16])
def test_opcheck(matmul: torch.dtype) -> None:
    x, weight = torch.randn(7, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    arguments = (x, weight, torch.arange(7) % 5, 3, matmul, False, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(torch.ops.recsys_ssm.linear_cross_entropy.default, arguments)


def test_all_at_once_is_one_after_the_other() -> None:
    x, weight, target = torch.randn(3, 7, 4), torch.randn(3, 5, 4), torch.arange(21).view(3, 7) % 5
    x.requires_grad_()
    weight.requires_grad_()
    found = torch.vmap(linear_cross_entropy)(x, weight, target)
    each = torch.stack([linear_cross_entropy(*one) for one in zip(x, weight, target, strict=True)])
    torch.testing.assert_close(found, each)
    scale = torch.tensor([1.0, 2.0, 3.0])
    wanted = torch.autograd.grad((each * scale).sum(), (x, weight))
    torch.testing.assert_close(torch.autograd.grad((found * scale).sum(), (x, weight)), wanted)


def test_validation_computes_no_gradients() -> None:
    x, weight = torch.randn(7, 4), torch.randn(5, 4, requires_grad=True)
    with torch.no_grad(), torch.profiler.profile() as profile:
        linear_cross_entropy(x, weight, torch.arange(7) % 5)
    called = {event.key for event in profile.key_averages()}
    assert "aten::mm" in called and "aten::addmm_" not in called
