"""Prompts: the latest items stay, titles are never torn apart, and padding is masked."""

from __future__ import annotations

from recsys_ssm.text.prompts import latest_that_fit, padded

TITLES = [[1, 1], [2, 2, 2], [3], [4, 4]]


def test_the_oldest_titles_are_left_out() -> None:
    whole = [1, 1, 0, 2, 2, 2, 0, 3, 0, 4, 4]
    assert latest_that_fit(TITLES, [0], 11) == whole
    assert latest_that_fit(TITLES, [0], 10) == whole[3:]
    assert latest_that_fit(TITLES, [0], 4) == [3, 0, 4, 4]
    assert latest_that_fit(TITLES, [0], 3) == [4, 4]
    assert latest_that_fit(TITLES, [0, 0], 5) == [3, 0, 0, 4, 4]
    for room in range(12):
        assert len(latest_that_fit(TITLES, [0], room)) <= room


def test_of_a_latest_title_that_is_too_long_the_beginning_stays() -> None:
    assert latest_that_fit([[1], [2, 3, 4]], [0], 2) == [2, 3]
    assert latest_that_fit([[1]], [0], 0) == [] and latest_that_fit([], [0], 5) == []


def test_padding_is_masked_on_either_side() -> None:
    tokens, mask = padded([[1, 2], [3]], 9)
    assert tokens.tolist() == [[1, 2], [3, 9]] and mask.tolist() == [[1, 1], [1, 0]]
    tokens, mask = padded([[1, 2], [3], []], 9, left=True)
    assert tokens.tolist() == [[1, 2], [9, 3], [9, 9]]
    assert mask.tolist() == [[1, 1], [0, 1], [0, 0]]
