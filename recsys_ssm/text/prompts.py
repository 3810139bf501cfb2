"""Put titles into prompts: token by token, so that each title and the whole prompt have their limits.

A history that is too long loses its oldest items: the latest ones say most about what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def latest_that_fit(
    titles: Sequence[Sequence[int]], separator: Sequence[int], room: int
) -> list[int]:
    """Join the tokens of titles, oldest first; leave out the oldest titles where there is no room for all.

    Args:
        titles: Tokens of each title, the latest last.
        separator: Tokens between two titles.
        room: Tokens that the result may have. Of a latest title that is longer the beginning is kept.

    Returns:
        The tokens.
    """
    parts: list[Sequence[int]] = []
    used = 0
    for title in reversed(titles):
        cost = len(title) + (len(separator) if parts else 0)
        if used + cost > room:
            if not parts:
                parts.append(title[: max(room, 0)])
            break
        parts += [separator, title] if parts else [title]
        used += cost
    return [token for part in reversed(parts) for token in part]


def padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Put rows of tokens into one tensor.

    Args:
        rows: Tokens of each row, at least one row.
        pad: Token of padding, which the mask leaves out.
        left: Put the padding before the tokens, as a model that writes on needs it.

    Returns:
        Tokens and mask (1 at a token, 0 at padding), (B, L) int64 each.
    """
    length = max(1, *(len(row) for row in rows))
    tokens = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[number, where] = torch.tensor(row, dtype=torch.long)
        mask[number, where] = 1
    return tokens, mask
