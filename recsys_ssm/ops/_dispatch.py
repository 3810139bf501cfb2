"""Choose the implementation of each operator call, and report the choice and its reason.

A CUDA tensor goes to this package's Triton kernel or to the public CUDA kernel, as :func:`set_backend` says. float32
and bfloat16 tensors on the CPU go to the compiled kernel when the library is there. Everything else runs on plain
PyTorch.

Environment variables, read when the library is first needed:
    RECSYS_SSM_NO_KERNELS=1        use plain PyTorch instead of the compiled kernels
    RECSYS_SSM_MAX_ISA=avx2        use at most this instruction set (baseline, avx2, avx512)
    RECSYS_SSM_LIBRARY=path        load this library instead of the installed one
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recsys_ssm.errors import UserError
from recsys_ssm.ops._choice import backend, interpreting

__all__ = [
    "Operator",
    "backends",
    "describe_backends",
    "exporting",
    "is_exporting",
    "kernel_library",
]

REBUILD = "install recsys-ssm again with a C++ compiler (in a checkout: pip install -e .)"
"""Remedy for a library that is missing or old."""

SOURCES = Path(__file__).parent / "csrc"
_ISA_ORDER = ("baseline", "avx2", "avx512")  # as recsys_isa() in csrc/runtime.cpp counts them
_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16})
_GPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_STATUS = {1: f"the library does not understand its arguments; {REBUILD}", 2: "not enough memory"}


_EXPORTING: contextvars.ContextVar[bool] = contextvars.ContextVar("exporting", default=False)


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """Run operators on standard operators of PyTorch alone, for tensors of any batch size and length.

    A graph that is traced meanwhile runs where neither the kernels nor this package are. Loops over positions are
    ``scan`` operators in it. Rows hold one sequence each, with padding at the end.
    """
    token = _EXPORTING.set(True)
    try:
        yield
    finally:
        _EXPORTING.reset(token)


@torch.compiler.assume_constant_result  # torch.compile cannot trace a ContextVar
def is_exporting() -> bool:
    """Return True within :func:`exporting`."""
    return _EXPORTING.get()


@dataclass(frozen=True)
class KernelLibrary:
    """The compiled kernels, or the reason why they cannot be used."""

    handle: ctypes.CDLL | None
    isa: str
    reason: str

    def function(self, name: str) -> Callable[[Any], None] | None:
        """Return the C function ``name`` of the best instruction set, or None if it is missing.

        The function takes one ctypes structure with its arguments, or the address of one.
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


def library_path() -> Path:
    """Return the path of the compiled library beside this file."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return Path(__file__).with_name(f"_kernels{suffix}")


def source_hash() -> int:
    """Hash the kernels' sources to 31 bits, as CMakeLists.txt does.

    The build compiles the hash into the library. A library from other sources (an update without a build) would be
    called with arguments that it does not understand.
    """
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*")):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return int.from_bytes(digest.digest()[:4], "little") >> 1


@functools.lru_cache(maxsize=1)
def kernel_library() -> KernelLibrary:
    """Load the compiled kernels once.

    Raises:
        UserError: RECSYS_SSM_MAX_ISA is not an instruction set.
    """
    if os.environ.get("RECSYS_SSM_NO_KERNELS", "0") not in {"", "0"}:
        return KernelLibrary(None, "", "RECSYS_SSM_NO_KERNELS is set")
    limit = os.environ.get("RECSYS_SSM_MAX_ISA", _ISA_ORDER[-1])
    if limit not in _ISA_ORDER:
        raise UserError(f"RECSYS_SSM_MAX_ISA={limit}: must be one of {', '.join(_ISA_ORDER)}")
    chosen = os.environ.get("RECSYS_SSM_LIBRARY")
    path = Path(chosen) if chosen else _installed(library_path())
    if not path.exists():
        return KernelLibrary(None, "", f"there is no compiled library at {path}; {REBUILD}")
    try:
        handle = ctypes.CDLL(str(path))
        abi = handle.recsys_abi()
    except (OSError, AttributeError) as error:
        return KernelLibrary(None, "", f"the compiled library does not load ({error}); {REBUILD}")
    if abi != source_hash():
        return KernelLibrary(
            None, "", f"the compiled library was built from other sources; {REBUILD}"
        )
    _share_openmp_threads(handle)
    isa = _ISA_ORDER[min(handle.recsys_isa(), _ISA_ORDER.index(limit))]
    return KernelLibrary(handle, isa, "")


def _installed(beside: Path) -> Path:
    """Return the library beside these sources, or else the library of an installed package.

    After ``pip install .``, ``python -m`` in the checkout imports the sources there, and pip has put the library into
    site-packages. The hash tells a library of another version.
    """
    if beside.exists():
        return beside
    elsewhere = (Path(folder, "recsys_ssm", "ops", beside.name) for folder in sys.path)
    return next((path for path in elsewhere if path.is_file()), beside)


def _share_openmp_threads(handle: ctypes.CDLL) -> None:
    """Run the kernels on PyTorch's own threads if these belong to libgomp (Linux builds)."""
    if "OpenMP" not in torch.__config__.parallel_info() or os.name != "posix":
        return
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if entry is not None:
        handle.recsys_use_gomp(ctypes.cast(entry, ctypes.c_void_p))


