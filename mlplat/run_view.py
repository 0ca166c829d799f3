"""A pipeline run as a picture for the terminal: its graph, states, progress, last words and errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

STYLES = {
    "SUCCEEDED": "green",
    "FAILED": "bold red",
    "RUNNING": "cyan",
    "SKIPPED": "dim",
    "PENDING": "dim",
    "CANCELLED": "yellow",
    "LOST": "yellow",
}
SYMBOLS = {
    "PENDING": "○", "QUEUED": "◌", "RUNNING": "●", "SUCCEEDED": "✓", "FAILED": "✗", "CANCELLED": "⊘", "SKIPPED": "-",
}  # fmt: skip
ASCII_SYMBOLS = {
    "PENDING": ".", "QUEUED": ":", "RUNNING": ">", "SUCCEEDED": "+", "FAILED": "x", "CANCELLED": "/", "SKIPPED": "-",
}  # fmt: skip
GUIDES = ("├─ ", "└─ ", "│  ", "   ")
ASCII_GUIDES = ("|- ", "`- ", "|  ", "   ")
BAR_WIDTH = 14
#: Deeper steps are not indented any further.
MAX_INDENT = 12
MAX_NOTE = 200
MAX_ERROR_LINES = 12
MAX_ERRORS = 5
#: Rows beside the steps: the heading, the columns and what was folded.
OTHER_ROWS = 6


@dataclass(frozen=True)
class Branch:
    """A step's place in the tree: ``guide`` is what stands before its name, ``also`` the needs that it is not under."""

    name: str
    guide: str
    also: tuple[str, ...] = ()


def tree(dag: Iterable[Mapping[str, Any]], *, ascii_only: bool = False) -> list[Branch]:
    """The graph as a tree, each step under the last of its needs; top to bottom is an order in which they may run.

    Only where the graph branches are steps indented; the finally steps are a tree of their own.
    """
    steps = list(dag)
    main = [step for step in steps if not step["is_finally"]]
    guides = ASCII_GUIDES if ascii_only else GUIDES
    return [*_tree(main, guides), *_tree([step for step in steps if step["is_finally"]], guides)]


def _tree(steps: list[Mapping[str, Any]], guides: tuple[str, str, str, str]) -> Iterator[Branch]:
    needs = {step["name"]: list(step["needs"]) for step in steps}
    rank = {name: place for place, name in enumerate(needs)}
    parents = _parents(needs, rank)
    children: dict[str | None, list[str]] = {}
    for name, parent in parents.items():
        children.setdefault(parent, []).append(name)
    tee, last, line, blank = guides
    # Not by recursion: a chain may have ten thousand steps. An entry has what the guides of its children begin with.
    waiting: list[tuple[str | None, str, str]] = [(None, "", "")]
    while waiting:
        step, guide, below = waiting.pop()
        if step is not None:
            yield Branch(step, guide, tuple(need for need in needs[step] if need != parents[step]))
        under = children.get(step, [])
        if len(under) == 1 or len(below) >= len(blank) * MAX_INDENT:
            waiting += [(child, below, below) for child in reversed(under)]
            continue
        waiting += [
            (child, below + (last if child == under[-1] else tee), below + (blank if child == under[-1] else line))
            for child in reversed(under)
        ]


def _parents(needs: Mapping[str, list[str]], rank: Mapping[str, int]) -> dict[str, str | None]:
    """The deepest need of each step, in an order in which the steps may run."""
    sorter = TopologicalSorter(needs)
    sorter.prepare()
    depth: dict[str | None, int] = {None: -1}
    parents: dict[str, str | None] = {}
    while sorter.is_active():
        for name in sorted(sorter.get_ready(), key=rank.__getitem__):
            parents[name] = max(needs[name], key=lambda need: (depth[need], rank[need]), default=None)
            depth[name] = depth[parents[name]] + 1
            sorter.done(name)
    return parents


def run_picture(
    status: Mapping[str, Any],
    dag: list[dict[str, Any]],
    last_lines: Mapping[str, str],
    *,
    now: datetime,
    rows: int | None = None,
    ascii_only: bool = False,
) -> RenderableType:
    """The run as it is.

    Args:
        status: as ``LiveRun`` has it.
        dag: its graph; without one the steps are a list.
        last_lines: the last line that each running step printed.
        now: for the times of what is under way.
        rows: the height to keep to, by folding what needs no attention.
        ascii_only: without symbols that some terminals do not have.
    """
    branches = tree(dag, ascii_only=ascii_only) if dag else [Branch(name, "") for name in status["steps"]]
    finals = {step["name"] for step in dag if step["is_finally"]}
    shown, folded = _fold(branches, status["steps"], rows)
    running = _last_attempts(status["attempts"])
    table = Table(box=None, pad_edge=False, show_edge=False)
    for column in ("step", "state", "try", "waited", "ran", "", ""):
        table.add_column(column, justify="right" if column in {"try", "waited", "ran"} else "left", no_wrap=True)
    table.columns[-1].overflow = "ellipsis"
    for branch in shown:
        step = status["steps"][branch.name]
        attempt = running.get(branch.name)
        table.add_row(
            _name(branch, step["state"], branch.name in finals, ascii_only),
            Text(describe(step), style=STYLES.get(step["state"], "")),
            str(step["attempt"] or ""),
            *_times(step, attempt, now),
            _bar(step, attempt),
            Text(_note(step, attempt, last_lines.get(branch.name, ""), branch), style="dim"),
        )
    return Group(_heading(status, now), table, *([Text(folded, style="dim")] if folded else []))


