"""Lists over HTTP: pages behind tokens, keys with values, and long lists in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

Item = TypeVar("Item")


def pages(read: Callable[[dict[str, str]], dict[str, Any]], items: str) -> Iterator[list[Any]]:
    """The pages of a listing, each with something in it.

    Args:
        read: the answer to the request with these fields more, which say which page is wanted.
        items: the field of the answer that has the items.
    """
    wanted: dict[str, str] = {}
    while True:
        answer = read(wanted)
        if answer.get(items):
            yield answer[items]
        if not answer.get("next_page_token"):
            return
        wanted = {"page_token": answer["next_page_token"]}


def every(read: Callable[[dict[str, str]], dict[str, Any]], items: str) -> Iterator[Any]:
    """The items of all ``pages``."""
    return chain.from_iterable(pages(read, items))


def slices(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in parts of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def pairs(entries: Iterable[dict[str, str]] | None) -> dict[str, str]:
    """MLflow's list of keys and values as a dict; a value that is absent is empty."""
    return {entry["key"]: entry.get("value", "") for entry in entries or ()}
