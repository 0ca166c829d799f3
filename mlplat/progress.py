"""Following a pipeline run in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from mlplat.run_view import STYLES, describe, errors_of, first_line, now_utc, run_picture
from mlplat.sdk.live import LiveRun, RunEvent

REFRESH_PER_SECOND = 4
MAX_LINE = 300
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


class Progress:
    """Follows one run: a live picture on a terminal, one line per change elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._run = LiveRun()
        self._seen: dict[tuple[str, int], str] = {}
        self._last_lines: dict[str, str] = {}
        #: The picture follows the run. Not so on a terminal that cannot move its cursor.
        self.is_live = console.is_terminal and not console.is_dumb_terminal

    @property
    def status(self) -> dict[str, Any]:
        """The run after the events so far; empty before the first."""
        return self._run.status

    def show(self, event: RunEvent) -> None:
        """Takes an event; without a live picture, prints what it changed."""
        if event.kind == "log":
            self._note_line(event.data)
            return
        self._run.apply(event)
        if self.is_live:
            return
        for name, step in self.status["steps"].items():
            for line in self._changes(name, step):
                self._console.print(line)

    def picture(self, *, whole: bool = False) -> RenderableType:
        """The run as it is now; the whole of it, or as much as the terminal has room for."""
        if not self.status:
            return Text("…")
        encoding = self._console.encoding.lower()
        return run_picture(
            self.status, self._run.dag, self._last_lines, now=now_utc(), rows=None if whole else self._console.height,
            ascii_only=not encoding.startswith("utf"),
        )  # fmt: skip

    def __rich__(self) -> RenderableType:
        return self.picture()

    def _note_line(self, data: dict[str, Any]) -> None:
        lines = [line for line in _CONTROLS.sub("\n", data["text"]).splitlines() if line.strip()]
        if lines:
            item = "" if data["item"] is None else f"[{data['item']}] "
            self._last_lines[data["step"]] = f"{item}{lines[-1].strip()}"[:MAX_LINE]

    def _changes(self, name: str, step: dict[str, Any]) -> Iterator[Text]:
        text, state = describe(step), step["state"]
        retried = state == "PENDING" and step["failures"]
        key = (name, step["attempt"])
        mark = f"{text if step['items'] is not None else state}{'!' if retried else ''}"
        if (state == "PENDING" and not retried) or self._seen.get(key) == mark:
            return
        self._seen[key] = mark
        yield Text(f"  {name:<16} {text}", style=STYLES.get(state, ""))
        if retried:
            yield Text(f"  {'':<16} retrying after: {first_line(step['error'])}", style="yellow")


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A ``Progress`` for the duration of a run. A live picture stays, whole, when it is over."""
    shown = Progress(console)
    if not shown.is_live:
        yield shown
        return
    # The picture is drawn from the run as it is at each refresh, so that times go on between events.
    with Live(shown, console=console, refresh_per_second=REFRESH_PER_SECOND, transient=True):
        yield shown
    if shown.status:
        console.print(shown.picture(whole=True))


def follow(console: Console, events: Iterable[RunEvent], *, errors: bool = True) -> dict[str, Any]:
    """Shows a run to its end, with its errors, and returns its last status."""
    with progress(console) as shown:
        for event in events:
            shown.show(event)
    if errors and shown.status["state"] == "FAILED":
        console.print(Group(*errors_of(shown.status)))
    return shown.status
