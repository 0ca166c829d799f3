"""The closing checks: what became of the runs that were accepted while something broke."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.faults.lab import Lab
from tests.platform import eventually

#: Durable actors of dead runs are looked for every ten seconds.
LEFTOVER_S = 60.0
_OPEN = {"PENDING", "QUEUED", "RUNNING"}


@dataclass(frozen=True)
class Verdict:
    """``lost``: accepted and not there, or in a wrong state. ``twice``: runs, attempts or steps that happened again
    after they were done. ``stuck``: not over in time. ``idle_s``: the longest time in which a run had no process, which
    it may have waited for. ``dead_s``: the longest time in which an attempt counted as running and was dead."""

    fault: str
    fired: str
    accepted: int
    lost: int
    twice: int
    stuck: int
    gap_s: float
    idle_s: float
    dead_s: float
    attempts: int
    lost_attempts: int

    def __str__(self) -> str:
        return (
            f"{self.fault} → {self.fired} → accepted {self.accepted}, lost {self.lost}, twice {self.twice}, "
            f"stuck {self.stuck}, longest gap {self.gap_s:.1f} s, without a process {self.idle_s:.1f} s, "
            f"running and dead {self.dead_s:.1f} s ({self.attempts} attempts, {self.lost_attempts} LOST)"
        )


def close(
    lab: Lab,
    fault: str,
    fired: str,
    accepted: Mapping[str, str],
    say: pytest.CaptureFixture[str],
    *,
    gap_s: float = 0.0,
    expected: Mapping[str, str] | None = None,
    timeout_s: float = 240,
) -> Verdict:
    """Waits for the end of the runs (ids by key), prints the line, and fails the test on anything that went wrong.

    Args:
        expected: final states by key, where it is not SUCCEEDED.
    """
    run_ids = sorted(set(accepted.values()))
    stuck = lab.wait(run_ids, timeout_s)
    history = _History(lab, run_ids)
    states = {key: (expected or {}).get(key, "SUCCEEDED") for key in accepted}
    lost = [key for key, run_id in accepted.items() if history.runs.get(run_id, ("", 0, 0))[0] != states[key]]
    prefixes = {key.partition("-")[0] for key in accepted}
    twice = history.twice() + _orphans(lab, prefixes, accepted)
    verdict = Verdict(
        fault, fired, len(run_ids), len(lost), len(twice), len(stuck), gap_s, history.idle_s(), history.dead_s(),
        sum(len(numbers) for numbers in history.attempts.values()), history.count("LOST"),
    )  # fmt: skip
    with say.disabled():
        print(f"\n{verdict}")
    assert len(run_ids) == len(accepted), "one run for each key"
    assert not stuck, {run_id: history.open_rows(run_id) for run_id in sorted(stuck)[:3]}
    assert not lost, [(key, history.runs.get(accepted[key]), history.errors.get(accepted[key])) for key in lost[:3]]
    assert not twice, twice[:5]
    history.check()
    violations = lab.query("SELECT what FROM watched_violation")
    assert not violations, violations[:5]
    eventually(lambda: not lab.leftovers(), LEFTOVER_S, f"nothing is left: {lab.leftovers()[:3]}")
    return verdict


def _orphans(lab: Lab, prefixes: set[str], accepted: Mapping[str, str]) -> list[str]:
    """Runs that nobody was told of, under keys whose clients all got an answer."""
    found = lab.query(
        "SELECT idempotency_key, run_id FROM pipeline_run WHERE split_part(idempotency_key, '-', 1) = ANY(%s)",
        list(prefixes),
    )
    return [f"key {key} has run {run_id}, too" for key, run_id in found if accepted.get(key) != run_id]


class _History:
    """What the database and the executions log say of some runs."""

    def __init__(self, lab: Lab, run_ids: list[str]) -> None:
        self._struck = sorted(lab.struck)
        self._killed = dict(lab.killed)
        self.runs: dict[str, tuple[str, float, float]] = {}
        self.errors: dict[str, str | None] = {}
        for run_id, state, error, began, ended in lab.query(
            "SELECT run_id, state, error, extract(epoch FROM created_at)::float8, "
            "extract(epoch FROM coalesce(finished_at, clock_timestamp()))::float8 "
            "FROM pipeline_run WHERE run_id = ANY(%s)", run_ids,
        ):  # fmt: skip
            self.runs[run_id], self.errors[run_id] = (state, began, ended), error
        #: Per node its attempts: (number, state, finished at).
        self.attempts: dict[str, list[tuple[int, str, float]]] = defaultdict(list)
        for run_id, step, item, number, state, ended in lab.query(
            "SELECT run_id, step, item, attempt, state, "
            "extract(epoch FROM coalesce(finished_at, clock_timestamp()))::float8 "
            "FROM attempt WHERE run_id = ANY(%s) ORDER BY attempt", run_ids,
        ):  # fmt: skip
            self.attempts[f"{run_id}/{step}/{item}"].append((number, state, ended))
        self.steps = {
            f"{run_id}/{step}/{item}": state
            for run_id, step, item, state in lab.query(
                "SELECT run_id, step, item, state FROM step_run WHERE run_id = ANY(%s)", run_ids
            )
        }
        self.began: dict[str, list[float]] = defaultdict(list)
        self._pids: dict[str, int] = {}
        self.ended: dict[str, tuple[str, float]] = {}
        for entry in lab.executions():
            if entry["label"].partition("/")[0] not in self.runs:
                continue
            if entry["what"] == "begin":
                self.began[entry["label"]].append(entry["at"])
                self._pids[entry["label"]] = entry["pid"]
            else:
                self.ended[entry["label"]] = entry["what"], entry["at"]

    def count(self, state: str) -> int:
        """Attempts in that state."""
        return sum(entry[1] == state for entries in self.attempts.values() for entry in entries)

    def open_rows(self, run_id: str) -> list[Any]:
        """What a run still waits for."""
        rows = [(node, state) for node, state in self.steps.items() if node.startswith(run_id) and state in _OPEN]
        attempts = [
            (node, *entry) for node, entries in self.attempts.items() for entry in entries
            if node.startswith(run_id) and entry[1] in _OPEN
        ]  # fmt: skip
        return rows + attempts

    def twice(self) -> list[str]:
        """Attempts that began twice, and nodes that went on after their success."""
        found = [f"attempt {label} began {len(times)} times" for label, times in self.began.items() if len(times) > 1]
        for node, entries in self.attempts.items():
            succeeded = [number for number, state, _ended in entries if state == "SUCCEEDED"]
            if len(succeeded) > 1:
                found.append(f"{node} succeeded as {succeeded}")
            elif succeeded and succeeded[0] != entries[-1][0]:
                found.append(f"{node} went on after its success: {entries}")
        return found

    def check(self) -> None:
        """Numbers without gaps, nothing open, no success that did not happen, none that is not recorded."""
        for node, entries in self.attempts.items():
            numbers = [number for number, _state, _ended in entries]
            assert numbers == list(range(1, len(numbers) + 1)), (node, entries)
            assert not [state for _number, state, _ended in entries if state in _OPEN], (node, entries)
            for number, state, _at in entries:
                label = f"{node}/{number}"
                if state == "SUCCEEDED" and label in self.began:
                    assert self.ended[label][0] == "end", (label, self.ended[label])
        assert not [node for node, state in self.steps.items() if state in _OPEN]
        known = {f"{node}/{number}" for node, entries in self.attempts.items() for number, _state, _at in entries}
        assert not self.began.keys() - known, "every execution is an attempt that was durable before it"

    def dead_s(self) -> float:
        """The longest time from the kill of an attempt's process, or else from the last fault before its end was
        recorded, to that record."""
        longest = 0.0
        for node, entries in self.attempts.items():
            for number, _state, recorded in entries:
                label = f"{node}/{number}"
                if label in self.ended or label not in self.began:
                    continue
                killed = self._killed.get(self._pids[label], 0.0)
                earlier = [at for at in self._struck if self.began[label][0] <= at <= recorded]
                if self.began[label][0] <= killed <= recorded:
                    longest = max(longest, recorded - killed)
                elif earlier:
                    longest = max(longest, recorded - earlier[-1])
        return longest

    def idle_s(self) -> float:
        """The longest time in which an accepted run had no process. One that died without a word is taken to have
        lived until the last fault before its end was noticed."""
        alive: dict[str, list[tuple[float, float]]] = defaultdict(list)
        noticed = {f"{node}/{n}": at for node, entries in self.attempts.items() for n, _state, at in entries}
        for label, times in self.began.items():
            began = times[0]
            _what, ended = self.ended.get(label, ("", 0.0))
            if not ended:
                earlier = [at for at in self._struck if began <= at <= noticed.get(label, time.time())]
                ended = earlier[-1] if earlier else began
            alive[label.partition("/")[0]].append((began, ended))
        longest = 0.0
        for run_id, (_state, created, over) in self.runs.items():
            at = created
            for began, ended in sorted(alive[run_id]):
                longest = max(longest, began - at)
                at = max(at, ended)
            longest = max(longest, over - at)
        return longest
