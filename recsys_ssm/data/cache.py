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
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from recsys_ssm.errors import UserError

VERSION = 1
"""Of what is stored and of how it is prepared: raise it when either changes."""


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
        UserError: An input is not readable, or changed while it was read; or the cache folder
            cannot be written.
    """
    fingerprint = _fingerprint(inputs, settings)
    path = folder / f"{re.sub(r'[^0-9A-Za-z_-]+', '_', name)}-{fingerprint[:20]}.json"
    if (entry := _load(_Index.read(path))) is not None:
        return entry
    made = make()
    if _fingerprint(inputs, settings) != fingerprint:
        raise UserError(f"{inputs[0]}: changed while it was being read; run again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _new_folder(path) as new:
            checksums = _write(made, new)
            # Another process may have been faster; whoever finds an entry keeps it.
            index = _Index.read(path)
            if (entry := _load(index)) is None:
                content = {"folder": new.name, "checksums": checksums}
                _write_json(new / "index.json", content).replace(path)  # atomic
                if index is not None:  # and damaged
                    shutil.rmtree(index.folder, ignore_errors=True)
                entry = _load(_Index.read(path))
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
        try:
            with path.open("rb") as file:
                files.append([str(path), hashlib.file_digest(file, "sha256").hexdigest()])
        except OSError as error:
            raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    whole = {"version": VERSION, "inputs": files, "settings": settings}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _new_folder(index: Path) -> Iterator[Path]:
    """A new folder beside ``index``, removed again if that did not come to name it."""
    new = Path(tempfile.mkdtemp(prefix=f"{index.stem}.", dir=index.parent))
    try:
        yield new
    finally:
        named = _Index.read(index)
        if named is None or named.folder != new:
            shutil.rmtree(new, ignore_errors=True)


def _write(made: Prepared, folder: Path) -> dict[str, str]:
    """Write the files of an entry; returns the checksum of each."""
    for name, array in made.arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    for name, text in made.texts.items():
        pl.DataFrame({name: text}).write_parquet(folder / f"{name}.parquet")
    _write_json(folder / "notes.json", {"notes": made.notes})
    return {path.name: _checksum(path) for path in sorted(folder.iterdir())}


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


class _Index(NamedTuple):
    """What an index file says."""

    folder: Path
    checksums: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> _Index | None:
        """None if there is no index, or one that makes no sense."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            name, checksums = str(content["folder"]), dict(content["checksums"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        # A folder that is removed as damaged must be one of this entry's.
        if not name.startswith(f"{path.stem}.") or Path(name).name != name or not checksums:
            return None
        return cls(path.parent / name, checksums)


def _load(index: _Index | None) -> Prepared | None:
    """The entry an index names; None if it is not there or not whole."""
    if index is None:
        return None
    entry = Prepared({}, {})
    try:
        for name, checksum in index.checksums.items():
            path = index.folder / name
            if _checksum(path) != checksum:
                return None
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


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
