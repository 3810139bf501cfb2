"""Which path an operator takes: one rule for all, and a table that says what it chose and why.

A CUDA tensor goes to the public CUDA kernel where its package is installed; float32 and bfloat16 on
CPU go to the compiled kernel where there is one; everything else runs on plain PyTorch.

Environment, read when the library is first wanted:
    RECSYS_SSM_NO_KERNELS=1        plain PyTorch instead of the compiled kernels
    RECSYS_SSM_MAX_ISA=avx2        at most this instruction set (baseline, avx2, avx512)
    RECSYS_SSM_LIBRARY=path        load this library instead of the installed one
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys_ssm.errors import UserError

__all__ = ["Operator", "backends", "describe_backends", "kernel_library"]

_ISA_ORDER = ("baseline", "avx2", "avx512")  # as recsys_isa() in csrc/runtime.cpp counts them
_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16})
_STATUS = {1: "arguments it does not understand (rebuild the kernels)", 2: "no memory left"}


@dataclass(frozen=True)
class KernelLibrary:
    """The compiled kernels, or why there are none."""

    handle: ctypes.CDLL | None
    isa: str
    reason: str

    def function(self, name: str) -> Callable[[Any], None] | None:
        """The C function ``name`` of the best instruction set.

        It takes its arguments as one ctypes structure, or the address of one.  Returns None where
        the library is missing or has no such function.
        """
        if self.handle is None:
            return None
        try:
            entry = getattr(self.handle, f"{name}_{self.isa}")
        except AttributeError:
            return None
        entry.argtypes = [ctypes.c_void_p]
        entry.restype = ctypes.c_int

        def call(arguments: ctypes.Structure | int) -> None:
            at = arguments if isinstance(arguments, int) else ctypes.addressof(arguments)
            status = entry(at)
            if status:
                raise RuntimeError(f"{name}: {_STATUS.get(status, f'status {status}')}")

        return call


@functools.lru_cache(maxsize=1)
def kernel_library() -> KernelLibrary:
    """Load the compiled kernels once.

    Raises:
        UserError: RECSYS_SSM_MAX_ISA is not an instruction set.
    """
    # Imported here, or `python -m recsys_ssm.ops.build` would find itself imported already.
    from recsys_ssm.ops.build import ABI, library_path

    if os.environ.get("RECSYS_SSM_NO_KERNELS", "0") not in {"", "0"}:
        return KernelLibrary(None, "", "RECSYS_SSM_NO_KERNELS is set")
    limit = os.environ.get("RECSYS_SSM_MAX_ISA", _ISA_ORDER[-1])
    if limit not in _ISA_ORDER:
        raise UserError(f"RECSYS_SSM_MAX_ISA={limit}: must be one of {', '.join(_ISA_ORDER)}")
    chosen = os.environ.get("RECSYS_SSM_LIBRARY")
    path = Path(chosen) if chosen else _installed(library_path())
    if not path.exists():
        return KernelLibrary(
            None,
            "",
            f"no compiled library at {path}; with a C++ compiler installed, "
            "`python -m recsys_ssm.ops.build` makes it",
        )
    try:
        handle = ctypes.CDLL(str(path))
        abi = handle.recsys_abi()
    except (OSError, AttributeError) as error:
        return KernelLibrary(None, "", f"the compiled library does not load: {error}")
    if abi != ABI:
        return KernelLibrary(
            None,
            "",
            "the compiled library was built from other sources; run `python -m recsys_ssm.ops.build`",
        )
    _share_openmp_threads(handle)
    isa = _ISA_ORDER[min(handle.recsys_isa(), _ISA_ORDER.index(limit))]
    return KernelLibrary(handle, isa, "")


def _installed(beside: Path) -> Path:
    """The library beside these sources, or where there is none, that of an install of the package.

    After ``pip install .``, ``python -m`` in the checkout imports the sources there, while the library is where pip
    put it.  One of another version is told by its fingerprint.
    """
    if beside.exists():
        return beside
    elsewhere = (Path(folder, "recsys_ssm", "ops", beside.name) for folder in sys.path)
    return next((path for path in elsewhere if path.is_file()), beside)


def _share_openmp_threads(handle: ctypes.CDLL) -> None:
    """Let the kernels run on PyTorch's own threads where these are libgomp's (Linux builds)."""
    if "OpenMP" not in torch.__config__.parallel_info() or os.name != "posix":
        return
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if entry is not None:
        handle.recsys_use_gomp(ctypes.cast(entry, ctypes.c_void_p))


class Operator:
    """An operator's entry in the table of backends, and its part of the dispatch rule.

    Args:
        name: the operator's public name.
        kernels: names of the C functions it needs; all must be there for the kernel to be used.
        cuda: "module:function" of the public CUDA implementation; empty where plain PyTorch is all there is.
    """

    registered: dict[str, Operator] = {}  # noqa: RUF012 - filled below, one entry an operator

    def __init__(self, name: str, kernels: Iterable[str], cuda: str = "") -> None:
        self.name = name
        self.kernels = tuple(kernels)
        self.cuda = cuda
        self.registered[name] = self

    @functools.cached_property
    def functions(self) -> tuple[Callable[[Any], None], ...] | None:
        """The C functions in the order of ``kernels``, or None where one is missing."""
        found = tuple(kernel_library().function(name) for name in self.kernels)
        return None if None in found else found  # type: ignore[return-value]

    def takes(self, *tensors: Tensor) -> bool:
        """Whether the CPU kernel serves a call with these (all its floating-point inputs)."""
        if self.functions is None:
            return False
        for x in tensors:  # noqa: SIM110 - this loop runs in every call; all(...) takes twice as long
            if not x.is_cpu or x.dtype not in _KERNEL_DTYPES:
                return False
        return True

    @functools.cached_property
    def cuda_function(self) -> Callable[..., Any] | None:
        """The public CUDA implementation, or None where its package cannot be imported."""
        module, _, function = self.cuda.partition(":")
        if not module:
            return None
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, RuntimeError):  # built for another torch: RuntimeError
            return None

    def forget(self) -> None:
        """Look for the kernels anew at the next call (tests change the environment)."""
        self.__dict__.pop("functions", None)
        self.__dict__.pop("cuda_function", None)

    def row(self) -> dict[str, str]:
        library = kernel_library()
        if self.functions is not None:
            cpu, why = f"C++ kernel ({library.isa})", "float64 and float16 run on plain PyTorch"
        else:
            cpu = "plain PyTorch"
            why = library.reason or (
                f"the compiled library lacks {', '.join(self.kernels)}; run "
                "`python -m recsys_ssm.ops.build`"
            )
        package = self.cuda.partition(".")[0]
        if not torch.cuda.is_available():
            cuda, cuda_why = "none", "PyTorch sees no CUDA device"
        elif not self.cuda:
            cuda, cuda_why = "plain PyTorch", "there is no other"
        elif self.cuda_function is None:
            cuda = "plain PyTorch"
            cuda_why = f"{package} is not installed (pip install 'recsys-ssm[cuda]')"
        else:
            cuda, cuda_why = package, "packed sequences and initial states run on plain PyTorch"
        return {"cpu": cpu, "cpu_why": why, "cuda": cuda, "cuda_why": cuda_why}


def backends() -> dict[str, dict[str, str]]:
    """Which implementation each operator uses on ``cpu`` and ``cuda``, and why not a faster one.

    Returns:
        ``{"selective_scan": {"cpu": ..., "cpu_why": ..., "cuda": ..., "cuda_why": ...}, ...}``
    """
    return {name: operator.row() for name, operator in sorted(Operator.registered.items())}


def describe_backends() -> str:
    """:func:`backends` in one line, for a run's log."""
    rows = backends()
    parts = []
    for device in ("cpu", "cuda"):
        groups: dict[tuple[str, str], list[str]] = {}
        for name, row in rows.items():
            groups.setdefault((row[device], row[f"{device}_why"]), []).append(name)
        for (backend, why), names in groups.items():
            reason = f" ({why})" if why else ""
            parts.append(f"{', '.join(names)} on {device}: {backend}{reason}")
    return "; ".join(parts)
