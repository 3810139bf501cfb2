"""Write the recommendations of a job in parts, each of them whole, and make one file of them at the end.

A job that is killed leaves its finished parts beside the output, and goes on from there when it is started again. A
part is a block of users, the same however many processes share the job, so the file is the same as well.

Legend: U users, K places.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import polars as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from polars.io.plugins import register_io_source
from tqdm import tqdm

from recsys_ssm.batches import TopItems
from recsys_ssm.errors import UserError
from recsys_ssm.run.files import write_json

log = logging.getLogger(__name__)

FORMATS = (".parquet", ".csv", ".tsv", ".json", ".jsonl")
"""Formats of the output, by the suffix of its name."""

_CELL = np.dtype([("item", "<i4"), ("score", "<f4")])
_JOB = "job.json"
_EVERY_S = 10.0


class Parts:
    """The finished parts of a job, in a folder.

    Args:
        folder: The folder, beside the output.
        job: All that the recommendations depend on, as plain values.
        n_users: Users of the job.
        part_size: Users of a part; the last may have fewer.
        k: Places of each user.
    """

    def __init__(
        self, folder: Path, job: Mapping[str, Any], n_users: int, part_size: int, k: int
    ) -> None:
        self.folder, self.n_users, self.part_size, self.k = folder, n_users, part_size, k
        self.job = {**job, "users": n_users, "part_size": part_size, "k": k}

    def __len__(self) -> int:
        return -(-self.n_users // self.part_size)

    def users_of(self, number: int) -> range:
        """Return the rows of the users of a part."""
        start = number * self.part_size
        return range(start, min(start + self.part_size, self.n_users))

    def prepare(self) -> list[int]:
        """Make the folder, without the parts of another job; return the numbers of the parts that are missing.

        Raises:
            UserError: The folder cannot be written.
        """
        path = self.folder / _JOB
        try:
            if self.folder.exists():
                if _read_json(path) == json.loads(json.dumps(self.job)):
                    missing = [number for number in range(len(self)) if not self._is_whole(number)]
                    log.info(
                        "resumed: %s of %s parts are in %s",
                        f"{len(self) - len(missing):,}",
                        f"{len(self):,}",
                        self.folder,
                    )
                    return missing
                if not path.is_file() and any(self.folder.iterdir()):
                    raise UserError(
                        f"{self.folder}: needed for the parts of the recommendations, and has other files; remove it, "
                        "or choose another output"
                    )
                log.info("%s: parts of another job are removed", self.folder)
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot write there ({error.strerror}); choose another output"
            ) from error
        write_json(path, self.job)
        return list(range(len(self)))

    def write(self, number: int, top: Sequence[TopItems]) -> None:
        """Write a part from the results of its batches, whole or not at all.

        Raises:
            UserError: The file cannot be written.
        """
        cells = np.empty((len(self.users_of(number)), self.k), dtype=_CELL)
        cells["item"] = torch.cat([each.item for each in top]).numpy()
        cells["score"] = torch.cat([each.score for each in top]).numpy()
        path = self._path(number)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                np.save(file, cells, allow_pickle=False)
            beside.replace(path)
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({error.strerror}); free some space, or choose another folder"
            ) from error

    def count(self) -> int:
        """Return the number of users in finished parts."""
        return sum(
            len(self.users_of(number)) for number in range(len(self)) if self._path(number).exists()
        )

    def frames(
        self, users: pl.Series, items: pl.Series, columns: pl.DataFrame | None = None
    ) -> Iterator[pl.DataFrame]:
        """Iterate over the rows ``user, rank, item, score`` of each part, with names in place of numbers.

        Args:
            users: (U,) names of the users.
            items: (I,) names of the items.
            columns: (I,) more columns of the items.
        """
        for number in range(len(self)):
            cells = np.load(self._path(number), allow_pickle=False)
            row, place = np.nonzero(cells["item"] >= 0)
            item, score = cells["item"][row, place], cells["score"][row, place]
            table = pl.DataFrame(
                {
                    "user": users.gather(row + number * self.part_size),
                    "rank": place + 1,
                    "item": items.gather(item),
                    "score": pl.Series(score).fill_nan(None),
                }
            )
            yield table if columns is None else table.hstack(columns[item])

    def remove(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.npy"

    def _is_whole(self, number: int) -> bool:
        try:
            cells = np.load(self._path(number), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return cells.dtype == _CELL and cells.shape == (len(self.users_of(number)), self.k)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Progress:
    """Print how far a job is: a bar in a terminal, else a line now and then.

    Args:
        parts: The parts of the job.
    """

    def __init__(self, parts: Parts) -> None:
        self.total = parts.n_users
        self._first = self._done = parts.count()
        self._began = self._printed = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=self._first, unit="user")

    def update(self, n_users: int) -> None:
        """Count users that are done."""
        self._done = min(self.total, self._done + n_users)
        if self._bar is not None:
            self._bar.update(self._done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._printed < _EVERY_S:
            return
        self._printed = now
        rate = (self._done - self._first) / (now - self._began)
        log.info(
            "recommend  %s of %s users (%.0f%%), %s a second, %.0f s left",
            f"{self._done:,}",
            f"{self.total:,}",
            100 * self._done / self.total,
            f"{rate:,.0f}",
            (self.total - self._done) / rate,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class PartsWriter(BasePredictionWriter):
    """Write the predictions of each process by parts, and print how far the job is.

    Args:
        parts: Where to write.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__("batch")
        self.parts = parts
        self._batches: list[TopItems] = []
        self._progress: Progress | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._progress = Progress(self.parts)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: TopItems,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self._batches.append(prediction)
        number = int(prediction.user[0]) // self.parts.part_size
        if int(prediction.user[-1]) + 1 == self.parts.users_of(number).stop:
            self.parts.write(number, self._batches)
            self._batches.clear()
        if self._progress is not None:
            self._progress.update(len(prediction.user) * trainer.world_size)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._progress is not None:
            self._progress.close()


