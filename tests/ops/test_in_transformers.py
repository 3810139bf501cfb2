"""transformers' Mamba and Mamba-2 with our operators: the same logits, gradients and texts, and nothing left behind."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra text is not installed")

import transformers
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from recsys_ssm import UserError, ops
from recsys_ssm.ops import in_transformers

MODULES = {"mamba": modeling_mamba, "mamba2": modeling_mamba2}
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 5, "conv_kernel": 3},
    "mamba2": {"num_heads": 6, "head_dim": 8, "n_groups": 2, "state_size": 7, "chunk_size": 16},
}
KINDS = list(SIZES)


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    yield
    ops.undo_in_transformers()


def model_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, **SIZES[kind], **options}
    names = {"mamba": ("MambaConfig", "MambaForCausalLM"),
             "mamba2": ("Mamba2Config", "Mamba2ForCausalLM")}[kind]  # fmt: skip
    config, model = (getattr(transformers, name) for name in names)
    return model(config(**size)).eval()


def gradients(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Count the calls of one of our operators."""
    found: list[int] = []
    real = getattr(in_transformers, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(in_transformers, name, counted)
    return found


def masked() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens of three rows, with padding at both sides of one and before another, and their mask."""
    ids = torch.randint(40, (3, 37), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :3] = mask[1, -4:] = 0
    return ids, mask


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_slow_path(kind: str, with_mask: bool) -> None:
    model = model_of(kind)
    ids, mask = masked()
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if with_mask:
        given["attention_mask"] = mask
    slow = model(**given).logits
    exact = copy.deepcopy(model).double()
    reference = gradients(exact, **given, labels=ids)
    model.train()
    ops.use_in_transformers()
    ours = model(**given).logits
    assert (ours - slow).abs().max() < 1e-5 * slow.abs().max()
    for name, found in gradients(model, **given, labels=ids).items():
        wanted = reference[name]
        error = (found - wanted).norm() / wanted.norm()
        assert error < 1e-5, (name, error)
    with torch.no_grad():
        assert (exact(**given).logits - slow).abs().max() < 1e-5 * slow.abs().max()


@pytest.mark.parametrize(
    ("kind", "operators"),
    [
        ("mamba", ["causal_conv1d", "selective_scan", "causal_conv1d_step", "selective_scan_step"]),
        ("mamba2", ["causal_conv1d", "ssd", "causal_conv1d_step", "ssd_step"]),
    ],
)
def test_texts_are_those_of_the_slow_path(
    kind: str, operators: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    ids, _ = masked()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # a prompt that is shorter than the others
    how = {"max_new_tokens": 9, "do_sample": False, "attention_mask": mask, "pad_token_id": 0,
           "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    slow = model.generate(ids, **how)
    counts = {name: calls(monkeypatch, name) for name in operators}
    with ops.transformers_kernels():
        ours = model.generate(ids, **how)
    assert all(counts.values()), counts
    assert ours.sequences.equal(slow.sequences)
    for one, other in zip(ours.logits, slow.logits, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_on(kind: str) -> None:
    model = model_of(kind)
    ids, _ = masked()

    def in_parts() -> list[torch.Tensor]:
        first = model(ids[:, :20], use_cache=True)
        second = model(ids[:, 20:21], cache=first.cache, use_cache=True)
        return [first.logits, second.logits]

    with torch.no_grad():
        slow = in_parts()
        whole = model(ids[:, :21], use_cache=False).logits
        with ops.transformers_kernels():
            ours = in_parts()
    for one, other in zip(ours, slow, strict=True):
        assert (one - other).abs().max() < 1e-5
    assert (torch.cat(ours, 1) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("limit", [(0.0, 0.002), (0.3, float("inf"))])
def test_limits_of_the_step_sizes(limit: tuple[float, float]) -> None:
    model = model_of("mamba2", time_step_limit=limit)
    ids, _ = masked()
    slow = model(ids).logits
    free = model_of("mamba2")(ids).logits
    assert (slow - free).abs().max() > 1e-3, "the limit changes nothing, so this tests nothing"
    with ops.transformers_kernels():
        assert (model(ids).logits - slow).abs().max() < 1e-5 * slow.abs().max()


def test_packed_texts_do_not_see_each_other() -> None:
    model = model_of("mamba2")
    ids, _ = masked()
    row, numbers = ids.view(1, -1), torch.arange(3).repeat_interleave(37)[None]
    with torch.no_grad(), ops.transformers_kernels():
        layer = model.backbone.layers[0]
        x = model.backbone.embeddings(row)
        packed = layer(x, seq_idx=numbers.int()).view(3, 37, -1)
        assert (packed - layer(x.view(3, 37, -1))).abs().max() < 1e-5
        assert (packed - layer(x).view(3, 37, -1)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_another_activation_is_computed_by_transformers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind, hidden_act="gelu")
    ids, _ = masked()
    slow = model(ids).logits
    used = calls(monkeypatch, "causal_conv1d")
    with ops.transformers_kernels():
        assert (model(ids).logits - slow).abs().max() < 1e-5 * slow.abs().max()
    assert not used


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str) -> None:
    model = model_of(kind).bfloat16()
    ids, _ = masked()
    exact = copy.deepcopy(model).double()(ids).logits
    slow = (model(ids).logits - exact).norm()
    with ops.transformers_kernels():
        ours = (model(ids).logits - exact).norm()
    assert ours < 1.5 * slow


def everything() -> dict[str, Any]:
    """Return what could be replaced."""
    found = {
        f"{kind}.{name}": value
        for kind, module in MODULES.items()
        for name, value in vars(module).items()
        if callable(value)
    }
    classes = (modeling_mamba.MambaMixer, modeling_mamba2.Mamba2Mixer)
    return found | {kind.__name__: dict(vars(kind)) for kind in classes}


def test_undo_leaves_nothing_behind() -> None:
    before = everything()
    ops.undo_in_transformers()  # without a use before
    assert everything() == before
    ops.use_in_transformers()
    ops.use_in_transformers()
    assert everything() != before
    ops.undo_in_transformers()
    assert everything() == before


def test_blocks_nest_and_end_with_an_error_as_well() -> None:
    before = everything()

    def fails() -> None:
        with ops.transformers_kernels():
            with ops.transformers_kernels():
                pass
            assert everything() != before, "the inner block must not undo the outer one"
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fails()
    assert everything() == before
    ops.use_in_transformers()
    with ops.transformers_kernels():
        pass
    assert everything() != before, "a block must not undo a call before it"


def without_scan(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delattr(modeling_mamba, "mamba_selective_scan")
    return "modeling_mamba has no function mamba_selective_scan"


def with_other_arguments(monkeypatch: pytest.MonkeyPatch) -> str:
    def mamba2_chunk_scan(hidden_states: Any, dt: Any, A: Any) -> None: ...

    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", mamba2_chunk_scan)
    return "mamba2_chunk_scan does not take B, C, chunk_size"


def not_installed(monkeypatch: pytest.MonkeyPatch) -> str:
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    return r"recsys-ssm\[text\]"


@pytest.mark.parametrize("fault", [without_scan, with_other_arguments, not_installed])
def test_a_version_that_does_not_fit_is_one_line_and_changes_nothing(
    fault: Callable[[pytest.MonkeyPatch], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = fault(monkeypatch)
    before = everything()
    with pytest.raises(UserError, match=message) as caught:
        ops.use_in_transformers()
    assert "\n" not in str(caught.value)
    assert everything() == before


WIDE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16, "conv_kernel": 4},
    "mamba2": {"num_heads": 24, "head_dim": 64, "n_groups": 1, "state_size": 128, "chunk_size": 256},
}  # fmt: skip
"""Sizes at d_model 768."""


def wide_model_of(kind: str) -> Any:
    return model_of(kind, hidden_size=768, num_hidden_layers=4, vocab_size=512, **WIDE[kind])


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().mean().sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_four_wide_layers_are_as_near_float64_as_those_of_the_slow_path(
    kind: str,
) -> None:
    """Rounding alone moves logits of about 12 by 2e-4 to 5e-4, so both paths are compared with float64."""
    model = wide_model_of(kind)
    ids = torch.randint(512, (1, 512))
    with torch.no_grad():
        slow = model(ids, use_cache=False).logits
        exact = copy.deepcopy(model).double()(ids, use_cache=False).logits
        with ops.transformers_kernels():
            ours = model(ids, use_cache=False).logits
    assert (ours - slow).abs().max() < 1e-4 * slow.abs().max()
    assert root_mean_square(ours - exact) < 1e-4
    # Two orders of the same sums differ by some percent in their errors.
    assert root_mean_square(ours - exact) < 1.1 * root_mean_square(slow - exact)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_four_wide_layers_are_those_of_the_slow_path(kind: str) -> None:
    model = wide_model_of(kind).train()
    ids = torch.randint(512, (1, 96))
    wanted = gradients(model, input_ids=ids, labels=ids)
    with ops.transformers_kernels():
        found = gradients(model, input_ids=ids, labels=ids)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() < 1e-3 * wanted[name].norm(), name
