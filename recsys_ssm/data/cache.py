"""Prepared arrays on disk, memory-mapped, never stale.

    prepared = load_or_make(folder, "ml_1m", [Path("ratings.dat")], {"k_core": 5}, make)

An entry is found by a fingerprint of the *contents* of the files it was made of, their names, the
settings and :data:`VERSION`; so a file that was edited, or replaced with its old date, is another
entry. It is a folder of ``.npy`` files (never pickled), and becomes visible by one atomic rename of
a small index file that names it and the checksum of each of its files. Whoever finds an entry
damaged makes a new folder and points the index there; two processes that make the same entry at
once each make their own, and the later one finds the earlier one's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys_ssm.errors import UserError
from recsys_ssm.results import write_json

VERSION = 1
"""Of what is stored and of how it is prepared: raise it when either changes."""

_INDEX_FIELDS = {"folder", "checksums"}


@dataclass
class Prepared:
    """What an entry holds."""

    arrays: dict[str, np.ndarray]
    texts: dict[str, pl.Series]
    notes: list[str] = field(default_factory=list)


def cache_folder(option: str | Path | None = None) -> Path:
    """Where entries are: ``option``, else ``$RECSYS_SSM_CACHE``, else the user's cache folder."""
    if option is not None:
        return Path(option).expanduser()
    if named := os.environ.get("RECSYS_SSM_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "recsys_ssm"


def load_or_make(
    folder: Path,
    name: str,
    inputs: Sequence[Path],
    settings: Mapping[str, Any],
    make: Callable[[], Prepared],
) -> Prepared:
    """The entry for these inputs and settings, made if it is not there or is damaged.

    Args:
        folder: Of the cache.
        name: What the entry's files are called after, for people.
        inputs: Files it is made of.
        settings: Whatever else it depends on, plain values.
        make: Makes it.

    Returns:
        The entry as it is on disk: arrays are memory-mapped, read-only.

    Raises:
        UserError: The cache folder cannot be written, or an input changed while it was read.
    """
    fingerprint = _fingerprint(inputs, settings)
    index = folder / f"{name}-{fingerprint[:20]}.json"
    if (entry := _load(index)) is not None:
        return entry
    made = make()
    if _fingerprint(inputs, settings) != fingerprint:
        raise UserError(f"{inputs[0]}: changed while it was being read; run again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _new_folder(folder, index.stem) as new:
            checksums = _write(made, new)
            # Another process may have been faster; whoever finds an entry keeps it.
            if (entry := _load(index)) is None:
                outdated = _folder_of(index)
                write_json(index, {"folder": new.name, "checksums": checksums})
                if outdated is not None:
                    shutil.rmtree(outdated, ignore_errors=True)
                entry = _load(index)
    except OSError as error:
        raise UserError(
            f"{folder}: the prepared data cannot be kept there ({error.strerror or error}); name "
            "another folder with dataset.cache_dir or the variable RECSYS_SSM_CACHE"
        ) from error
    if entry is None:
        raise UserError(f"{folder}: what was written there reads back damaged; is the disk sound?")
    return entry


def _fingerprint(inputs: Sequence[Path], settings: Mapping[str, Any]) -> str:
    files = []
    for path in inputs:
        with path.open("rb") as file:
            files.append([str(path), hashlib.file_digest(file, "sha256").hexdigest()])
    whole = {"version": VERSION, "inputs": files, "settings": settings}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _new_folder(parent: Path, stem: str) -> Iterator[Path]:
    """A new folder, removed again if no index came to name it."""
    new = Path(tempfile.mkdtemp(prefix=f"{stem}.", dir=parent))
    try:
        yield new
    finally:
        if _folder_of(parent / f"{stem}.json") != new:
            shutil.rmtree(new, ignore_errors=True)


def _write(made: Prepared, folder: Path) -> dict[str, str]:
    """Write the files of an entry; returns the checksum of each."""
    for name, array in made.arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    for name, text in made.texts.items():
        pl.DataFrame({name: text}).write_parquet(folder / f"{name}.parquet")
    write_json(folder / "notes.json", {"notes": made.notes})
    return {path.name: _checksum(path) for path in sorted(folder.iterdir())}


def _load(index: Path) -> Prepared | None:
    """The entry an index names; None if it is not there or not whole."""
    folder = _folder_of(index)
    if folder is None:
        return None
    try:
        checksums = json.loads(index.read_text(encoding="utf-8"))["checksums"]
        if any(_checksum(folder / name) != checksum for name, checksum in checksums.items()):
            return None
        entry = Prepared({}, {})
        for path in (folder / name for name in checksums):
            if path.suffix == ".npy":
                # A plain view of the map: indexing it is faster than indexing an np.memmap.
                entry.arrays[path.stem] = np.asarray(
                    np.load(path, mmap_mode="r", allow_pickle=False)
                )
            elif path.suffix == ".parquet":
                entry.texts[path.stem] = pl.read_parquet(path)[path.stem]
            else:
                entry.notes = json.loads(path.read_text(encoding="utf-8"))["notes"]
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError):
        return None
    return entry


def _folder_of(index: Path) -> Path | None:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or set(content) != _INDEX_FIELDS or not content["checksums"]:
        return None
    return index.parent / Path(str(content["folder"])).name


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