def write_frames(path: Path, frames: Iterator[pl.DataFrame], schema: Mapping[str, Any]) -> Path:
    """Write data frames as one file, whole or not at all, a frame in memory at a time; return ``path``.

    Args:
        path: The file; its suffix is one of :data:`FORMATS`.
        frames: Rows, at least one data frame. A frame is a row group of a Parquet file.
        schema: Names and types of the columns.

    Raises:
        UserError: The file cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            if path.suffix.lower() == ".parquet":
                _sink_parquet(beside, frames, schema)
            else:
                with beside.open("wb") as file:
                    for text in _texts(path.suffix.lower(), frames):
                        file.write(text.encode())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, pl.exceptions.ComputeError) as error:
        raise UserError(
            f"cannot write {path} ({getattr(error, 'strerror', None) or error}); free some space, or choose another "
            "folder"
        ) from error
    return path


def _sink_parquet(path: Path, frames: Iterator[pl.DataFrame], schema: Mapping[str, Any]) -> None:
    def read(
        with_columns: list[str] | None, predicate: Any, n_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        for frame in frames:
            yield frame if with_columns is None else frame.select(with_columns)

    register_io_source(read, schema=pl.Schema(schema)).sink_parquet(
        path, row_group_size=_ROWS, maintain_order=True, engine="streaming"
    )


_ROWS = 1 << 18
"""Rows of a row group."""


def _texts(suffix: str, frames: Iterator[pl.DataFrame]) -> Iterator[str]:
    """Return the pieces of a text file."""
    for number, frame in enumerate(frames):
        if suffix == ".json":
            yield ("," if number else "[") + frame.write_json()[1:-1]
        elif suffix == ".jsonl":
            yield frame.write_ndjson()
        else:
            separator = "\t" if suffix == ".tsv" else ","
            yield frame.write_csv(include_header=number == 0, separator=separator)
    if suffix == ".json":
        yield "]"


class ToRank(L.LightningDataModule):
    """Load the users of the parts that a process has to rank for.

    Args:
        loader: Makes the loader of some parts.
        parts: The parts of the job.
    """

    def __init__(self, loader: Callable[[Sequence[int]], Any], parts: Parts) -> None:
        super().__init__()
        self.loader, self.parts = loader, parts
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def setup(self, stage: str) -> None:
        """Find the missing parts, in one process for all."""
        trainer = self.trainer
        assert trainer is not None
        missing = self.parts.prepare() if trainer.is_global_zero else []
        self._missing = trainer.strategy.broadcast(missing)

    def predict_dataloader(self) -> Any:
        assert self.trainer is not None
        return self.loader(self._missing[self.trainer.global_rank :: self.trainer.world_size])
