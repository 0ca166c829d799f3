"""The metric path under faults: what was acknowledged is there, once, whatever dies while writers are at work.

Each fault prints a line: fault → what fired → acknowledged, lost, twice, longest gap. ``make soak`` runs many more.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from mlplat.metrics.model import ARROW, columns_table, encode
from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from mlplat.sdk.client import Client, client_for
from tests.clickhouse import RemoteStore
from tests.faults import stage as faults
from tests.faults.ledger import Verdict, new_run
from tests.faults.rounds import strike
from tests.faults.stage import MEMORY_CAP_BYTES, Fault, rss
from tests.platform import Platform, eventually

#: What every test run does; a soak draws from all of them.
KILLS: tuple[Fault, ...] = (
    faults.shard_killed,
    faults.gateway_killed,
    faults.postgres_down,
    faults.clickhouse_killed,
)
OTHERS: tuple[Fault, ...] = (
    faults.clickhouse_frozen,
    faults.clickhouse_slow,
    faults.clickhouse_answers_lost,
    faults.clickhouse_connections_cut,
)
RARE_KILLS: tuple[Fault, ...] = (
    faults.postgres_killed,
    faults.postgres_killed_with_its_keeper,
    faults.postgres_backend_killed,
)
#: Ten million points, 320 MB as the shard holds them in memory: far more than its cache takes.
FLOOD_BATCHES = 500
FLOOD_POINTS = 20_000
SOAK_KILLS = 200
ROUND_KILLS = 10


def test_no_fault_loses_or_doubles_what_was_acknowledged(
    remote_platform: Platform, remote_store: RemoteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strike(remote_platform, [*KILLS, *OTHERS], tmp_path, capsys, remote_store)


def test_the_embedded_store_may_die_with_its_shard(
    platform: Platform, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strike(platform, [faults.shard_killed, faults.gateway_killed, faults.shard_killed], tmp_path, capsys)


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_hundreds_of_kills_lose_and_double_nothing(
    remote_platform: Platform, remote_store: RemoteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    with capsys.disabled():
        print(f"\nseed {seed}")
    began = time.monotonic()
    verdicts: list[Verdict] = []
    for number in range(SOAK_KILLS // ROUND_KILLS):
        sequence = [
            *chance.choices([*KILLS, *RARE_KILLS], k=ROUND_KILLS),
            chance.choice([*OTHERS, faults.postgres_frozen]),
        ]
        chance.shuffle(sequence)
        verdicts += strike(remote_platform, sequence, tmp_path / str(number), capsys, remote_store)
    with capsys.disabled():
        points, gap = sum(verdict.points for verdict in verdicts), max(verdict.gap_s for verdict in verdicts)
        print(
            f"{len(verdicts)} faults, {SOAK_KILLS} of them kills → {points} points acknowledged, lost 0, twice 0, "
            f"torn 0, longest gap {gap:.1f} s, in {(time.monotonic() - began) / 60:.0f} min"
        )


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_metric_store_may_be_away_for_minutes(
    remote_platform: Platform, remote_store: RemoteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strike(remote_platform, [faults.clickhouse_away_for_minutes], tmp_path, capsys, remote_store)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_shards_memory_is_bounded_while_the_metric_store_is_away(
    remote_platform: Platform, remote_store: RemoteStore, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shard = new_run(Client(remote_platform.url)), remote_platform.status()["metric-shard-0"]["pid"]
    before = rss(shard)
    remote_store.server.kill()
    with ThreadPoolExecutor(4) as pool:
        sent = sum(pool.map(partial(_send_block, remote_platform.url, run), range(FLOOD_BATCHES)))
    away = rss(shard)
    behind = faults.lag(remote_platform)
    assert behind > 0
    remote_store.server.start()
    peak = away

    def caught_up() -> bool:
        nonlocal peak
        peak = max(peak, rss(shard))
        return faults.lag(remote_platform) == 0

    began = time.monotonic()
    eventually(caught_up, 300, "the shard has caught up")
    with capsys.disabled():
        print(
            f"\nmetric store away → {sent} points acknowledged, {behind} groups behind → memory {before >> 20} MiB, "
            f"then {away >> 20}, at most {peak >> 20} while it caught up in {time.monotonic() - began:.0f} s"
        )
    assert remote_platform.status()["metric-shard-0"]["pid"] == shard
    assert peak < MEMORY_CAP_BYTES
    statement = Statement("SELECT count() AS n FROM metric_points FINAL WHERE run_id = {run:String}", {"run": run})
    assert MetricStore(remote_store.url).query(statement)["n"].to_pylist() == [sent]


def _send_block(url: str, run: str, number: int) -> int:
    """Sends one large Arrow batch until it is acknowledged; returns its number of points."""
    steps = range(number * FLOOD_POINTS, (number + 1) * FLOOD_POINTS)
    body = encode(columns_table(run, ["loss"] * FLOOD_POINTS, steps, steps, [step / 7 for step in steps]))
    answer: dict[str, int] = client_for(url).post_bytes("/api/v1/metrics", body, ARROW)
    return answer["points"]
