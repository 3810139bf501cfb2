"""Keep prepared arrays on disk, memory-mapped, and never serve stale ones.

    prepared = load_or_make(folder, "ml_1m", sources, {"k_core": 5}, make)

The name of an entry contains a fingerprint of the *contents* of its inputs, their names, the settings and
:data:`VERSION`. An entry is a folder of ``.npy`` and Parquet files (never pickled). It becomes visible by the atomic
rename of a small index file with the folder's name and the size, date and checksum of each of its files. A process that
finds a damaged entry makes a new folder and points the index to it. Two processes that make the same entry at once each
write their own folder; the later one discards its own.

Large files are not read again at every start. The hash of an input file is kept with the file's size, dates and inode
and computed again only when one of these changes. A file of an entry is checked by its size and date, and by its
checksum only when the date differs.

A map of a file that is then truncated in place ends the process (SIGBUS) when it reads beyond the new end. So files are
written read-only, sizes are checked before a file is mapped, and arrays of an entry of at most :data:`IN_MEMORY` bytes
are read, not mapped. What remains: a larger entry that somebody truncates, permissions notwithstanding, during a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import platformdirs
import polars as pl

from recsys_ssm.data.files import parts_of
from recsys_ssm.errors import UserError

VERSION = 3
"""Version of the entries and of their preparation: raise it when either changes."""

IN_MEMORY = 64 << 20
"""Bytes of an entry's arrays up to which they are read into memory, not mapped."""

_SETTLED = 2 * 10**9
"""Nanoseconds after which a further change of a file also changes its date, whatever the file system's resolution."""


@dataclass
class Prepared:
    """Contents of an entry."""

    arrays: dict[str, np.ndarray]
    texts: dict[str, pl.Series]
    notes: list[str] = field(default_factory=list)


def cache_folder(option: str | Path | None = None) -> Path:
    """Return the cache folder: ``option``, else ``$RECSYS_SSM_CACHE``, else the user's cache folder."""
    if option is not None:
        return Path(option).expanduser()
    if named := os.environ.get("RECSYS_SSM_CACHE"):
        return Path(named).expanduser()
    return platformdirs.user_cache_path("recsys_ssm", appauthor=False)


