"""Check the packages: the wheel, its metadata, editable installs, and training from the wheel alone."""

from __future__ import annotations

import ast
import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import recsys_ssm
from recsys_ssm.ops._dispatch import kernel_library
from recsys_ssm.paths import CONF_DIR


def _run(
    command: list[str | Path], cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (
        f"{command} exited with {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done


_BUILD = [sys.executable, "-m", "build", "--no-isolation"]


@pytest.fixture(scope="module")
def sdist(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    _run([*_BUILD, "--sdist", "--outdir", folder], repository)
    (archive,) = folder.iterdir()
    return archive


def _unpack(sdist: Path, folder: Path) -> Path:
    _run(["tar", "-xzf", sdist, "-C", folder], folder)
    (root,) = folder.iterdir()
    return root


def _build_wheel(sdist: Path, folder: Path, **environment: str) -> Path:
    """Build a wheel from the source package: a file that is not in it is not in the wheel."""
    root = _unpack(sdist, folder)
    _run([*_BUILD, "--wheel", "--outdir", folder / "dist"], root, **environment)
    (wheel,) = (folder / "dist").iterdir()
    return wheel


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel without the CPU kernels, which take a while to compile."""
    return _build_wheel(sdist, tmp_path_factory.mktemp("wheel"), RECSYS_SSM_NO_KERNELS="1")


def _files(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob(pattern)}


def test_wheel_holds_the_package_and_its_configs(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top = {name.split("/")[0] for name in names}
    assert top == {"recsys_ssm", f"recsys_ssm-{recsys_ssm.__version__}.dist-info"}

    configs = _files(repository / "conf", "*.yaml")
    assert "train.yaml" in configs
    assert {f"recsys_ssm/conf/{name}" for name in configs} <= names

    modules = _files(repository / "recsys_ssm", "*.py") | {"py.typed"}
    assert {f"recsys_ssm/{name}" for name in modules} <= names
    assets = _files(repository / "recsys_ssm", "*.csv")
    assert {f"recsys_ssm/{name}" for name in assets} <= names
    templates = _files(repository / "recsys_ssm" / "reports" / "templates", "*")
    assert {"report.html", "report.tex"} <= templates
    assert {f"recsys_ssm/reports/templates/{name}" for name in templates} <= names
    assert "recsys_ssm/run/published.yaml" in names


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"recsys_ssm-{recsys_ssm.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert metadata["Name"] == "recsys-ssm"
    assert metadata["Version"] == recsys_ssm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {
        "cuda",
        "dashboard",
        "dev",
        "docs",
        "export",
        "joblib",
        "optuna",
        "ray",
        "submitit",
        "tabular",
        "text",
    }
    assert set(metadata.get_all("Provides-Extra", [])) == extras

    def required(extra: str | None) -> set[str]:
        marker = re.compile(rf"extra == ['\"]{extra}['\"]") if extra else None
        return {
            re.match(r"[\w-]+", line)[0].lower()  # type: ignore[index]
            for line in metadata.get_all("Requires-Dist", [])
            if (marker.search(line) if marker else "extra ==" not in line)
        }

    assert required("cuda") == {"mamba-ssm", "causal-conv1d"}
    assert {"torch", "lightning", "hydra-core", "torchmetrics", "wandb", "polars"} <= required(None)


def test_without_a_compiler_the_package_is_built_and_says_so(sdist: Path, tmp_path: Path) -> None:
    root = _unpack(sdist, tmp_path)
    build = [*_BUILD, "--wheel", "--outdir", tmp_path / "dist"]
    done = _run(build, root, CXX="no-such-compiler")
    assert "The CPU kernels are not compiled" in done.stdout
    assert "no-such-compiler" in done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    required = os.environ | {"CXX": "no-such-compiler", "RECSYS_SSM_REQUIRE_KERNELS": "1"}
    refused = subprocess.run(build, check=False, cwd=root, env=required, capture_output=True)
    assert refused.returncode != 0


def test_source_package_leaves_out_what_is_not_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "conf/train.yaml", "tests/test_packaging.py"} <= names
    built = (".venv/", "runs/", "wandb/", "outputs/", "__pycache__/", ".so", ".dylib", ".pyc")
    assert not [name for name in names if any(part in name for part in built)]


def test_conf_dir_holds_the_configs() -> None:
    assert (CONF_DIR / "train.yaml").is_file()


def test_version_is_the_same_everywhere(repository: Path) -> None:
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert citation["version"] == recsys_ssm.__version__


def test_constraints_name_every_direct_dependency_within_its_range(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.lower().split("==")
        for line in (repository / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["dev"]:
        requirement = Requirement(text)
        if requirement.name == "recsys-ssm":  # extras of our own
            inner = [Requirement(each) for name in requirement.extras for each in extras[name]]
            assert all(each.name in pins and pins[each.name] in each.specifier for each in inner)
            continue
        assert requirement.name in pins, f"constraints.txt does not pin {requirement.name}"
        assert pins[requirement.name] in requirement.specifier, requirement


def test_every_import_is_a_declared_dependency(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = ("cuda", "export", "optuna", "ray", "tabular")
    declared = [*project["dependencies"], *(each for name in optional for each in extras[name])]
    names = {Requirement(text).name for text in declared}
    other = {"hydra-core": "hydra", "pyyaml": "yaml"}
    modules = {other.get(name, name.replace("-", "_")) for name in names}
    # PyTorch's builds for a GPU bring triton.
    known = modules | sys.stdlib_module_names | {"recsys_ssm", "triton"}
    for path in (repository / "recsys_ssm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported = [str(node.module)]
            else:
                continue
            for name in imported:
                assert name.partition(".")[0] in known, f"{path}:{node.lineno} imports {name}"


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, without anything of this checkout."""
    wheel = _build_wheel(sdist, tmp_path_factory.mktemp("wheel"))
    assert wheel.name.startswith(f"recsys_ssm-{recsys_ssm.__version__}-py3-none-")
    python = _environment(tmp_path_factory.mktemp("environment"))
    _run([*_pip(python), wheel], wheel.parent)
    return python


def _environment(folder: Path) -> Path:
    """Make an environment with this one's dependencies and return its Python.

    A .pth file names the folder of the dependencies, because torch is large. Python does not read a .pth file there,
    so the environment does not see this checkout's editable install.
    """
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin" / "python"


def _pip(python: Path) -> list[str | Path]:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    return [*pip, "--no-deps", "--no-index", "--no-build-isolation"]


def test_an_editable_install_leaves_the_working_directory_first(
    sdist: Path, tmp_path: Path
) -> None:
    first, second = (
        _unpack(sdist, path) for path in (tmp_path / "a", tmp_path / "b") if not path.mkdir()
    )
    python = _environment(tmp_path)
    _run([*_pip(python), "-e", first], tmp_path, RECSYS_SSM_NO_KERNELS="1")
    code = "import recsys_ssm.paths as p; print(p.CONF_DIR)"
    for folder, found in ((tmp_path, first), (second, second)):
        assert _run([python, "-c", code], folder, PYTHONPATH="").stdout.strip() == str(
            found / "conf"
        )


@pytest.mark.slow
def test_an_editable_install_compiles_the_kernels_beside_the_sources(
    sdist: Path, tmp_path: Path
) -> None:
    root = _unpack(sdist, tmp_path)
    python = _environment(tmp_path)
    _run([*_pip(python), "-e", root], tmp_path)
    code = (
        "from recsys_ssm.ops import _dispatch as d; print(d.library_path(), d.kernel_library().isa)"
    )
    path, *isa = _run([python, "-c", code], tmp_path, PYTHONPATH="").stdout.split()
    assert Path(path).parent == root / "recsys_ssm" / "ops"
    # The compiler that made this checkout's library made the other one.
    assert isa == ([kernel_library().isa] if kernel_library().handle else [])
    assert Path(path).exists() == bool(isa)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


_QUICK = ["trainer.max_steps=2", "logger=none"]


@pytest.mark.slow
def test_wheel_alone_trains(installed: Path, empty: Path, repository: Path) -> None:
    where = _run(
        [installed, "-c", "import recsys_ssm.paths as p; print(p.__file__); print(p.CONF_DIR)"],
        empty,
    ).stdout
    assert str(repository) not in where
    train = [installed, "-m", "recsys_ssm.train", "dataset=spotify", "backbone=mamba", *_QUICK]
    done = _run(train, empty)
    assert "p@5" in (done.stdout + done.stderr).lower()
    # The compiler that made this checkout's library made the wheel's.
    assert ("C++ kernel" in done.stdout) == (kernel_library().handle is not None)
    assert list(empty.rglob("metrics.json"))


@pytest.mark.slow
def test_config_dir_adds_ones_own_options(installed: Path, empty: Path) -> None:
    own = empty / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\nseed: 1234\n")
    train = [installed, "-m", "recsys_ssm.train", "--config-dir", "own", "experiment=mine"]
    shown = _run([*train, "--cfg", "job"], empty).stdout
    assert yaml.safe_load(shown)["seed"] == 1234
    _run([*train, *_QUICK], empty)
