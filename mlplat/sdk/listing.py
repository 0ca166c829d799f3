"""Reading what MLflow's REST API lists: pages behind tokens, and keys with values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any


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


def pairs(entries: Iterable[dict[str, str]] | None) -> dict[str, str]:
    """MLflow's list of keys and values as a dict; a value that is absent is empty."""
    return {entry["key"]: entry.get("value", "") for entry in entries or ()}
