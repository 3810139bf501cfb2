"""Share the tools of the benchmarks: fair timing, peak memory, speed limits of the machine, tables, JSON.

Contenders take turns, so a busy neighbour slows all of them alike. Figures are medians. Threads sleep rather than
spin. Both clocks are read: wall time, and processor time, which a neighbour disturbs less. A short call is made twice
a turn and the second is timed, as in a training loop. The first call restores the caches and the memory pages that the
contender before gave back to the system, which can cost as much as the call.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recsys_ssm.cli.threads import SPIN_COUNT

__all__ = [
    "Floors",
    "Timing",
    "let_threads_sleep",
    "machine",
    "peak_memory",
    "table",
    "take_turns",
    "write_json",
]


def let_threads_sleep(unless: str = "") -> None:
    """Start the program again with OMP_WAIT_POLICY=PASSIVE, which OpenMP reads when it is loaded.

    Spinning threads inflate both clocks several fold on a shared machine. If the flag ``unless`` is among the
    arguments, threads spin for as long as in a user's run.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        if unless in sys.argv:
            os.environ["OMP_WAIT_POLICY"] = "ACTIVE"  # for GOMP_SPINCOUNT rounds
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        else:
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
            os.environ.pop("GOMP_SPINCOUNT", None)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606


@dataclass(frozen=True)
class Timing:
    """Median times in milliseconds."""

    wall: float
    cpu: float
    repetitions: int


_SHORT = 0.05  # seconds


def take_turns(
    contenders: dict[str, Callable[[], Any]], repetitions: int, budget: float
) -> dict[str, Timing]:
    """Time each contender ``repetitions`` times, interleaved, after one call to warm up.

    A contender whose calls would take longer than ``budget`` seconds together is called less often, but at least twice.
    """
    turns, short, spent = {}, set(), {name: ([], []) for name in contenders}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        turns[name] = max(2, min(repetitions, int(budget / (seconds + 1e-9))))
        if seconds < _SHORT:
            short.add(name)
    for turn in range(repetitions):
        for name, call in contenders.items():
            if turn >= turns[name]:
                continue
            if name in short:
                call()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            spent[name][1].append(time.process_time() - cpu)
            spent[name][0].append(time.perf_counter() - wall)
    return {
        name: Timing(1e3 * statistics.median(wall), 1e3 * statistics.median(cpu), len(wall))
        for name, (wall, cpu) in spent.items()
    }


def peak_memory(call: Callable[[], Any]) -> float | None:
    """Return the MiB that ``call`` holds at its peak beyond those held before; None if unknown."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def read(key: str) -> float:
        line = next(x for x in status.read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) / 1024

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


_EXPONENTIALS = r"""
#include <cmath>
extern "C" double exponentials(int repetitions) {  // of 4096 numbers that stay in L1
  alignas(64) static float x[4096], y[4096];
  for (int i = 0; i < 4096; ++i) x[i] = -(i % 64) * .05f;
  for (int r = 0; r < repetitions; ++r) {
    for (int i = 0; i < 4096; ++i) y[i] = expf(x[i]);
    asm volatile("" ::"r"(y) : "memory");
  }
  return y[0];
}
"""


class Floors:
    """Speed limits of this machine for one thread: exponentials and bytes a second of processor time.

    Measure them repeatedly during a run, since the clock rate changes.
    """

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.bandwidths: list[float] = []
        self.source = "libmvec's expf"
        self._function = self._compile()
        if self._function is None:
            self.source = "torch.exp (no compiler with libmvec)"
        self._x = -3 * torch.rand(4096)
        self._memory = torch.ones(2, 16 * 2**20)

    def _compile(self) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "e.cpp"), Path(folder, "e.so")
            source.write_text(_EXPONENTIALS)
            flags = [
                "-O3",
                "-march=native",
                "-mprefer-vector-width=512",
                "-ffast-math",
                "-shared",
                "-fPIC",
            ]
            command = ["c++", *flags, str(source), "-o", str(library), "-lmvec", "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                return None
            function = ctypes.CDLL(str(library)).exponentials
        function.restype = ctypes.c_double
        return function

    def measure(self) -> None:
        """Measure both limits once more."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        start, repetitions = time.process_time(), 2000
        if self._function is not None:
            self._function(repetitions)
        else:
            for _ in range(repetitions):
                torch.exp(self._x)
        self.rates.append(repetitions * 4096 / (time.process_time() - start))
        start = time.process_time()
        self._memory[0].copy_(self._memory[1])
        self.bandwidths.append(2 * self._memory[0].nbytes / (time.process_time() - start))
        torch.set_num_threads(before)

    @property
    def exponentials(self) -> float:
        """Return the median of exponentials a second."""
        return statistics.median(self.rates)

    @property
    def bandwidth(self) -> float:
        """Return the median of bytes read and written a second, while one thread copies."""
        return statistics.median(self.bandwidths)


def machine() -> dict[str, Any]:
    """Return the processor, its load, and versions."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ] if Path("/proc/cpuinfo").exists() else [platform.processor()]  # fmt: skip
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table with the columns of all rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.4g}"
        return str(value)

    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=1, default=asdict) + "\n")
    beside.replace(path)
