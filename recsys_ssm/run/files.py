"""Write files whole or not at all, and record the versions a run depends on."""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from recsys_ssm.errors import UserError

VALIDATIONS = "validations.jsonl"
"""File in a run's folder with one line of metrics for each validation."""


def write_json(path: Path | str, results: Mapping[str, Any] | Sequence[Any]) -> Path:
    """Write results with sorted keys, whole or not at all.

    Floats keep all their digits. NaN and infinities, which JSON does not have, become null. Tensors
    and NumPy values of one element become numbers, tensors and arrays lists, paths strings.

    Returns:
        ``path``.

    Raises:
        UserError: The file cannot be written.
        TypeError: A value has a type that JSON cannot represent.
    """
    text = json.dumps(
        _plain(results), sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False
    )
    return write_text(path, f"{text}\n")


def write_text(path: Path | str, text: str) -> Path:
    """Write a UTF-8 file, whole or not at all, and return ``path``.

    Raises:
        UserError: The file cannot be written.
    """
    return _write(Path(path), text.encode())


def write_bytes(path: Path | str, content: bytes) -> Path:
    """Write a file, whole or not at all, and return ``path``.

    Raises:
        UserError: The file cannot be written.
    """
    return _write(Path(path), content)


def write_table(path: Path | str, table: pl.DataFrame) -> Path:
    """Write a Parquet file, whole or not at all, and return ``path``.

    Raises:
        UserError: The file cannot be written.
    """
    content = io.BytesIO()
    table.write_parquet(content)
    return _write(Path(path), content.getvalue())


def _plain(value: Any, where: str = "results") -> Any:
    """Convert ``value`` to the types of JSON."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, f"{where}[{i}]") for i, each in enumerate(value)]
    if hasattr(value, "tolist"):  # tensors, NumPy arrays and scalars
        return _plain(value.tolist(), where)
    raise TypeError(f"{where} is of type {type(value).__name__}, which JSON cannot hold")


def _write(path: Path, content: bytes) -> Path:
    """Write beside the file, then rename: a reader never sees a part of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}); free some space, or choose another folder"
        ) from error
    return path


def versions() -> dict[str, str]:
    """Return the versions of packages that a run's numbers depend on, the platform, and the git commit."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("recsys-ssm", "torch", "lightning", "torchmetrics", "numpy", "polars"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
            found[package] = "unknown"
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # without git or a repository
        return found
    return {**found, "git_commit": commit}
