"""What writers were promised, and whether the platform kept it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlplat.sdk.client import Client
from tests.faults.writer import Entry, point_at
from tests.platform import ROOT, Platform, eventually

#: Six over HTTP, one of which never retries, and two through the actor.
HTTP_WRITERS = ("http", "http", "http", "http", "http", "impatient")
ACTOR_WRITERS = ("actor", "actor")
PAGE = 50_000
PROGRESS_TIMEOUT_S = 150


class Writers:
    """Eight writers in two processes, on runs of their own. ``stop`` lets them end what they began."""

    def __init__(self, platform: Platform, folder: Path) -> None:
        client = Client(platform.url)
        paths = (*HTTP_WRITERS, *ACTOR_WRITERS)
        runs = [new_run(client) for _ in range(len(paths) + 1)]
        self._plan = {"url": platform.url, "shared_run": runs[-1]}
        self._files: list[Path] = []
        self._offsets: list[int] = []
        self._entries: list[Entry] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._expected = set(range(len(paths)))
        numbered = [(number, runs[number], path) for number, path in enumerate(paths)]
        for name, chosen in (("http", HTTP_WRITERS), ("actor", ACTOR_WRITERS)):
            self._start(platform, folder / f"{name}.jsonl", [writer for writer in numbered if writer[2] in chosen])

    def _start(self, platform: Platform, ledger: Path, writers: Sequence[tuple[int, str, str]]) -> None:
        plan = self._plan | {"ledger": str(ledger), "writers": writers}
        environment = platform.environment | platform.ray_environment | {"PYTHONPATH": str(ROOT)}
        with ledger.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tests.faults.writer", json.dumps(plan)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=platform.state_dir, env=environment,
            )  # fmt: skip
        self._files.append(ledger)
        self._offsets.append(0)
        self._processes.append(process)

    def entries(self) -> list[Entry]:
        """Every settled request so far, by the time at which it was."""
        self._read()
        return sorted(self._entries, key=lambda entry: entry.done or entry.sent)

    def _read(self) -> list[Entry]:
        """The requests that were settled since the last call."""
        found: list[Entry] = []
        for number, (file, process) in enumerate(zip(self._files, self._processes, strict=True)):
            lines = [json.loads(line) for line in self._new_lines(number)]
            defects = [line["defect"] for line in lines if "defect" in line]
            assert not defects, defects
            assert process.poll() in {None, 0}, file.with_suffix(".log").read_text()[-2000:]
            found += [Entry(**line) for line in lines]
        self._entries += found
        return found

    def _new_lines(self, number: int) -> list[bytes]:
        file = self._files[number]
        if not file.exists():
            return []
        with file.open("rb") as ledger:
            ledger.seek(self._offsets[number])
            whole, end, _torn = ledger.read().rpartition(b"\n")
        self._offsets[number] += len(whole) + len(end)
        return whole.splitlines()

    def progress(self, requests: int = 2) -> None:
        """Returns when every writer had so many further requests acknowledged."""
        asked_at, done = time.monotonic(), Counter[int]()

        def enough() -> bool:
            done.update(entry.writer for entry in self._read() if (entry.done or 0) > asked_at)
            return all(done[writer] >= requests for writer in self._expected)

        eventually(enough, PROGRESS_TIMEOUT_S, f"every writer has {requests} more acknowledgements")

    def stop(self) -> None:
        """Lets every writer settle its last request."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(PROGRESS_TIMEOUT_S)

    def kill(self) -> None:
        """Leaves nothing behind, whatever happened."""
        for process in self._processes:
            process.kill()
            process.wait(10)
            if process.stdin is not None:
                process.stdin.close()


@contextmanager
def writing(platform: Platform, folder: Path) -> Iterator[Writers]:
    """Writers at work, from their first acknowledgements on."""
    folder.mkdir(parents=True, exist_ok=True)
    writers = Writers(platform, folder)
    try:
        writers.progress(1)
        yield writers
    finally:
        writers.kill()


def new_run(client: Client) -> str:
    """The id of a new run in the default experiment."""
    answer = client.post("/api/2.0/mlflow/runs/create", {"experiment_id": "0", "start_time": 1})
    return str(answer["run"]["info"]["run_id"])


