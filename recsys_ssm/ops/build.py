"""Compiles ``csrc/*.cpp`` into one library beside this file: ``python -m recsys_ssm.ops.build``.

The library has a plain C interface and knows neither Python nor PyTorch, so one build serves every
version of both.  One build also serves every processor of an architecture: ``runtime.cpp`` is
compiled once, every other source once for each instruction set the architecture may have, and
which copy is called is decided when the library is loaded.  Needs a C++17 compiler (GCC, Clang or
MSVC; the environment variables ``CXX`` and ``CXXFLAGS`` are respected) and Python's standard
library only: the build hook runs this file where nothing else is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["ABI", "ISAS", "CompileError", "NoCompilerError", "build", "library_path"]

SOURCES = Path(__file__).parent / "csrc"


def _fingerprint() -> int:
    """31 bits of a hash of the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*")):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return int.from_bytes(digest.digest()[:4], "little") >> 1


ABI = _fingerprint()
"""Compiled into the library and compared when it is loaded: one that was built from other sources
(an update without a build) would be called with buffers of the wrong size."""

# Instruction sets by architecture, slowest first, with the flags of (GCC and Clang, MSVC).
# "baseline" is what every processor of the architecture has: SSE2 on x86-64, NEON on arm64.
ISAS: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "x86_64": {
        "baseline": ([], []),
        "avx2": (["-mavx2", "-mfma"], ["/arch:AVX2"]),
        "avx512": (
            ["-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw"],
            ["/arch:AVX512"],
        ),
    },
    "arm64": {"baseline": ([], [])},
    "other": {"baseline": ([], [])},
}
ARCHITECTURES = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "arm64", "aarch64": "arm64"}


class NoCompilerError(RuntimeError):
    """No C++ compiler was found."""


class CompileError(RuntimeError):
    """The compiler was found but failed; the message ends with what it said."""


def library_path() -> Path:
    """Where the compiled library belongs."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    return Path(__file__).with_name(f"_kernels{suffix}")


def build(output: Path, *, sanitize: bool = False, cache: Path | None = None) -> None:
    """Compile every source and link the library to ``output``, whole or not at all.

    Args:
        output: the library's path; an older one is replaced in one move.
        sanitize: with address and undefined-behaviour sanitizers (GCC, Clang).
        cache: a folder that keeps object files, so that only what changed is compiled again.

    Raises:
        NoCompilerError: there is no compiler.
        CompileError: it failed.
    """
    compiler, environment = _find_compiler()
    msvc = Path(compiler[0]).stem.lower() in {"cl", "clang-cl"}
    isas = ISAS[_architecture(compiler, msvc, environment)]
    extra = shlex.split(os.environ.get("CXXFLAGS", "")) + _arch_flags()
    if msvc:
        common = ["/nologo", "/O2", "/std:c++17", "/EHsc", "/MD", *extra]
    else:
        # No -ffast-math: NaN and infinity must come out as they went in.
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
        common += ["-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
        common += ["-Wno-uninitialized", *extra]  # GCC 12 warns of its own AVX-512 headers
        if sanitize:
            common += ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
            common += ["-fsanitize=address,undefined"]
    headers = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.h")))

    with tempfile.TemporaryDirectory() as scratch:
        folder = cache or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(job: tuple[Path, str, list[str]]) -> Path:
            source, isa, flags = job
            d = "/D" if msvc else "-D"
            defines = [f"{d}RECSYS_ISA_{isa.upper()}=1"]
            if source.stem == "runtime":
                defines.append(f"{d}RECSYS_ABI={ABI}")
            command = [*compiler, *common, *flags, *defines]
            key = hashlib.sha256(repr(command).encode() + headers + source.read_bytes())
            target = folder / f"{source.stem}-{isa}-{key.hexdigest()[:16]}.o"
            if not target.exists():
                beside = target.with_suffix(f".{os.getpid()}.tmp.o")
                out = [f"/Fo{beside}", "/c"] if msvc else ["-o", str(beside), "-c"]
                _run([*command, *out, str(source)], environment)
                beside.replace(target)
            return target

        jobs = []
        for source in sorted(SOURCES.glob("*.cpp")):
            chosen = {"baseline": isas["baseline"]} if source.stem == "runtime" else isas
            jobs += [(source, isa, flags[msvc]) for isa, flags in chosen.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [str(path) for path in pool.map(compile_one, jobs)]

        beside = output.with_name(f"{output.name}.{os.getpid()}.tmp")
        if msvc:
            implib = Path(scratch) / "kernels.lib"
            link = [*compiler, "/nologo", "/LD", "/MD", *objects, f"/Fe{beside}"]
            _run([*link, "/link", f"/IMPLIB:{implib}"], environment)
        else:
            link = [*compiler, *common, "-shared", *objects, "-o", str(beside)]
            if sys.platform.startswith("linux"):
                link += ["-pthread"] if sanitize else ["-pthread", "-Wl,-z,defs"]
            _run(link, environment)
        beside.replace(output)


def _run(command: list[str], environment: dict[str, str] | None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise CompileError(f"{shlex.join(command)}\n{said}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def _find_compiler() -> tuple[list[str], dict[str, str] | None]:
    """The compiler's command and, where it needs one, the environment it must run in."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"], posix=os.name != "nt")
        if shutil.which(command[0]) is None:
            raise NoCompilerError(f"CXX={os.environ['CXX']} is not a program that can be run")
        return command, None
    if sys.platform == "win32":
        return _find_msvc()
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return [found], None
    raise NoCompilerError(
        "no C++ compiler found (looked for c++, g++, clang++; CXX is not set). Install one "
        "(Debian/Ubuntu: apt install g++; macOS: xcode-select --install) and run "
        "`python -m recsys_ssm.ops.build`"
    )


