"""Logs of several attempts as one text."""

from __future__ import annotations


class Headings:
    """Puts a heading wherever the text goes on with another attempt."""

    def __init__(self) -> None:
        self._last: tuple[str, int | None, int] | None = None
        self._at_line_start = True

    def add(self, step: str, item: int | None, attempt: int, state: str, text: str) -> str:
        """What to print for a part of an attempt's log; ``item`` is None for a step without items."""
        head = ""
        if (step, item, attempt) != self._last:
            self._last = (step, item, attempt)
            label = step if item is None else f"{step}[{item}]"
            head = f"{self.close()}── {label} · attempt {attempt} · {state}\n"
            self._at_line_start = True
        if text:
            self._at_line_start = text.endswith("\n")
        return head + text

    def close(self) -> str:
        """A line end, if one is missing."""
        return "" if self._at_line_start else "\n"
