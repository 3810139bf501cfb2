"""Fixtures of the operators' tests: list the available kernels, and select one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from recsys_ssm.ops._dispatch import Operator, kernel_library

ISAS = ("baseline", "avx2", "avx512")


def available_isas() -> list[str]:
    """Return the library's instruction sets that this processor runs, or "plain" without a library."""
    library = kernel_library()
    return list(ISAS[: ISAS.index(library.isa) + 1]) if library.handle else ["plain"]


def forget() -> None:
    kernel_library.cache_clear()
    for operator in Operator.registered.values():
        operator.forget()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Set environment variables and look for kernels again: ``use(RECSYS_SSM_MAX_ISA="avx2")``."""

    def set_environment(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        forget()

    yield set_environment
    monkeypatch.undo()
    forget()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def kernel() -> None:
    if kernel_library().handle is None:
        pytest.skip(f"no compiled kernels: {kernel_library().reason}")
