"""How much of something is done, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

#: What is done, how much of it, of how much (None: not known).
Tally = Callable[[str, int, int | None], None]
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def no_tally(_what: str, _done: int, _total: int | None) -> None:
    """Shows nothing."""


@contextmanager
def tally(console: Console) -> Iterator[Tally]:
    """One line per kind of thing, while the work goes on."""
    columns = (TextColumn("{task.description}"), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        lines: dict[str, int] = {}

        def show(what: str, done: int, total: int | None) -> None:
            count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            if what not in lines:
                lines[what] = bars.add_task(what, total=None, count=count)
            bars.update(lines[what], count=count)  # type: ignore[arg-type]  # its ids are a NewType of int

        yield show


def human_bytes(count: int) -> str:
    """A number of bytes for people, in powers of 1024."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"
