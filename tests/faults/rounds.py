"""One round: writers at work, faults one after another, and what became of everything that was acknowledged."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.clickhouse import RemoteStore
from tests.faults.ledger import Verdict, Window, judge, read_back, writing
from tests.faults.stage import Disks, Fault, Stage
from tests.platform import Platform

#: What a client may see meanwhile: an answer that says when to come back, or a broken connection.
_HARMLESS = re.compile(r"(503|429) Retry-After|500|Unavailable|Overloaded|[A-Z]\w+(Error|Timeout)")


def strike(
    platform: Platform,
    sequence: Sequence[Fault],
    folder: Path,
    say: pytest.CaptureFixture[str],
    remote: RemoteStore | None = None,
    disks: Disks | None = None,
) -> list[Verdict]:
    """One round: writers start, the faults strike one after another, the writers stop, everything is counted."""
    windows: list[Window] = []
    with writing(platform, folder) as writers:
        stage = Stage(platform, writers, remote, disks)
        for fault in sequence:
            began = time.monotonic()
            fired = fault(stage)
            writers.progress()
            windows.append(Window(fault.__name__.replace("_", " "), fired, began, time.monotonic()))
        writers.stop()
        entries = writers.entries()
    verdicts = judge(read_back(platform, entries), entries, windows)
    with say.disabled():
        print()
        for verdict in verdicts:
            print(verdict)
    for verdict in verdicts:
        assert verdict.points > 0, verdict
        assert (verdict.lost, verdict.twice) == (0, 0), verdict
        strange = [failure for failure in verdict.failures if not _HARMLESS.fullmatch(failure)]
        assert not strange, verdict
    return verdicts
