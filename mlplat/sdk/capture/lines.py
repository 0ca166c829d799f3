"""Terminal output as plain lines: what a progress bar drew over is left out."""

from __future__ import annotations

import re

#: A line that grows longer is passed on in pieces.
MAX_LINE = 64 * 1024
#: Lines that cursor movements can still reach.
MAX_OPEN_LINES = 64
#: For so many rests after the last "cursor up" lines stay open.
CLIMB_LASTS = 3
#: Line ends, and the two escape sequences by which bars redraw: cursor up, and erase in line.
_CONTROL = re.compile(r"(\r*\n|\r|\x1b\[\d{0,3}A|\x1b\[\d?K)")


class Lines:
    """Collapses one stream of text.

    A carriage return starts the line over: what follows replaces it. "Cursor up", which stacks of bars
    use, does the same with an earlier line; lines stay open while that goes on.
    """

    def __init__(self) -> None:
        self._open = [""]
        self._row = 0
        self._over = False
        self._climbs = 0
        self._unfinished = False
        self._ready: list[str] = []

    def feed(self, text: str) -> None:
        """Takes what was written."""
        if "\r" not in text and "\x1b" not in text and len(self._open) == 1 and not (self._over or self._climbs):
            self._feed_plain(text)
            return
        for index, part in enumerate(_CONTROL.split(text)):
            if index % 2 == 0:
                if part:
                    self._put(part)
            elif part.endswith("\n"):
                self._next_line()
            elif part == "\r":
                self._over = True
            elif part.endswith("A"):
                self._climb(int(part[2:-1] or 1))
            elif part == "\x1b[2K" or (self._over and part in {"\x1b[K", "\x1b[0K"}):
                self._open[self._row] = ""

    def take(self) -> str:
        """The lines that are complete."""
        text, self._ready = "".join(self._ready), []
        return text

    def rest(self, *, everything: bool = False) -> None:
        """Some time went by: completes lines that nothing redraws any more, or all with ``everything``.

        A line that was passed on unfinished goes on where it stopped, or anew in a line of its own.
        """
        self._climbs = max(0, self._climbs - 1)
        if everything:
            self._finish_open()
        elif not self._climbs:
            self._settle(self._row)

    def _feed_plain(self, text: str) -> None:
        whole, newline, rest = (self._open[0] + text).rpartition("\n")
        if newline:
            self._ready.append(whole + newline)
            self._unfinished = False
        self._open[0] = rest
        self._bound()

    def _put(self, text: str) -> None:
        if self._over:
            self._break_unfinished()
            self._open[self._row] = text
            self._over = False
        else:
            self._open[self._row] += text
        self._bound()

    def _bound(self) -> None:
        if len(self._open[self._row]) > MAX_LINE:
            self._finish_open()

    def _next_line(self) -> None:
        self._row += 1
        # On a line that is there already the cursor is at its start, and what follows replaces it.
        self._over = self._row < len(self._open)
        if not self._over:
            self._open.append("")
        if not self._climbs:
            self._settle(self._row)
        elif len(self._open) > MAX_OPEN_LINES:
            self._settle(min(self._row, MAX_OPEN_LINES // 2))

    def _climb(self, count: int) -> None:
        self._break_unfinished()
        self._climbs = CLIMB_LASTS
        # Lines above the open ones have been passed on: what is drawn there now gets lines of its own.
        above = min(max(0, count - self._row), MAX_OPEN_LINES - len(self._open))
        self._open = [""] * above + self._open
        self._row = max(0, self._row + above - count)
        self._over = True

    def _settle(self, count: int) -> None:
        """Passes the first ``count`` open lines on."""
        for line in self._open[:count]:
            self._ready.append(f"{line}\n")
            self._unfinished = False
        self._open = self._open[count:]
        self._row -= count

    def _finish_open(self) -> None:
        text = "\n".join(self._open)
        if text:
            self._ready.append(text)
            self._unfinished = True
        self._open, self._row = [""], 0

    def _break_unfinished(self) -> None:
        if self._unfinished:
            self._ready.append("\n")
            self._unfinished = False
