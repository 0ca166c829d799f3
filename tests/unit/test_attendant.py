"""Looking after the attempt of a process: its live log, when it is announced, and what is told of its progress."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.artifacts.segments import Place
from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.texts import read_text
from mlplat.execution import attendant as module
from mlplat.execution.attendant import Attendant, Attended, Notice, Tell
from mlplat.execution.capture import FULL_NOTICE, AttemptLog, log_folder, log_folder_of
from mlplat.pipelines.model import attempt_label
from tests.platform import eventually

NEVER_S = 1e9


class Attempt:
    """An attempt with a log of its own, and what its executor has heard."""

    def __init__(self, folder: Path, number: int = 1, *, at_once: bool = False, tell: Tell | None = None) -> None:
        self.heard: list[Notice] = []
        self._file = TemporaryFile("a+b", buffering=0)  # noqa: SIM115 - `close` closes it
        self._artifacts = ArtifactStore(f"file://{folder}")
        self._folder = log_folder("run", "step", -1, number)
        self.log = AttemptLog(self._file.fileno(), self._artifacts, self._folder)
        label = attempt_label("run", "step", -1, number)
        self.attended = Attended(label, tell or self.heard.append, self.log, "node-1", at_once)

    def prints(self, text: bytes) -> None:
        """As its code does."""
        self._file.write(text)

    def notice(self, progress: dict[str, Any] | None = None) -> Notice:
        """What it says when it runs, or how far it is."""
        return Notice(self.attended.label, self.attended.started_at, "node-1", progress)

    @property
    def size(self) -> int:
        """Bytes that its log takes up on this machine's disk."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def stored(self) -> str:
        """What everybody can read of its log."""
        return read_text(self._artifacts, self._folder, Place(), 1_000_000, is_over=True).text

    def close(self) -> None:
        """The descriptor is gone."""
        self._file.close()


@pytest.fixture
def attempts(tmp_path: Path) -> Iterator[Callable[..., Attempt]]:
    """Makes attempts, numbered from 1."""
    made: list[Attempt] = []

    def make(**options: Any) -> Attempt:
        made.append(Attempt(tmp_path, len(made) + 1, **options))
        return made[-1]

    yield make
    for attempt in made:
        attempt.close()


@pytest.fixture
def attendant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Attendant]:
    """One that looks all the time."""
    monkeypatch.setattr(module, "ANNOUNCE_AFTER_S", 0.0)
    monkeypatch.setattr(module, "PROGRESS_EVERY_S", 0.001)
    found = Attendant()
    yield found
    found.end()


# -- what one attempt says -------------------------------------------------------------------------


def test_an_attempt_says_nothing_before_it_has_run_for_a_while(
    attempts: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANNOUNCE_AFTER_S", NEVER_S)
    attempt = attempts()
    attempt.attended.progress = {"done": 0.1, "text": ""}
    attempt.attended.look()
    assert attempt.heard == []


def test_then_it_says_that_it_runs_and_then_how_far_it_is(
    attempts: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANNOUNCE_AFTER_S", 0.0)
    attempt = attempts()
    for done in (0.1, 0.2):
        attempt.attended.progress = {"done": done, "text": ""}
    attempt.attended.look()
    attempt.attended.look()
    assert attempt.heard == [attempt.notice(), attempt.notice({"done": 0.2, "text": ""})]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.just("look"), st.just("progress")), max_size=30))
def test_every_look_tells_the_newest_progress_and_nothing_twice(happened: list[str]) -> None:
    attempt = Attempt(Path("/nowhere"), at_once=True)
    for number, event in enumerate(happened):
        if event == "look":
            attempt.attended.announce()
        else:
            attempt.attended.progress = {"done": None, "text": str(number)}
    attempt.close()
    told, newest = list[dict[str, Any]](), None
    for number, event in enumerate(happened):
        if event == "progress":
            newest = {"done": None, "text": str(number)}
        elif newest is not None:
            told, newest = [*told, newest], None
    expected = [attempt.notice(progress) for progress in told]
    assert attempt.heard == ([attempt.notice()] if "look" in happened else []) + expected


