"""Read the titles of a catalogue's items: what language models know of an item.

A title is one line of text. Items without one are called by their id, and the dataset's notes say how many they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recsys_ssm.data.cache import hash_frame, hash_path
from recsys_ssm.data.columns import FeatureTable, Table, is_frame
from recsys_ssm.data.files import shown
from recsys_ssm.errors import UserError
from recsys_ssm.features import text_column

LONGEST = 1000
"""Characters of a title that are kept; a longer one is cut at a word."""

_IDLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
"""White space, control characters, and marks that change the direction of what follows them."""


def clean(title: str) -> str:
    """Return a title as one line: runs of white space and control characters become a blank."""
    return _IDLE.sub(" ", title).strip()


def shortened(title: str) -> str:
    """Return a title of at most :data:`LONGEST` characters, cut at a word if there is one."""
    if len(title) <= LONGEST:
        return title
    head, blank, _ = title[: LONGEST + 1].rpartition(" ")
    return head if blank and head else title[:LONGEST]


def fallback(item_id: str) -> str:
    """Return the title of an item that has none."""
    return f"item {item_id}"


@dataclass(frozen=True)
class TitleTable:
    """The file or data frame with a title for each item.

    Args:
        source: The file, several of which the first that exists is read, or a data frame; None: there is none.
        key: Column of item ids.
        title: Column of titles; None: there is none.
        names: Names of the columns of a file without a header line.
        separator: Separator between the cells of a file; None: the format's own.
        names_option, separator_option: Options that set ``names`` and ``separator``, for messages.

    Raises:
        UserError: The columns of ids and of titles are the same.
    """

    source: Table | Sequence[str | Path] | None
    key: str
    title: str | None
    names: tuple[str, ...] = ()
    separator: str | None = None
    names_option: str = "dataset.title_names"
    separator_option: str = "dataset.items_separator"

    def __post_init__(self) -> None:
        if self.title is not None and self.title == self.key:
            raise UserError(
                f"dataset.item_title={self.title}: that is the column of ids; name the column of titles"
            )

    def find(self, fetch: Callable[[], Path | None], origin: str | None) -> Table:
        """Return the data frame, or the first file that exists.

        Args:
            fetch: Function that downloads the file, or returns None if that is not possible.
            origin: Where people can get the file.

        Raises:
            UserError: There is no column of titles, or no such file.
        """
        if self.title is None or self.source is None:
            raise UserError(
                "dataset.item_title: not set, and language models read the titles of items; name the file with "
                "dataset.items=<file> and its column of titles with dataset.item_title=<column>"
            )
        if is_frame(self.source):
            return self.source
        named: Any = [self.source] if isinstance(self.source, str | Path) else self.source
        paths = [Path(path) for path in named]
        for path in paths:
            if path.is_file() or path.is_dir():
                return path
        if (fetched := fetch()) is not None:
            return fetched
        raise UserError(
            f"{paths[0]}: no such file (looked in {paths[0].parent.resolve()}), and language models read the titles of "
            "items; put "
            + " or ".join(path.name for path in paths)
            + " there"
            + (f", from {origin}," if origin else "")
            + " or name another file with dataset.titles"
        )

    def read(
        self,
        source: Table,
        ids: Sequence[str],
        notes: list[str],
        sources: dict[str, str],
        cache: Path,
    ) -> list[str]:
        """Return the titles of ``ids``, in their order; none is empty.

        Args:
            source: Result of :meth:`find`.
            ids: Ids of the catalogue's items.
            notes: Notes to add to: how many titles were read, and which items have none.
            sources: Hashes of inputs by name, to add to.
            cache: Cache folder.

        Raises:
            UserError: The table cannot be read, lacks a column, or has an item twice or none of the items.
        """
        assert self.title is not None
        table = FeatureTable(
            "item",
            source,
            self.key,
            categorical=(self.title,),
            names=self.names,
            separator=self.separator,
            names_option=self.names_option,
            separator_option=self.separator_option,
        )
        frame, where = table.read(notes)
        path = source if isinstance(source, str | Path) else None
        sources[where if path is not None else "titles"] = (
            hash_frame(frame) if path is None else hash_path(Path(path), cache)
        )
        catalogue = pl.Series(ids, dtype=pl.String)
        unknown = table.unknown(frame, catalogue, where)
        cells = text_column(table.join(catalogue, frame), self.title, where).to_list()
        cleaned = [clean(cell or "") for cell in cells]
        empty = [item for item, title in zip(ids, cleaned, strict=True) if not title]
        long = [title for title in cleaned if len(title) > LONGEST]
        titles = [
            shortened(title) if title else fallback(item)
            for item, title in zip(ids, cleaned, strict=True)
        ]
        n_rows, n_used = frame.height, len(ids) - unknown.len()
        note = f"{where}: titles of {len(ids) - len(empty):,} of {len(ids):,} items"
        if empty:
            note += (
                f"; {len(empty):,} items have none ({unknown.len():,} without a row, {len(empty) - unknown.len():,} "
                f"with an empty cell), the first is {shown(empty[0])}: called by their id, as "
                f"{shown(fallback(empty[0]))}"
            )
        if n_rows > n_used:
            note += f"; {n_rows - n_used:,} rows are of items without an interaction: left out"
        if long:
            note += f"; {len(long):,} titles have more than {LONGEST:,} characters: cut at a word"
        notes.append(note)
        return titles