def hash_file(path: Path, folder: Path) -> str:
    """Return the sha256 of a file's content.

    The hash is kept in the cache and computed again only when the file's size, dates or inode have changed.

    Args:
        path: The file.
        folder: Cache folder. If it cannot be written, the hash is not kept.

    Raises:
        UserError: The file is not readable.
    """
    kept = folder / "hashes" / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()}.json"
    try:
        state = _state(path)
        try:
            content = json.loads(kept.read_text(encoding="utf-8"))
            if content["state"] == state:
                return str(content["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not hashed yet, or the record is damaged
        now = time.time_ns()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        # A file that has just been written may be written again without another date.
        settled = _state(path) == state and max(state[1:3]) + _SETTLED < now
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error
    if settled:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            content = {"path": str(path.absolute()), "state": state, "sha256": digest}
            beside = _write_json(kept.with_suffix(f".{os.getpid()}.tmp"), content)
            beside.replace(kept)
    return digest


def hash_path(path: Path, folder: Path) -> str:
    """Return the sha256 of a file's content, or of the Parquet parts in a folder and their names.

    Args:
        path: The file or the folder.
        folder: Cache folder.

    Raises:
        UserError: A file is not readable.
    """
    if not path.is_dir():
        return hash_file(path, folder)
    return hash_values(
        {str(part.relative_to(path)): hash_file(part, folder) for part in parts_of(path)}
    )


def _state(path: Path) -> list[int]:
    """Return size, dates and inode of a file, one of which differs after a change or a replacement."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def hash_frame(frame: pl.DataFrame) -> str:
    """Return the sha256 of a data frame's names, types and cells."""
    digest = hashlib.sha256(str(frame.schema).encode())
    # The physical layout of categories and of text depends on how they were made: write them as plain text.
    plain = frame.with_columns(
        pl.col(name).cast(pl.String)
        for name, kind in frame.schema.items()
        if isinstance(kind, pl.Categorical | pl.Enum)
    )
    plain.rechunk().write_ipc(
        _Digest(digest),  # type: ignore[call-overload]
        compression="uncompressed",
        compat_level=pl.CompatLevel.oldest(),
    )
    return digest.hexdigest()


class _Digest:
    """A file object that hashes the bytes written to it."""

    def __init__(self, digest: Any) -> None:
        self.digest = digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return len(data)

    def flush(self) -> None: ...


def hash_values(values: Any) -> str:
    """Return the sha256 of plain values (numbers, texts, lists and mappings of them)."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_or_make(
    folder: Path,
    name: str,
    inputs: Callable[[], Mapping[str, str]],
    settings: Mapping[str, Any],
    make: Callable[[], Prepared],
) -> Prepared:
    """Return the entry for these inputs and settings; make it if it is absent or damaged.

    Args:
        folder: Folder of the entries.
        name: Beginning of the names of the entry's files, for people.
        inputs: Returns the hash of each input by its name. It is called before and after ``make``.
        settings: All else that the entry depends on, as plain values.
        make: Makes the entry.

    Returns:
        The entry as it is on disk: arrays are read-only, and memory-mapped if they are large.

    Raises:
        UserError: An input changed while it was read, or the cache folder cannot be written.
    """
    sources = dict(inputs())
    fingerprint = hash_values({"version": VERSION, "inputs": sources, "settings": settings})
    path = folder / f"{re.sub(r'[^0-9A-Za-z_-]+', '_', name)}-{fingerprint[:20]}.json"
    if (entry := _load(_Index.read(path))) is not None:
        return entry
    made = make()
    if dict(inputs()) != sources:
        raise UserError(f"{next(iter(sources))}: changed while it was being read; run again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _new_folder(path) as new:
            files = _write(made, new)
            # Another process may have been faster: then keep its entry.
            index = _Index.read(path)
            if (entry := _load(index)) is None:
                content = {"folder": new.name, "files": files}
                _write_json(new / "index.json", content).replace(path)  # atomic
                if index is not None:  # damaged
                    shutil.rmtree(index.folder, ignore_errors=True)
                entry = _load(_Index.read(path))
    except OSError as error:
        raise UserError(
            f"{folder}: prepared data cannot be written there ({error.strerror or error}); name "
            "another folder with dataset.cache_dir or the variable RECSYS_SSM_CACHE"
        ) from error
    if entry is None:
        raise UserError(
            f"{folder}: prepared data that was written there reads back damaged; check the disk"
        )
    return entry


@contextlib.contextmanager
def _new_folder(index: Path) -> Iterator[Path]:
    """Make a folder beside ``index``; remove it again unless the index names it at the end."""
    new = Path(tempfile.mkdtemp(prefix=f"{index.stem}.", dir=index.parent))
    try:
        yield new
    finally:
        named = _Index.read(index)
        if named is None or named.folder != new:
            shutil.rmtree(new, ignore_errors=True)


def _write(made: Prepared, folder: Path) -> dict[str, list[Any]]:
    """Write the files of an entry; return size, date and checksum of each."""
    for name, array in made.arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    for name, text in made.texts.items():
        pl.DataFrame({name: text}).write_parquet(folder / f"{name}.parquet")
    _write_json(folder / "notes.json", {"notes": made.notes})
    if os.name == "posix":  # elsewhere a read-only file cannot be removed
        for path in folder.iterdir():
            path.chmod(0o444)
    return {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns, _checksum(path)]
        for path in sorted(folder.iterdir())
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


class _Index(NamedTuple):
    """Contents of an index file."""

    folder: Path
    files: dict[str, tuple[int, int, str]]
    """Size, date (mtime_ns) and checksum of each file."""

    @classmethod
    def read(cls, path: Path) -> _Index | None:
        """Read an index; None if it is absent or damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            name = str(content["folder"])
            files = {
                str(file): (int(size), int(date), str(checksum))
                for file, (size, date, checksum) in content["files"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        # Damaged folders are removed: the name must be that of a folder of this entry.
        if not name.startswith(f"{path.stem}.") or Path(name).name != name or not files:
            return None
        return cls(path.parent / name, files)


def _load(index: _Index | None) -> Prepared | None:
    """Load the entry that an index names; None if it is absent or damaged."""
    if index is None:
        return None
    entry = Prepared({}, {})
    n_bytes = sum(size for name, (size, _, _) in index.files.items() if name.endswith(".npy"))
    mode: Literal["r"] | None = "r" if n_bytes > IN_MEMORY else None
    try:
        for name, (size, date, checksum) in index.files.items():
            path = index.folder / name
            stat = path.stat()
            if stat.st_size != size or (stat.st_mtime_ns != date and _checksum(path) != checksum):
                return None
            if path.suffix == ".npy":
                # Indexing a plain view of the map is faster than indexing an np.memmap.
                array = np.asarray(np.load(path, mmap_mode=mode, allow_pickle=False))
                array.flags.writeable = False
                entry.arrays[path.stem] = array
            elif path.suffix == ".parquet":
                entry.texts[path.stem] = pl.read_parquet(path, glob=False)[path.stem]
            else:
                entry.notes = json.loads(path.read_text(encoding="utf-8"))["notes"]
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError):
        return None
    return entry


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
