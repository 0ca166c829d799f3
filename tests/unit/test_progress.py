"""A run as it is shown in a terminal and elsewhere, from events as the platform sends them."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from mlplat.progress import follow, progress
from mlplat.run_view import describe, errors_of, run_picture, tree
from mlplat.sdk.live import EventParser, LiveRun, LogPositions, RunEvent

NOW = datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
BEGUN = "2026-01-01T00:00:00Z"
SOON = "2026-01-01T00:00:02.500000Z"


def step(state: str, attempt: int = 0, failures: int = 0, error: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "state": state, "attempt": attempt, "failures": failures, "error": error, "output": None, "items": None,
        "retry_at": None, "queued_at": None, "started_at": None, "finished_at": None, "reused_from": None,
    } | more  # fmt: skip


def attempt(name: str, number: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "step": name, "item": None, "attempt": number, "state": "RUNNING", "error": None, "node": None,
        "progress": None, "child_id": None, "queued_at": BEGUN, "started_at": None, "finished_at": None,
    } | more  # fmt: skip


def snapshot(dag: dict[str, list[str]] | None = None, **steps: dict[str, Any]) -> RunEvent:
    run = {
        "pipeline": "digits", "run_id": "r1", "state": "RUNNING", "seq": 1, "error": None, "stopping": None,
        "output": None, "created_at": BEGUN, "started_at": SOON, "finished_at": None, "steps": steps, "attempts": [],
        "signals": [],
    }  # fmt: skip
    needs = dag or {name: [] for name in steps}
    graph = [{"name": name, "needs": needs[name], "is_finally": name.startswith("finally")} for name in needs]
    return RunEvent("snapshot", {"run": run, "dag": graph}, 1)


def change(number: int = 2, attempts: tuple[dict[str, Any], ...] = (), run: Any = None, **steps: Any) -> RunEvent:
    rows = [
        {"item": None} | row | {"step": name, "items": None if row["items"] is None else len(row["items"])}
        for name, row in steps.items()
    ]
    data = {"seq": number, "run": run or {}, "steps": rows, "attempts": list(attempts), "signals": None}
    return RunEvent("change", data, number)


def log(name: str, text: str, item: int | None = None) -> RunEvent:
    place = {"segment": 1, "offset": 0}
    data = {"step": name, "item": item, "attempt": 1, "text": text, "start": place, "next": place, "skipped": False}
    return RunEvent("log", data)


def shown(*events: RunEvent) -> list[str]:
    """The lines printed for these events when there is no terminal."""
    out = io.StringIO()
    with progress(Console(file=out, width=100)) as view:
        for event in events:
            view.show(event)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def picture(*events: RunEvent, words: dict[str, str] | None = None, **options: Any) -> list[str]:
    live = LiveRun()
    for event in events:
        live.apply(event)
    out = io.StringIO()
    Console(file=out, width=150).print(run_picture(live.status, live.dag, words or {}, now=NOW, **options))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_each_change_is_one_line_and_no_change_is_none() -> None:
    lines = shown(
        snapshot(load=step("PENDING"), train=step("PENDING")),
        change(2, load=step("RUNNING", 1)),
        change(3, load=step("RUNNING", 1)),
        log("load", "words\n"),
        change(4, load=step("SUCCEEDED", 1), train=step("RUNNING", 1)),
        change(5, train=step("SUCCEEDED", 1)),
    )
    assert [line.split() for line in lines] == [
        ["load", "RUNNING"],
        ["load", "SUCCEEDED"],
        ["train", "RUNNING"],
        ["train", "SUCCEEDED"],
    ]


def test_a_retry_is_told_with_the_first_line_of_its_error() -> None:
    lines = shown(
        snapshot(a=step("RUNNING", 1)),
        change(2, a=step("PENDING", 1, 1, "ValueError: no\n\nTraceback")),
        change(3, a=step("RUNNING", 2, 1, "ValueError: no\n\nTraceback")),
        change(4, a=step("FAILED", 2, 2, "again")),
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
        snapshot(a=step("RUNNING", 1)),
        change(2, a=step("PENDING", 1, 0, "lost")),
        change(3, a=step("RUNNING", 2, 0, "lost")),
    )
    assert [line.split() for line in lines] == [["a", "RUNNING"], ["a", "RUNNING"]]


def test_a_fan_out_counts_its_items() -> None:
    states = ("SUCCEEDED", "RUNNING", "SUCCEEDED", "FAILED", "PENDING")
    items = [step(state) for state in states]
    assert describe(step("RUNNING", items=items)) == "RUNNING 2/5 · 1 running · 1 failed"
    assert shown(snapshot(f=step("RUNNING", items=items)))[0].split()[:3] == ["f", "RUNNING", "2/5"]
    assert shown(snapshot(f=step("SUCCEEDED", items=[])))[0].split() == ["f", "SUCCEEDED", "0/0"]


@pytest.mark.parametrize("text", ["[red]not[/wrong] markup", "[bold]x[/nope]"])
def test_markup_in_an_error_is_shown_as_it_is(text: str) -> None:
    (_state, note) = shown(snapshot(a=step("PENDING", 1, 1, text)))
    assert note.endswith(text)
    assert text in "\n".join(picture(snapshot(a=step("FAILED", 1, 1, text))))


def test_an_error_that_is_missing_or_blank_is_shown_as_nothing() -> None:
    for error in (None, "", " \n "):
        assert shown(snapshot(a=step("PENDING", 1, 1, error)))[1].split() == ["retrying", "after:"]
        assert picture(snapshot(a=step("FAILED", 1, 1, error)))[-1].split() == ["✗", "a", "FAILED", "1"]


DIAMOND = {
    "load": [], "left": ["load"], "right": ["load"], "deep": ["left"], "join": ["left", "right", "deep"],
    "finally_tell": [],
}  # fmt: skip


def test_the_graph_is_a_tree_in_the_order_in_which_steps_may_run() -> None:
    branches = tree([{"name": name, "needs": needs, "is_finally": "_" in name} for name, needs in DIAMOND.items()])
    assert [(branch.guide, branch.name, branch.also) for branch in branches] == [
        ("", "load", ()),
        ("├─ ", "left", ()),
        ("│  ", "deep", ()),
        ("│  ", "join", ("left", "right")),
        ("└─ ", "right", ()),
        ("", "finally_tell", ()),
    ]


def test_a_long_chain_is_no_staircase() -> None:
    dag = [
        {"name": f"s{number}", "needs": [f"s{number - 1}"] if number else [], "is_finally": False}
        for number in range(5_000)
    ]
    assert {branch.guide for branch in tree(dag)} == {""}


def test_a_deep_tree_stops_moving_to_the_right() -> None:
    dag = [{"name": "s0", "needs": [], "is_finally": False}]
    for number in range(1, 100):
        dag += [{"name": f"{name}{number}", "needs": [f"s{number - 1}"], "is_finally": False} for name in ("s", "side")]
    branches = tree(dag)
    assert len(branches) == 199
    assert max(len(branch.guide) for branch in branches) <= 40


def test_the_picture_has_states_times_progress_and_last_words() -> None:
    lines = picture(
        snapshot(
            DIAMOND,
            load=step("SUCCEEDED", 1),
            left=step("RUNNING", 2),
            right=step("PENDING", 1, 1, "boom\ntraceback"),
            deep=step("PENDING"),
            join=step("PENDING"),
            finally_tell=step("PENDING"),
        ),
        change(
            2,
            (
                attempt("load", state="SUCCEEDED", started_at=SOON, finished_at="2026-01-01T00:00:03Z"),
                attempt("left", 2, started_at=SOON, progress={"done": 0.45, "text": "epoch 3"}),
            ),
        ),
        words={"left": "loss 0.1"},
    )
    assert lines[0] == "digits · r1 · RUNNING · waited 2.5s · ran 57.5s"
    rows = [line.split() for line in lines[2:]]
    assert rows[0] == ["✓", "load", "SUCCEEDED", "1", "2.5s", "0.5s"]
    assert rows[1][:7] == ["├─", "●", "left", "RUNNING", "2", "2.5s", "57.5s"]
    assert rows[1][-5:] == ["45%", "epoch", "3", "loss", "0.1"]
    assert rows[3] == ["│", "○", "join", "PENDING", "also", "after", "left,", "right"]
    assert rows[4] == ["└─", "○", "right", "PENDING", "1", "retrying", "after:", "boom"]
    assert rows[5] == ["○", "finally", "finally_tell", "PENDING"]


def test_a_terminal_without_symbols_gets_plain_ones() -> None:
    text = "\n".join(picture(snapshot({"a": [], "b": []}, a=step("FAILED"), b=step("SUCCEEDED")), ascii_only=True)[1:])
    assert text.isascii()
    assert "|- x a" in text


def test_a_run_that_is_higher_than_the_terminal_shows_what_is_under_way() -> None:
    steps = {f"done{number}": step("SUCCEEDED") for number in range(40)} | {"late": step("RUNNING", 1)}
    lines = picture(snapshot(**steps), rows=16)
    assert len(lines) <= 16
    assert any("late" in line for line in lines)
    assert lines[-1] == "… and 31 succeeded"


def test_errors_come_at_the_end_and_only_some() -> None:
    error = "ValueError: no\n\n" + "\n".join(f"frame {number}" for number in range(50))
    steps = {f"s{number}": step("FAILED", 1, 1, error) for number in range(8)}
    lines = "\n".join(text.plain for text in errors_of({"steps": steps})).splitlines()
    assert lines[1:4] == ["s0 failed", "  ValueError: no", "  …"]
    assert lines[-1] == "… and 3 more failed steps"
    assert "  frame 49" in lines
    assert "  frame 0" not in lines


def test_on_a_terminal_the_last_picture_stays() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    final = follow(
        console,
        [
            snapshot(load=step("RUNNING", 1)),
            log("load", "\x1b[31mworking\x1b[0m\rdone soon\n"),
            change(2, load=step("SUCCEEDED", 1), run={"state": "SUCCEEDED"}),
        ],
    )
    assert final["state"] == "SUCCEEDED"
    last = out.getvalue().rpartition("digits")[2]
    assert "SUCCEEDED" in last
    assert "RUNNING" not in last


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    follow(Console(file=out, width=100, force_terminal=True), [snapshot(load=step("RUNNING", 1))])
    assert "\x1b[" not in out.getvalue().replace("\x1b[36m", "").replace("\x1b[0m", "")
    assert out.getvalue().count("\n") == 1


def test_events_are_taken_apart_wherever_they_are_cut() -> None:
    text = 'retry: 1000\n\nid: 7\nevent: change\ndata: {"a": "ä\u2028"}\n\n: still here\n\nevent: new\ndata: 1\n\n'
    body = text.encode()
    for cut in range(len(body)):
        parser = EventParser()
        found = [event for chunk in (body[:cut], body[cut:]) for event in parser.feed(chunk)]
        assert found == [None, RunEvent("change", {"a": "ä\u2028"}, 7), None, None]


def part(start: tuple[int, int], end: tuple[int, int], text: str) -> dict[str, Any]:
    return {
        "step": "a", "item": None, "attempt": 1, "text": text,
        "start": {"segment": start[0], "offset": start[1]}, "next": {"segment": end[0], "offset": end[1]},
    }  # fmt: skip


def test_text_that_was_told_is_not_told_again() -> None:
    told = LogPositions()
    texts = [
        None if (new := told.new_part(data)) is None else new["text"]
        for data in (
            part((0, 0), (1, 4), "one\n"),
            part((0, 0), (1, 4), "one\n"),
            part((1, 2), (1, 8), "e\nzwei"),
            part((1, 8), (2, 3), "abc"),
            part((2, 1), (2, 5), "bcde"),
            part((1, 8), (2, 6), "f?"),
        )
    ]
    assert texts == ["one\n", None, "zwei", "abc", "de", "f?"]
