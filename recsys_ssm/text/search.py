"""Search a catalogue by its titles: BM25 (Robertson and Zaragoza 2009), as the package ``bm25s`` computes it."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from recsys_ssm.text.extra import require

_WORDS = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, and its symbols (an emoji is one); punctuation is left out."""
    found = _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    return [
        word for word in found if word[0].isalnum() or unicodedata.category(word[0])[0] in "SLNM"
    ]


class TitleSearch:
    """A search engine over the titles of a catalogue.

    Args:
        titles: I titles.
        k1: Saturation of repeated words.
        b: Weight of a title's length.
    """

    def __init__(self, titles: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> None:
        bm25s = require("bm25s", "model=gpt4rec")
        self.n_items = len(titles)
        words = [words_of(title) for title in titles]
        self.known = {word for each in words for word in each}
        self.index = bm25s.BM25(k1=k1, b=b)
        logger = logging.getLogger("bm25s")
        level = logger.level
        logger.setLevel(logging.WARNING)  # not a line for each index
        try:
            if self.known:
                self.index.index(words, show_progress=False)
        finally:
            logger.setLevel(level)

    def scores(self, query: str) -> Tensor:
        """Return how well each title answers a query, (I,) float32; 0 where they share no word."""
        words = [word for word in words_of(query) if word in self.known]
        if not words:
            return torch.zeros(self.n_items)
        return torch.as_tensor(self.index.get_scores(words), dtype=torch.float32)