class Operator:
    """Choose between kernel and plain PyTorch for one operator, and describe it in the table of backends.

    Args:
        name: The operator's public name.
        kernels: Names of the C functions that the operator needs. The kernel is used only if all are there.
        cuda: "module:function" of the public CUDA implementation; empty if there is none.
        triton: "module:name" of this package's Triton operator; empty if there is none.
    """

    registered: dict[str, Operator] = {}  # noqa: RUF012 - every operator adds itself

    def __init__(self, name: str, kernels: Iterable[str], cuda: str = "", triton: str = "") -> None:
        self.name = name
        self.kernels = tuple(kernels)
        self.cuda = cuda
        self.triton = triton
        self.registered[name] = self

    @functools.cached_property
    def functions(self) -> tuple[Callable[[Any], None], ...] | None:
        """The C functions in the order of ``kernels``, or None if one is missing."""
        found = tuple(kernel_library().function(name) for name in self.kernels)
        return None if None in found else found  # type: ignore[return-value]

    def takes(self, *tensors: Tensor) -> bool:
        """Return True if the CPU kernel serves a call with these floating-point inputs."""
        if not _has_kernel(self.name) or not _cpu_kernels_are_wanted() or is_exporting():
            return False
        for x in tensors:  # noqa: SIM110 - this loop runs in every call; all(...) takes twice as long
            if not x.is_cpu or x.dtype not in _KERNEL_DTYPES:
                return False
        return True

    @functools.cached_property
    def cuda_function(self) -> Callable[..., Any] | None:
        """The public CUDA implementation, or None if its package cannot be imported."""
        return _imported(self.cuda)

    @functools.cached_property
    def triton_function(self) -> Callable[..., Any] | None:
        """The package's own Triton operator, or None if Triton cannot be imported."""
        return _imported(self.triton)

    def gpu_paths(self, *tensors: Tensor, public: bool = True) -> tuple[str, ...]:
        """Return the GPU implementations that serve a call, best first; empty for plain PyTorch.

        Args:
            tensors: The call's floating-point inputs.
            public: False if the public package does not serve the call's other arguments.
        """
        chosen = backend()
        if is_exporting():
            return ()
        if not tensors[0].is_cuda and not (chosen == "triton" and interpreting()):
            return ()
        for x in tensors:
            if x.dtype not in _GPU_DTYPES:
                return ()
        return tuple(
            name
            for name in self._allowed(chosen)
            if (name != "mamba_ssm" or (public and tensors[0].is_cuda)) and _has(self.name, name)
        )

    def _allowed(self, chosen: str) -> tuple[str, ...]:
        if chosen != "auto":
            return () if chosen == "reference" else (chosen,)
        if torch.are_deterministic_algorithms_enabled() and self.triton:
            return ("triton",)
        return ("triton", "mamba_ssm")

    def forget(self) -> None:
        """Look for the kernels again at the next call (tests change the environment)."""
        self.__dict__.pop("functions", None)
        self.__dict__.pop("cuda_function", None)
        self.__dict__.pop("triton_function", None)

    def row(self) -> dict[str, str]:
        """Return this operator's row of :func:`backends`."""
        library = kernel_library()
        if self.functions is not None and backend() != "reference":
            cpu, why = f"C++ kernel ({library.isa})", "float64 and float16 run on plain PyTorch"
        elif self.functions is not None:
            cpu, why = "plain PyTorch", "ops.backend=reference"
        else:
            cpu = "plain PyTorch"
            why = (
                library.reason or f"the compiled library lacks {', '.join(self.kernels)}; {REBUILD}"
            )
        if torch.cuda.is_available():
            cuda, cuda_why = self._on_cuda()
        else:
            cuda, cuda_why = "none", "PyTorch sees no CUDA device"
        return {"cpu": cpu, "cpu_why": why, "cuda": cuda, "cuda_why": cuda_why}

    def _on_cuda(self) -> tuple[str, str]:
        """Return the implementation on a GPU and the reason."""
        chosen = backend()
        package = self.cuda.partition(".")[0].partition(":")[0]
        names = {"triton": "Triton", "mamba_ssm": package}
        found = [names[x] for x in self._allowed(chosen) if _has(self.name, x)]
        if len(found) == 2:
            return " or ".join(found), "the faster one, measured at the first call of a shape"
        if found == ["Triton"]:
            return "Triton", "float64 runs on plain PyTorch"
        if found:
            return package, "packed sequences and initial states run on plain PyTorch"
        if chosen == "reference":
            return "plain PyTorch", "ops.backend=reference"
        if not self.cuda and not self.triton:
            return "plain PyTorch", "there is no CUDA kernel"
        missing = [x for x, there in (("triton", self.triton), (package, self.cuda)) if there]
        return "plain PyTorch", f"cannot import {' or '.join(missing)} (ops.backend={chosen})"


