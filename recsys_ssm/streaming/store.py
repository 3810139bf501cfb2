"""Keep the states of users within bounds: some in memory, more in a file, those used longest ago in neither.

Legend: B users, W numbers of a state.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys_ssm.errors import UserError


class Stored(NamedTuple):
    """States of users."""

    rows: Tensor
    """(B, W)."""
    read: np.ndarray
    """(B,) int64, events of the user's history behind the state; -1: the store does not have it."""
    tokens: np.ndarray
    """(B,) int64, tokens behind the state, which are fewer where the catalogue does not have an item."""


class StateStore:
    """Rows of numbers by user. Of too many, those used longest ago go to the file, then away.

    The file is a temporary one: it is removed when the process ends, also by a kill.

    Args:
        width: W.
        in_memory: Most users in memory, at least 1.
        on_disk: Most users in the file; 0: there is no file.
        folder: Folder of the file; None: that of temporary files.
        dtype: Type of the numbers, ``float32`` or ``float64``.

    Raises:
        UserError: The file cannot be written.
    """

    def __init__(
        self,
        width: int,
        *,
        in_memory: int,
        on_disk: int = 0,
        folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.in_memory, self.on_disk = in_memory, on_disk
        # Pages that no user needs yet are not in memory.
        self._rows = torch.empty(in_memory, width, dtype=dtype)
        self._counts = np.zeros((2, in_memory), np.int64)
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._disk: np.memmap | None = None
        if on_disk and width:
            kind = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
            self._disk = _mapped(folder, kind, on_disk, width)
        self._disk_counts = np.zeros((2, on_disk), np.int64)
        self._disk_slots: OrderedDict[str, int] = OrderedDict()
        self._free_disk: list[int] = []

    def __len__(self) -> int:
        return len(self._slots) + len(self._disk_slots)

    @property
    def n_on_disk(self) -> int:
        """Users whose state is in the file."""
        return len(self._disk_slots)

    def load(self, users: Sequence[str]) -> Stored:
        """Return copies of the states of some users, each at most once; rows of absent states hold any numbers."""
        found = Stored(
            torch.empty(len(users), self._rows.shape[1], dtype=self._rows.dtype),
            np.full(len(users), -1, np.int64),
            np.zeros(len(users), np.int64),
        )
        places, slots = [], []
        for place, user in enumerate(users):
            if (slot := self._slots.get(user)) is not None:
                self._slots.move_to_end(user)
                places.append(place)
                slots.append(slot)
            elif (slot := self._disk_slots.get(user)) is not None:
                self._disk_slots.move_to_end(user)
                if self._disk is not None:
                    found.rows[place] = torch.from_numpy(np.array(self._disk[slot]))
                found.read[place], found.tokens[place] = self._disk_counts[:, slot]
        if slots:
            found.rows[places] = self._rows[slots]
            found.read[places], found.tokens[places] = self._counts[:, slots]
        return found

    def save(self, users: Sequence[str], states: Stored) -> None:
        """Keep the states of at most ``in_memory`` users, each at most once."""
        slots = []
        for user in users:
            slot = self._slots.get(user)
            if slot is None:
                slot = len(self._slots)
                if slot == self.in_memory:
                    oldest, slot = self._slots.popitem(last=False)
                    self._to_disk(oldest, slot)
                self._slots[user] = slot
                if (stale := self._disk_slots.pop(user, None)) is not None:
                    self._free_disk.append(stale)
            else:
                self._slots.move_to_end(user)
            slots.append(slot)
        self._rows[slots] = states.rows
        self._counts[:, slots] = states.read, states.tokens

    def _to_disk(self, user: str, slot: int) -> None:
        """Move a user's state from memory to the file, where there is one."""
        if not self.on_disk:
            return
        if self._free_disk:
            place = self._free_disk.pop()
        elif (place := len(self._disk_slots)) == self.on_disk:
            _, place = self._disk_slots.popitem(last=False)
        self._disk_slots[user] = place
        if self._disk is not None:
            self._disk[place] = self._rows[slot].numpy()
        self._disk_counts[:, place] = self._counts[:, slot]


def _mapped(folder: Path | None, kind: np.dtype, n_users: int, width: int) -> np.memmap:
    """Return a mapped file with room for the states of ``n_users``, (n_users, W)."""
    n_bytes = n_users * width * kind.itemsize
    where = Path(folder or tempfile.gettempdir())
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where) as file:
            # A write to a mapped file on a full disk ends the process, so the room is taken now.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            return np.memmap(file, kind, "r+", shape=(n_users, width))
    except OSError as error:
        raise UserError(
            f"{where}: no room for the states of {n_users:,} users, {n_bytes / 2**30:.2f} GiB ({error.strerror}); "
            "give a smaller on_disk, or another folder"
        ) from error