@dataclass(frozen=True)
class Window:
    """The time of one fault, and what is known of it."""

    fault: str
    fired: str
    began: float
    ended: float


@dataclass(frozen=True)
class Verdict:
    """What became of the points that were acknowledged in a window."""

    window: Window
    requests: int
    points: int
    lost: int
    twice: int
    gap_s: float
    failures: Counter[str]

    def __str__(self) -> str:
        failures = ", ".join(f"{count} × {what}" for what, count in sorted(self.failures.items())) or "none"
        return (
            f"{self.window.fault} → {self.window.fired} → {self.points} points acknowledged in {self.requests} "
            f"requests, lost {self.lost}, twice {self.twice}, longest gap {self.gap_s:.1f} s of "
            f"{self.window.ended - self.window.began:.1f} s, failed tries: {failures}"
        )


@dataclass(frozen=True)
class Found:
    """What the platform shows: the number of times each point of a (run, key) is there, and the params of each run."""

    steps: dict[tuple[str, str], Counter[int]]
    params: dict[str, dict[str, str]]


def read_back(platform: Platform, entries: Sequence[Entry]) -> Found:
    """Everything that the writers' runs hold, by the API that users read with. A wrong value counts as step -1."""
    client = Client(platform.url)
    steps: dict[tuple[str, str], Counter[int]] = {}
    for run, key in sorted({(entry.run, entry.key) for entry in entries}):
        steps[run, key] = Counter(
            point["step"] if point == {**point_at(key, point["step"])._asdict()} else -1
            for point in _history(client, run, key)
        )
    params = {}
    for run in sorted({entry.run for entry in entries}):
        data = client.get("/api/2.0/mlflow/runs/get", run_id=run)["run"]["data"]
        params[run] = {param["key"]: param["value"] for param in data.get("params", [])}
    return Found(steps, params)


def _history(client: Client, run: str, key: str) -> Iterator[dict[str, Any]]:
    token = None
    while True:
        page = client.get(
            "/api/2.0/mlflow/metrics/get-history", run_id=run, metric_key=key, max_results=PAGE, page_token=token
        )
        yield from page.get("metrics", [])
        token = page.get("next_page_token")
        if not token:
            return


def judge(found: Found, entries: Sequence[Entry], windows: Iterable[Window]) -> list[Verdict]:
    """Fails the test on anything invented or torn; counts per window what is lost or there twice.

    ``entries`` must be all there are: call it when the writers have stopped.
    """
    sent: dict[tuple[str, str], set[int]] = {}
    for entry in entries:
        sent.setdefault((entry.run, entry.key), set()).update(range(entry.step, entry.step + entry.count))
    for where, counts in found.steps.items():
        invented = counts.keys() - sent[where]
        assert not invented, f"{where}: steps {sorted(invented)[:10]} were never sent like this"
    for entry in entries:
        there = _there(found, entry)
        assert there in {0, entry.count}, f"torn: {there} of {entry.count} points of {entry}"
        if entry.param:
            param = found.params[entry.run].get(entry.param)
            assert param == (entry.param if there else None), f"torn: {there} points and param {param!r} of {entry}"
    return [_verdict(found, entries, window) for window in windows]


def _there(found: Found, entry: Entry) -> int:
    """How many points of an entry are there, each counted once."""
    steps = found.steps[entry.run, entry.key]
    return sum(steps[step] > 0 for step in range(entry.step, entry.step + entry.count))


def _twice(found: Found, entry: Entry) -> int:
    steps = found.steps[entry.run, entry.key]
    return sum(steps[step] > 1 for step in range(entry.step, entry.step + entry.count))


def _verdict(found: Found, entries: Sequence[Entry], window: Window) -> Verdict:
    mine = [entry for entry in entries if window.began <= (entry.done or entry.sent) < window.ended]
    done = [entry for entry in mine if entry.done is not None]
    lost = sum(entry.count - _there(found, entry) for entry in done)
    times = [window.began, *sorted(entry.done or 0 for entry in done), window.ended]
    gap = max(after - before for before, after in pairwise(times))
    failures = Counter(failure for entry in mine for failure in entry.failures)
    twice = sum(_twice(found, entry) for entry in mine)
    points = sum(entry.count for entry in done)
    return Verdict(window, len(done), points, lost, twice, gap, failures)
