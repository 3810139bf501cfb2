"""Build hook: compiles the CPU kernels into the wheel, or in place for an editable install.

Without a compiler the package is built all the same and runs on plain PyTorch; what is
lacking is said here and, at run time, by ``recsys_ssm.ops.describe_backends()``.
RECSYS_SSM_NO_KERNELS=1 skips the kernels; RECSYS_SSM_REQUIRE_KERNELS=1 (for wheels that others
will install) turns their absence into an error.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if os.environ.get("RECSYS_SSM_NO_KERNELS", "0") not in {"", "0"}:
            self.app.display_warning("RECSYS_SSM_NO_KERNELS is set: CPU kernels are not compiled")
            return
        kernels = _load_build_module(Path(self.root))
        target = kernels.library_path()
        output = target
        if version != "editable":
            self.scratch = tempfile.TemporaryDirectory()
            output = Path(self.scratch.name) / target.name
        try:
            kernels.build(output)
        except (kernels.NoCompilerError, kernels.CompileError) as error:
            if os.environ.get("RECSYS_SSM_REQUIRE_KERNELS", "0") not in {"", "0"}:
                raise
            self.app.display_warning(
                "CPU kernels are not compiled, recsys_ssm will run on plain PyTorch, several times "
                f"slower: {error}"
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"
        if version != "editable":
            build_data["force_include"][str(output)] = f"recsys_ssm/ops/{target.name}"

    def finalize(self, *_: object) -> None:
        if hasattr(self, "scratch"):
            self.scratch.cleanup()


def _load_build_module(root: Path) -> ModuleType:
    """``recsys_ssm/ops/build.py`` by path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location(
        "recsys_ssm_build", root / "recsys_ssm" / "ops" / "build.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform_tag() -> str:
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    # python.org's macOS builds name both architectures; the library has only the one compiled for.
    return tag.replace("universal2", platform.machine())