# -- the thread ------------------------------------------------------------------------------------


def test_an_attempt_with_a_timeout_is_announced_before_its_code_runs(attempts: Callable[..., Attempt]) -> None:
    attendant, attempt = Attendant(), attempts(at_once=True)
    attendant.begin(attempt.attended)
    heard = list(attempt.heard)
    attendant.end()
    assert heard == [attempt.notice()]


def test_an_attempt_is_looked_after_while_it_runs(attendant: Attendant, attempts: Callable[..., Attempt]) -> None:
    attempt = attempts()
    attendant.begin(attempt.attended)
    eventually(lambda: attempt.heard == [attempt.notice()], 60)
    attempt.prints(b"one\n")
    eventually(lambda: attempt.stored == "one\n", 60)
    attempt.prints(b"two\n")
    attempt.attended.progress = {"done": 0.5, "text": "half"}
    eventually(lambda: attempt.stored == "one\ntwo\n", 60)
    eventually(lambda: attempt.heard[1:] == [attempt.notice({"done": 0.5, "text": "half"})], 60)


def test_an_attempt_that_is_over_is_left_alone(attendant: Attendant, attempts: Callable[..., Attempt]) -> None:
    first, second = attempts(), attempts()
    attendant.begin(first.attended)
    eventually(lambda: first.heard, 60)
    attendant.end()
    first.prints(b"late")
    first.attended.progress = {"done": 1.0, "text": ""}
    attendant.begin(second.attended)
    second.prints(b"now")
    eventually(lambda: second.heard and second.stored == "now", 60)
    assert (first.heard, first.stored) == ([first.notice()], "")


def test_the_end_of_an_attempt_waits_for_a_look_under_way(
    attendant: Attendant, attempts: Callable[..., Attempt]
) -> None:
    order: list[str] = []

    def end() -> None:
        attendant.end()
        order.append("ended")

    ender = threading.Thread(target=end)

    def tell(_notice: Notice) -> None:
        ender.start()
        ender.join(0.1)  # which it does not, for it waits
        order.append("told")

    attendant.begin(attempts(tell=tell).attended)
    eventually(lambda: len(order) == 2, 60)
    ender.join()
    assert order == ["told", "ended"]


def test_a_look_that_fails_ends_neither_the_attempt_nor_the_looking(
    attendant: Attendant, attempts: Callable[..., Attempt]
) -> None:
    failed = threading.Event()

    def tell(_notice: Notice) -> None:
        failed.set()
        raise ZeroDivisionError("what nobody thought of")

    first = attempts(tell=tell)
    attendant.begin(first.attended)
    assert failed.wait(60)
    first.prints(b"goes on")
    eventually(lambda: first.stored == "goes on", 60)
    attendant.end()
    second = attempts()
    attendant.begin(second.attended)
    eventually(lambda: second.heard == [second.notice()], 60)


# -- the log ---------------------------------------------------------------------------------------


def test_a_log_that_nobody_keeps_any_more_does_not_fill_the_disk(
    attempts: Callable[..., Attempt], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = attempts()
    monkeypatch.setattr(attempt.log._shipper, "_left", 4)
    for _turn in range(3):
        attempt.prints(b"12345")
        attempt.log.ship()
        assert attempt.size == 0
    assert attempt.stored == f"1234{FULL_NOTICE.decode()}"


names = st.text("aZ09_-", min_size=1, max_size=64)


@settings(max_examples=50)
@given(names, names, st.integers(-1, 10**9 - 1), st.integers(1, 10**9 - 1))
def test_a_label_leads_to_the_folder_of_its_log(run_id: str, step: str, item: int, attempt: int) -> None:
    assert log_folder_of(attempt_label(run_id, step, item, attempt)) == log_folder(run_id, step, item, attempt)


@pytest.mark.parametrize(
    "label", ["", "a/b/0", "a/b/-2/1", "a/b/0/1\n", "../b/0/1", "a/../0/1", "a//0/1", "a/b/٠/1", "a/b/0/1/2", "a/b/0/x"]
)
def test_what_is_no_label_leads_nowhere(label: str) -> None:
    assert log_folder_of(label) is None
