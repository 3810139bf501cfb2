"""Record the recommendations of a test: one row for each user, written to a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import polars as pl
import torch
import torch.distributed as dist
from torch import Tensor


class _Block(NamedTuple):
    user: Tensor
    recommended: Tensor
    relevant: list[list[int]]


class Rankings:
    """Recommendations of a test, collected batch by batch and over all processes.

    Legend: U users of a batch, K places.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def clear(self) -> None:
        """Remove all users."""
        self._blocks.clear()

    def add(self, user: Tensor, recommended: Tensor, relevant: Tensor) -> None:
        """Add a batch.

        Args:
            user: (U,) rows of the user table.
            recommended: (U, K) catalogue indices, best first; -1 where no item was left to recommend.
            relevant: (U, I) bool; or (U,) catalogue indices, where each user has one relevant item.
        """
        if relevant.dim() == 1:
            lists = [[item] for item in relevant.tolist()]
        else:
            owner, item = relevant.nonzero(as_tuple=True)
            counts = torch.bincount(owner, minlength=user.numel()).tolist()
            lists = [part.tolist() for part in item.cpu().split(counts)]
        self._blocks.append(_Block(user.cpu(), recommended.to("cpu", torch.int32), lists))

    def frame(self) -> pl.DataFrame:
        """Return a table by user: ``user``, ``n_relevant``, ``recommended``, ``relevant`` (lists of catalogue indices).

        With several processes, each of them must call this method, and each gets all users.
        """
        blocks: Sequence[_Block] = self._blocks
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered: list[list[_Block]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, self._blocks)
            blocks = [block for part in gathered for block in part]
        relevant = [each for block in blocks for each in block.relevant]
        frame = pl.DataFrame(
            {
                "user": [row for block in blocks for row in block.user.tolist()],
                "n_relevant": [len(each) for each in relevant],
                "recommended": [
                    [item for item in row if item >= 0]
                    for block in blocks
                    for row in block.recommended.tolist()
                ],
                "relevant": relevant,
            },
            schema={
                "user": pl.Int64,
                "n_relevant": pl.Int32,
                "recommended": pl.List(pl.Int32),
                "relevant": pl.List(pl.Int32),
            },
        )
        return frame.sort("user")
