"""The search engine over titles: BM25 by its formula, on titles, in any script."""

from __future__ import annotations

import logging
import math

import pytest
import torch

pytest.importorskip("bm25s", reason="the extra text is not installed")

from recsys_ssm.text.search import TitleSearch, words_of

TITLES = ["Toy Story (1995)", "toy soldiers", "Story of Us, The (1999)", "Toy toy toy"]


def bm25(titles: list[str], query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Compute Lucene's BM25 word by word."""
    words = [words_of(title) for title in titles]
    mean = sum(map(len, words)) / len(words)
    scores = [0.0] * len(titles)
    for word in words_of(query):
        df = sum(word in each for each in words)
        if not df:
            continue
        idf = math.log(1 + (len(titles) - df + 0.5) / (df + 0.5))
        for i, each in enumerate(words):
            tf = each.count(word)
            scores[i] += idf * tf / (tf + k1 * (1 - b + b * len(each) / mean))
    return scores


@pytest.mark.parametrize(
    "query", ["toy story", "TOY", "the us of 1999", "story nothing", "toy toy"]
)
@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4)])
def test_scores_are_those_of_the_formula(query: str, k1: float, b: float) -> None:
    found = TitleSearch(TITLES, k1=k1, b=b).scores(query)
    assert found.tolist() == pytest.approx(bm25(TITLES, query, k1, b), rel=1e-5)


def test_a_title_finds_its_own_item_and_an_id_finds_none() -> None:
    search = TitleSearch(TITLES)
    for i, title in enumerate(TITLES):
        assert int(search.scores(title).argmax()) == i
    assert not search.scores("item0").any() and not search.scores("").any()


def test_words_of_any_script() -> None:
    assert words_of("C\u00e9r\u00e9monie, LA!") == ["c\u00e9r\u00e9monie", "la"]
    assert words_of("\u05e9\u05dc\u05d5\u05dd (x)") == ["\u05e9\u05dc\u05d5\u05dd", "x"]
    assert words_of("\N{OK HAND SIGN} ok") == ["\N{OK HAND SIGN}", "ok"]
    search = TitleSearch(["\N{OK HAND SIGN}", "\u05e9\u05dc\u05d5\u05dd", "x"])
    assert (
        search.scores("\N{OK HAND SIGN}").argmax() == 0
        and search.scores("\u05e9\u05dc\u05d5\u05dd")[1] > 0
    )


def test_titles_without_a_word_are_never_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert TitleSearch(["!!!", "..."]).scores("!!! ...").equal(torch.zeros(2))
        TitleSearch(TITLES)
    assert not caplog.records
