"""A pipeline run as people see it in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

STYLES = {
    "SUCCEEDED": "green",
    "FAILED": "bold red",
    "RUNNING": "cyan",
    "SKIPPED": "dim",
    "CANCELLED": "yellow",
    "LOST": "yellow",
}


class Progress:
    """Follows one run: a live table on a terminal, one line per change elsewhere."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._seen: dict[tuple[str, int], str] = {}

    def show(self, status: dict[str, Any]) -> None:
        """Shows a status as ``/api/v1/pipeline-runs/{id}`` answers it."""
        if self._live is not None:
            self._live.update(steps_table(status))
            return
        for name, step in status["steps"].items():
            for line in self._changes(name, step):
                self._console.print(line)

    def _changes(self, name: str, step: dict[str, Any]) -> Iterator[Text]:
        text, state = _describe(step), step["state"]
        retried = state == "PENDING" and step["failures"]
        key = (name, step["attempt"])
        mark = f"{state}{'!' if retried else ''}"
        if (state == "PENDING" and not retried) or self._seen.get(key) == mark:
            return
        self._seen[key] = mark
        yield Text(f"  {name:<16} {text}", style=STYLES.get(state, ""))
        if retried:
            yield Text(f"  {'':<16} retrying after: {_first_line(step['error'])}", style="yellow")


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A ``Progress`` for the duration of a run."""
    if not console.is_terminal:
        yield Progress(console, None)
        return
    with Live(console=console, refresh_per_second=8) as live:
        yield Progress(console, live)


def steps_table(status: dict[str, Any]) -> Group:
    """The run's steps as a table."""
    table = Table(box=None, pad_edge=False)
    for column in ("step", "state", "attempt", "seconds", ""):
        table.add_column(column, justify="right" if column in {"attempt", "seconds"} else "left")
    for name, step in status["steps"].items():
        state = step["state"]
        note = f"retrying after: {_first_line(step['error'])}" if state == "PENDING" and step["failures"] else ""
        note = _first_line(step["error"]) if state in {"FAILED", "SKIPPED"} else note
        table.add_row(
            name,
            Text(_describe(step), style=STYLES.get(state, "")),
            str(step["attempt"] or ""),
            _seconds(step),
            Text(note, style="dim"),
        )
    head = Text(f"{status['pipeline']} · {status['run_id']} · {status['state']}", style="bold")
    return Group(head, table)


def _describe(step: dict[str, Any]) -> str:
    items = step["items"]
    if items is None:
        return str(step["state"])
    done = sum(item["state"] == "SUCCEEDED" for item in items)
    return f"{step['state']} {done}/{len(items)}"


def _seconds(step: dict[str, Any]) -> str:
    if not step["started_at"]:
        return ""
    end = datetime.fromisoformat(step["finished_at"]) if step["finished_at"] else datetime.now(UTC)
    return f"{(end - datetime.fromisoformat(step['started_at'])).total_seconds():.1f}"


def _first_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[0] if lines else ""