def errors_of(status: Mapping[str, Any]) -> Iterator[Text]:
    """What went wrong, at the end of a run: the first errors, each with its last lines."""
    failed = [(name, step) for name, step in status["steps"].items() if step["state"] == "FAILED"]
    for name, step in failed[:MAX_ERRORS]:
        lines = (step["error"] or "").strip().splitlines()
        shown = lines if len(lines) <= MAX_ERROR_LINES else [lines[0], "…", *lines[-MAX_ERROR_LINES:]]
        yield Text(f"\n{name} failed", style="bold red")
        yield Text("\n".join(f"  {line}" for line in shown))
    if len(failed) > MAX_ERRORS:
        yield Text(f"\n… and {len(failed) - MAX_ERRORS} more failed steps", style="bold red")


def describe(step: Mapping[str, Any]) -> str:
    """A step's state; of a fan-out with the numbers of its items."""
    items = step["items"]
    if items is None:
        return str(step["state"])
    counts = Counter(item["state"] for item in items)
    more = [
        f"{counts[state]} {word}" for state, word in (("RUNNING", "running"), ("FAILED", "failed")) if counts[state]
    ]
    return " · ".join([f"{step['state']} {counts['SUCCEEDED']}/{len(items)}", *more])


def first_line(text: str | None) -> str:
    """The first line that is not empty."""
    lines = (text or "").strip().splitlines()
    return lines[0] if lines else ""


def _heading(status: Mapping[str, Any], now: datetime) -> Text:
    state = status["state"]
    text = Text(f"{status['pipeline']} · {status['run_id']} · ", style="bold")
    text.append(state, STYLES.get(state, ""))
    if status["stopping"] and state == "RUNNING":
        text.append(" · stopping", "yellow")
    text.append(f" · waited {_span(status['created_at'], status['started_at'] or status['finished_at'], now)}")
    if status["started_at"]:
        text.append(f" · ran {_span(status['started_at'], status['finished_at'], now)}")
    return text


def _name(branch: Branch, state: str, is_finally: bool, ascii_only: bool) -> Text:
    symbol = (ASCII_SYMBOLS if ascii_only else SYMBOLS).get(state, "?")
    name = f"finally {branch.name}" if is_finally and not branch.guide else branch.name
    return Text.assemble((branch.guide, "dim"), (f"{symbol} ", STYLES.get(state, "")), name)


def _fold(branches: list[Branch], steps: Mapping[str, Mapping[str, Any]], rows: int | None) -> tuple[list[Branch], str]:
    room = None if rows is None else max(3, rows - OTHER_ROWS)
    if room is None or len(branches) <= room:
        return branches, ""
    by_need = sorted(range(len(branches)), key=lambda place: _URGENCY.get(steps[branches[place].name]["state"], 9))
    kept = set(by_need[:room])
    hidden = Counter(steps[branch.name]["state"] for place, branch in enumerate(branches) if place not in kept)
    counts = ", ".join(f"{count} {state.lower()}" for state, count in sorted(hidden.items()))
    return [branch for place, branch in enumerate(branches) if place in kept], f"… and {counts}"


#: What is shown first when there is no room for all.
_URGENCY = {"RUNNING": 0, "FAILED": 1, "QUEUED": 2, "CANCELLED": 3, "PENDING": 4, "SUCCEEDED": 5, "SKIPPED": 6}


def _last_attempts(attempts: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The last attempt of each step without items."""
    return {attempt["step"]: attempt for attempt in attempts if attempt["item"] is None}


def _times(step: Mapping[str, Any], attempt: Mapping[str, Any] | None, now: datetime) -> tuple[str, str]:
    """How long the step waited for a worker, and how long it ran."""
    source = step if attempt is None else attempt
    if step["reused_from"] or not source["queued_at"]:
        return "", ""
    waited = _span(source["queued_at"], source["started_at"] or source["finished_at"], now)
    return waited, _span(source["started_at"], source["finished_at"], now) if source["started_at"] else ""


def _bar(step: Mapping[str, Any], attempt: Mapping[str, Any] | None) -> RenderableType:
    if step["state"] != "RUNNING":
        return ""
    items = step["items"]
    if items:
        return ProgressBar(len(items), sum(item["state"] in _FINAL for item in items), width=BAR_WIDTH)
    progress = (attempt or {}).get("progress") or {}
    done = progress.get("done")
    return "" if done is None else ProgressBar(1, done, width=BAR_WIDTH)


_FINAL = {"SUCCEEDED", "FAILED", "CANCELLED", "SKIPPED"}


def _note(step: Mapping[str, Any], attempt: Mapping[str, Any] | None, last_line: str, branch: Branch) -> str:
    state, also = step["state"], f"also after {', '.join(branch.also)}" if branch.also else ""
    if state == "PENDING" and step["failures"]:
        return f"retrying after: {first_line(step['error'])}"[:MAX_NOTE]
    if state in {"FAILED", "SKIPPED"}:
        return first_line(step["error"])[:MAX_NOTE]
    if step["reused_from"]:
        return f"taken over from {step['reused_from']}"
    if state != "RUNNING":
        return also if state == "PENDING" else ""
    child = f"run {attempt['child_id']}" if attempt is not None and attempt["child_id"] else ""
    progress = ((attempt or {}).get("progress") or {}) if step["items"] is None else {}
    done = "" if progress.get("done") is None else f"{progress['done']:.0%}"
    return "  ".join(part for part in (done, progress.get("text", ""), child, last_line) if part)[:MAX_NOTE]


def _span(begin: str | None, end: str | None, now: datetime) -> str:
    """Time between two moments; an end that has not come is now."""
    if begin is None:
        return ""
    until = now if end is None else datetime.fromisoformat(end)
    seconds = max(0.0, (until - datetime.fromisoformat(begin)).total_seconds())
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def now_utc() -> datetime:
    """The present, as pictures need it."""
    return datetime.now(UTC)