def _find_msvc() -> tuple[list[str], dict[str, str] | None]:
    if shutil.which("cl"):
        return ["cl"], None
    programs = os.environ.get("ProgramFiles(x86)", r"C:\Program Files (x86)")  # noqa: SIM112
    vswhere = Path(programs) / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
    arm = platform.machine().lower() == "arm64"
    component = f"Microsoft.VisualStudio.Component.VC.Tools.{'ARM64' if arm else 'x86.x64'}"
    if vswhere.exists():
        query = [str(vswhere), "-latest", "-products", "*", "-requires", component]
        query += ["-property", "installationPath"]
        where = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        script = Path(where) / "VC" / "Auxiliary" / "Build" / "vcvarsall.bat"
        if where and script.exists():
            setup = f'"{script}" {"arm64" if arm else "x64"} >nul && set'
            said = subprocess.run(
                f'cmd /s /c "{setup}"', capture_output=True, text=True, check=False
            ).stdout
            environment = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
            found = shutil.which("cl", path=environment.get("PATH") or environment.get("Path"))
            if found:
                return [found], environment
    raise NoCompilerError(
        "no C++ compiler found (neither cl on PATH nor Visual Studio's C++ tools). Install the "
        "Visual Studio Build Tools with the C++ workload and run `python -m recsys_ssm.ops.build`"
    )


def _architecture(compiler: list[str], msvc: bool, environment: dict[str, str] | None) -> str:
    """The architecture compiled for: the compiler's, which need not be this machine's."""
    machine = platform.machine()
    if msvc:
        machine = (environment or os.environ).get("VSCMD_ARG_TGT_ARCH", machine)
        machine = {"x64": "x86_64"}.get(machine, machine)
    elif sys.platform == "darwin":
        archs = _arch_flags()
        machine = archs[1] if archs else machine
    else:
        said = subprocess.run(
            [*compiler, "-dumpmachine"], capture_output=True, text=True, check=False
        ).stdout
        machine = said.split("-")[0].strip() or machine
    return ARCHITECTURES.get(machine.lower(), "other")


def _arch_flags() -> list[str]:
    """macOS: the one architecture that cibuildwheel asks for in ARCHFLAGS."""
    flags = shlex.split(os.environ.get("ARCHFLAGS", "")) if sys.platform == "darwin" else []
    return flags[:2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recsys_ssm.ops.build", description=__doc__)
    parser.add_argument("--output", type=Path, default=library_path(), help="default: %(default)s")
    parser.add_argument("--sanitize", action="store_true", help="address and UB sanitizers")
    parser.add_argument("--cache", type=Path, help="folder that keeps object files")
    options = parser.parse_args()
    try:
        build(options.output, sanitize=options.sanitize, cache=options.cache)
    except (NoCompilerError, CompileError) as error:
        sys.exit(f"recsys_ssm kernels not built: {error}")
    print(f"built {options.output}")


if __name__ == "__main__":
    main()
