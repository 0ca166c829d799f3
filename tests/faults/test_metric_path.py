"""The metric path under faults: what was acknowledged is there, once, whatever dies while writers are at work.

Each fault prints a line: fault → what fired → acknowledged, lost, twice, longest gap. ``make soak`` runs many more.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import RemoteStore
from tests.faults import stage as faults
from tests.faults.ledger import Verdict, Window, judge, read_back, writing
from tests.faults.stage import Fault, Stage
from tests.platform import Platform

KILLS: tuple[Fault, ...] = (
    faults.shard_killed,
    faults.gateway_killed,
    faults.postgres_killed,
    faults.clickhouse_killed,
)
OTHERS: tuple[Fault, ...] = (
    faults.postgres_backend_killed,
    faults.postgres_frozen,
    faults.clickhouse_frozen,
    faults.clickhouse_slow,
    faults.clickhouse_answers_lost,
    faults.clickhouse_connections_cut,
)
SOAK_KILLS = 200
ROUND_KILLS = 10
#: What a client may see meanwhile: an answer that says when to come back, or a broken connection.
_HARMLESS = re.compile(r"(503|429) Retry-After|500|Unavailable|Overloaded|[A-Z]\w+(Error|Timeout)")


def _strike(
    platform: Platform, store: RemoteStore, folder: Path, sequence: Sequence[Fault], say: pytest.CaptureFixture[str]
) -> list[Verdict]:
    """One round: writers start, the faults strike one after another, the writers stop, everything is counted."""
    windows: list[Window] = []
    with writing(platform, folder) as writers:
        stage = Stage(platform, store.server, store.proxy, writers)
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


def test_no_fault_loses_or_doubles_what_was_acknowledged(
    remote_platform: Platform, remote_store: RemoteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _strike(remote_platform, remote_store, tmp_path, [*KILLS, *OTHERS], capsys)


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_hundreds_of_kills_lose_and_double_nothing(
    remote_platform: Platform, remote_store: RemoteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    with capsys.disabled():
        print(f"\nseed {seed}")
    verdicts: list[Verdict] = []
    for number in range(SOAK_KILLS // ROUND_KILLS):
        sequence = [*chance.choices(KILLS, k=ROUND_KILLS), chance.choice(OTHERS)]
        chance.shuffle(sequence)
        verdicts += _strike(remote_platform, remote_store, tmp_path / str(number), sequence, capsys)
    with capsys.disabled():
        points, gap = sum(verdict.points for verdict in verdicts), max(verdict.gap_s for verdict in verdicts)
        print(f"{len(verdicts)} faults → {points} points acknowledged, lost 0, twice 0, longest gap {gap:.1f} s")
