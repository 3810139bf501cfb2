"""Choose between several implementations of an operator on a GPU: fixed by the user, or measured.

Measured choices are kept for the process, one for each operator, device, dtype and class of shapes. Shapes are of one
class if each dimension rounds up to the same power of two.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recsys_ssm.errors import UserError

__all__ = ["BACKENDS", "backend", "choose", "forget_choices", "interpreting", "set_backend"]

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "mamba_ssm", "reference")
"""Values of the option ``ops.backend``."""

_REPETITIONS = 5
_state = {"backend": "auto"}
_chosen: dict[tuple[Any, ...], str] = {}


def set_backend(name: str) -> None:
    """Fix the implementation of the operators on a GPU, for this process.

    Args:
        name: ``"triton"`` for this package's Triton kernels, ``"mamba_ssm"`` for those of the packages mamba-ssm and
            causal-conv1d, ``"reference"`` for plain PyTorch, also on the CPU. ``"auto"`` measures the kernels that are
            there on the first call of a shape, forward and backward, and keeps the fastest. While
            ``torch.use_deterministic_algorithms`` is on (``trainer.deterministic``), ``"auto"`` leaves out the public
            packages, whose gradients are added with atomics. A call that the named kernels do not serve runs on plain
            PyTorch.

    Raises:
        UserError: The name is not one of these.
    """
    if name not in BACKENDS:
        raise UserError(f"ops.backend={name}: must be one of {', '.join(BACKENDS)}")
    _state["backend"] = name


def backend() -> str:
    """Return the name given to :func:`set_backend`."""
    return _state["backend"]


def forget_choices() -> None:
    """Measure again at the next call."""
    _chosen.clear()


def interpreting() -> bool:
    """Return True if Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(
    operator: str, candidates: Sequence[str], run: Callable[[str, Mapping[str, Any]], Any],
    arguments: Mapping[str, Any],
) -> str:  # fmt: skip
    """Return the fastest candidate for these arguments; the first one where nothing can be measured.

    Args:
        operator: The operator's name.
        candidates: Names of implementations that serve the call; at least one.
        run: ``run(name, arguments)`` calls one and returns its output.
        arguments: The call's arguments by name.
    """
    if len(candidates) == 1 or torch.compiler.is_compiling():
        return candidates[0]
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    key = (operator, tuple(candidates), *(_class_of(x) for x in tensors))
    if key not in _chosen:
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return candidates[0]  # a graph takes no measurement
        _chosen[key] = _measure(operator, candidates, run, arguments, tensors[0])
    return _chosen[key]


def _class_of(x: Tensor) -> tuple[Any, ...]:
    sizes = tuple((n - 1).bit_length() if n > 0 else -1 for n in x.shape)
    return x.device, x.dtype, x.requires_grad and torch.is_grad_enabled(), sizes


def _measure(
    operator: str, candidates: Sequence[str], run: Callable[[str, Mapping[str, Any]], Any],
    arguments: Mapping[str, Any], first: Tensor,
) -> str:  # fmt: skip
    backward = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in arguments.values()
    )
    times = {name: _seconds(name, run, arguments, first, backward) for name in candidates}
    fastest = min(times, key=times.__getitem__)
    log.info(
        "%s at %s in %s: %s; using %s",
        operator, tuple(first.shape), str(first.dtype).removeprefix("torch."),
        ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in times.items()), fastest,
    )  # fmt: skip
    return fastest


def _seconds(
    name: str, run: Callable[[str, Mapping[str, Any]], Any], arguments: Mapping[str, Any],
    first: Tensor, backward: bool,
) -> float:  # fmt: skip
    """Return the median time of a candidate's forward pass, with the backward pass if ``backward``."""
    given = {
        key: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for key, x in arguments.items()
    }
    leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]

    def call() -> None:
        found = run(name, given)
        outputs = [found] if isinstance(found, Tensor) else [x for x in found if x is not None]
        if backward:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs],
                                allow_unused=True)  # fmt: skip

    try:
        call()  # compiles
        times = [_time(call, first) for _ in range(_REPETITIONS)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        log.warning("%s does not run (%s); leaving it out", name, str(error).splitlines()[0])
        return float("inf")
    return statistics.median(times)


def _time(call: Callable[[], None], on: Tensor) -> float:
    import time

    if not on.is_cuda:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
