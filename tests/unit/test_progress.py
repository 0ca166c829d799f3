"""A run as it is shown in a terminal and elsewhere."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from mlplat.progress import progress, steps_table


def step(state: str, attempt: int = 0, failures: int = 0, error: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "state": state, "attempt": attempt, "failures": failures, "error": error, "items": None,
        "started_at": None, "finished_at": None,
    } | more  # fmt: skip


def status(**steps: dict[str, Any]) -> dict[str, Any]:
    return {"pipeline": "digits", "run_id": "r1", "state": "RUNNING", "steps": steps}


def shown(*statuses: dict[str, Any]) -> list[str]:
    """The lines printed for these statuses when there is no terminal."""
    out = io.StringIO()
    with progress(Console(file=out, width=100)) as view:
        for one in statuses:
            view.show(one)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def table(one: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=120).print(steps_table(one))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_each_change_is_one_line_and_no_change_is_none() -> None:
    lines = shown(
        status(load=step("PENDING"), train=step("PENDING")),
        status(load=step("RUNNING", 1), train=step("PENDING")),
        status(load=step("RUNNING", 1), train=step("PENDING")),
        status(load=step("SUCCEEDED", 1), train=step("RUNNING", 1)),
        status(load=step("SUCCEEDED", 1), train=step("SUCCEEDED", 1)),
    )
    assert [line.split() for line in lines] == [
        ["load", "RUNNING"],
        ["load", "SUCCEEDED"],
        ["train", "RUNNING"],
        ["train", "SUCCEEDED"],
    ]


def test_a_retry_is_told_with_the_first_line_of_its_error() -> None:
    lines = shown(
        status(a=step("RUNNING", 1)),
        status(a=step("PENDING", 1, 1, "ValueError: no\n\nTraceback")),
        status(a=step("PENDING", 1, 1, "ValueError: no\n\nTraceback")),
        status(a=step("RUNNING", 2, 1, "ValueError: no\n\nTraceback")),
        status(a=step("FAILED", 2, 2, "again")),
    )
    assert [line.split() for line in lines] == [
        ["a", "RUNNING"],
        ["a", "PENDING"],
        ["retrying", "after:", "ValueError:", "no"],
        ["a", "RUNNING"],
        ["a", "FAILED"],
    ]


def test_an_attempt_that_was_lost_shows_as_its_successor_running() -> None:
    lines = shown(
        status(a=step("RUNNING", 1)), status(a=step("PENDING", 1, 0, "lost")), status(a=step("RUNNING", 2, 0, "lost"))
    )
    assert [line.split() for line in lines] == [["a", "RUNNING"], ["a", "RUNNING"]]


def test_a_fan_out_counts_its_items() -> None:
    items = [{"state": "SUCCEEDED"}, {"state": "RUNNING"}, {"state": "SUCCEEDED"}]
    assert shown(status(f=step("RUNNING", items=items)))[0].split() == ["f", "RUNNING", "2/3"]
    assert shown(status(f=step("SUCCEEDED", items=[])))[0].split() == ["f", "SUCCEEDED", "0/0"]


def test_markup_in_an_error_is_shown_as_it_is() -> None:
    (_state, note) = shown(status(a=step("PENDING", 1, 1, "[red]not[/wrong] markup")))
    assert note.endswith("[red]not[/wrong] markup")
    assert "[bold]x[/nope]" in "\n".join(table(status(a=step("FAILED", 1, 1, "[bold]x[/nope]"))))


def test_an_error_that_is_missing_or_blank_is_shown_as_nothing() -> None:
    for error in (None, "", " \n "):
        assert shown(status(a=step("PENDING", 1, 1, error)))[1].split() == ["retrying", "after:"]
        assert table(status(a=step("FAILED", 1, 1, error)))[-1].split() == ["a", "FAILED", "1"]


def test_the_table_has_a_row_for_each_step() -> None:
    times: dict[str, Any] = {
        "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T00:00:02.500000+00:00",
    }
    lines = table(
        status(
            load=step("SUCCEEDED", 1, **times),
            train=step("PENDING", 2, 2, "boom\ntraceback"),
            report=step("SKIPPED", 0, 0, "train did not succeed"),
        )
    )
    assert lines[0] == "digits · r1 · RUNNING"
    assert [line.split() for line in lines[1:]] == [
        ["step", "state", "attempt", "seconds"],
        ["load", "SUCCEEDED", "1", "2.5"],
        ["train", "PENDING", "2", "retrying", "after:", "boom"],
        ["report", "SKIPPED", "train", "did", "not", "succeed"],
    ]


def test_on_a_terminal_the_last_table_stays() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    with progress(console) as view:
        view.show(status(load=step("RUNNING", 1)))
        view.show(status(load=step("SUCCEEDED", 1)))
    last = out.getvalue().rpartition("digits")[2]
    assert "SUCCEEDED" in last
    assert "RUNNING" in last.splitlines()[0]
