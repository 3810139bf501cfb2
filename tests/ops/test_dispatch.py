from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys_ssm.errors import UserError
from recsys_ssm.ops import backends, describe_backends, selective_scan
from recsys_ssm.ops._dispatch import SOURCES, Operator, kernel_library, library_path, source_hash
from tests.ops.conftest import ISAS


def scan_backend() -> dict[str, str]:
    return backends()["selective_scan"]


def test_every_operator_says_what_it_uses_and_why() -> None:
    table = backends()
    assert set(table) == set(Operator.registered) >= {"selective_scan"}
    for row in table.values():
        assert set(row) == {"cpu", "cpu_why", "cuda", "cuda_why"}
        assert all(row.values())
    line = describe_backends()
    assert "\n" not in line
    assert scan_backend()["cpu"] in line
    if "plain PyTorch" in line:
        assert scan_backend()["cpu_why"] in line
    else:
        assert len(line) < 100


def test_the_environment_turns_the_kernels_off(use: Any) -> None:
    use(RECSYS_SSM_NO_KERNELS="1")
    assert scan_backend() | {"cpu": "plain PyTorch", "cpu_why": "RECSYS_SSM_NO_KERNELS is set"} == (
        scan_backend()
    )
    u = torch.randn(1, 3, 4)
    assert not Operator.registered["selective_scan"].takes(u)
    out = selective_scan(u, u.abs(), -torch.rand(4, 2), torch.ones(1, 3, 2), torch.ones(1, 3, 2))
    assert isinstance(out, torch.Tensor)
    assert out.shape == u.shape


def test_kernels_serve_float32_and_bfloat16_on_cpu_only(kernel: None) -> None:
    takes = Operator.registered["selective_scan"].takes
    assert takes(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
    assert not takes(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert not takes(torch.zeros(1, dtype=torch.float16))
    assert not takes(torch.zeros(1, device="meta"))


def test_the_instruction_set_can_be_limited_but_not_raised(use: Any, kernel: None) -> None:
    best = kernel_library().isa
    for isa in ISAS:
        use(RECSYS_SSM_MAX_ISA=isa)
        assert kernel_library().isa == min(isa, best, key=ISAS.index)
        assert f"({kernel_library().isa})" in scan_backend()["cpu"]
    use(RECSYS_SSM_MAX_ISA="sse9")
    with pytest.raises(UserError, match="RECSYS_SSM_MAX_ISA=sse9: must be one of baseline"):
        kernel_library()


def test_a_missing_library_says_how_to_build_it(use: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("RECSYS_SSM_NO_KERNELS", raising=False)
    use(RECSYS_SSM_LIBRARY=str(tmp_path / "none.so"))
    row = scan_backend()
    assert row["cpu"] == "plain PyTorch"
    assert "install recsys-ssm again with a C++ compiler" in row["cpu_why"]


def test_the_build_and_the_package_hash_the_sources_alike(
    use: Any, kernel: None, monkeypatch: Any
) -> None:
    handle = kernel_library().handle
    assert handle is not None
    assert handle.recsys_abi() == source_hash()
    monkeypatch.setattr("recsys_ssm.ops._dispatch.source_hash", lambda: source_hash() ^ 1)
    use()
    assert "built from other sources" in scan_backend()["cpu_why"]


def test_sources_without_a_library_take_that_of_an_install(
    use: Any, kernel: None, tmp_path: Path, monkeypatch: Any
) -> None:
    """Use pip's library with the checkout's sources (``pip install .``, then ``python -m`` in the checkout)."""
    beside = tmp_path / "checkout" / library_path().name
    installed = tmp_path / "site-packages" / "recsys_ssm" / "ops" / beside.name
    installed.parent.mkdir(parents=True)
    shutil.copy(library_path(), installed)
    monkeypatch.setattr("recsys_ssm.ops._dispatch.library_path", lambda: beside)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    use()
    assert "C++ kernel" in scan_backend()["cpu"]
    installed.unlink()
    use()
    assert str(beside) in scan_backend()["cpu_why"]


def test_a_broken_library_is_not_used(use: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("RECSYS_SSM_NO_KERNELS", raising=False)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    use(RECSYS_SSM_LIBRARY=str(broken))
    assert "does not load" in scan_backend()["cpu_why"]


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm on this machine")
def test_no_code_is_shared_between_instruction_sets(kernel: None) -> None:
    """Check that kernels export only their entry points: a weak symbol could come from another instruction set."""
    said = subprocess.run(
        ["nm", "-D", "--defined-only", str(library_path())],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    if not said:
        pytest.skip("nm cannot read this library")
    runtime = {"recsys_abi", "recsys_isa", "recsys_use_gomp"}
    for line in said.splitlines():
        kind, name = line.split()[-2:]
        if name in runtime or kind in "Vv":
            continue
        assert name.endswith(tuple(f"_{isa}" for isa in ISAS)) or "mutex" in name, line


def test_sources_keep_to_the_rule_that_makes_one_library_safe() -> None:
    """Check that only the runtime uses the standard library's templates (see runtime.h)."""
    allowed = {"cmath", "cstddef", "cstdint", "cstdlib", "cstring", "immintrin.h", "arm_neon.h"}
    allowed |= {"intrin.h"}
    for path in [*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]:
        if path.stem == "runtime" and path.suffix == ".cpp":
            continue
        for line in path.read_text().splitlines():
            if line.startswith("#include <"):
                assert line.split()[1].strip("<>") in allowed, f"{path.name}: {line}"