def _imported(name: str) -> Callable[..., Any] | None:
    """Return the function ``module:function``, or None if it cannot be imported."""
    module, _, function = name.partition(":")
    if not module:
        return None
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, RuntimeError):  # built for another torch: RuntimeError
        return None


# torch.compile takes the results as constants. It cannot trace the loading of a library, nor the lock that
# functools.cached_property holds.
@torch.compiler.assume_constant_result
def _has_kernel(name: str) -> bool:
    return Operator.registered[name].functions is not None


@torch.compiler.assume_constant_result
def _has(name: str, path: str) -> bool:
    operator = Operator.registered[name]
    found = operator.triton_function if path == "triton" else operator.cuda_function
    return found is not None


@torch.compiler.assume_constant_result
def _cpu_kernels_are_wanted() -> bool:
    chosen = backend()
    return chosen != "reference" and not (chosen == "triton" and interpreting())


def backends() -> dict[str, dict[str, str]]:
    """Return the implementation that each operator uses on ``cpu`` and ``cuda``, and the reason.

    Returns:
        ``{"selective_scan": {"cpu": ..., "cpu_why": ..., "cuda": ..., "cuda_why": ...}, ...}``
    """
    return {name: operator.row() for name, operator in sorted(Operator.registered.items())}


def describe_backends() -> str:
    """Describe :func:`backends` in one short line, for a run's log; only slow operators have a reason."""
    rows = backends()
    parts = []
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        groups: dict[tuple[str, str], list[str]] = {}
        for name, row in rows.items():
            groups.setdefault((row[device], row[f"{device}_why"]), []).append(name)
        for (path, why), names in groups.items():
            subject = "operators" if len(names) == len(rows) else ", ".join(names)
            reason = f" ({why})" if path == "plain PyTorch" else ""
            parts.append(f"{subject} on {device}: {path}{reason}")
    return "; ".join(parts)
