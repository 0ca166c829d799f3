"""Lists over HTTP: pages, pairs, parts."""

from __future__ import annotations

from typing import Any

from mlplat.sdk.listing import every, pages, pairs, slices


def test_pages_follow_the_tokens_and_empty_ones_are_left_out() -> None:
    answers: dict[str, dict[str, Any]] = {
        "": {"runs": [1, 2], "next_page_token": "a"},
        "a": {"next_page_token": "b"},
        "b": {"runs": [3], "next_page_token": ""},
    }
    asked: list[dict[str, str]] = []

    def read(page: dict[str, str]) -> dict[str, Any]:
        asked.append(page)
        return answers[page.get("page_token", "")]

    assert list(pages(read, "runs")) == [[1, 2], [3]]
    assert asked == [{}, {"page_token": "a"}, {"page_token": "b"}]
    assert list(every(read, "runs")) == [1, 2, 3]
    assert list(every(read, "others")) == []


def test_pairs_take_a_missing_value_for_an_empty_one() -> None:
    assert pairs([{"key": "a", "value": "1"}, {"key": "b"}]) == {"a": "1", "b": ""}
    assert pairs(None) == {}


def test_slices_are_whole_and_bounded() -> None:
    assert list(slices([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(slices([], 2)) == []
