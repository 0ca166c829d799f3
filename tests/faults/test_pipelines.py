"""Pipelines under faults: every accepted run ends as it should, and no step succeeds twice, whatever breaks.

Each test prints a line: fault → what fired → accepted, lost, twice, stuck, longest gap. ``make soak`` does much more.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from cluster.postgres import EmbeddedPostgres
from mlplat.db.engine import open_engine
from mlplat.db.lease import Lease, acquire
from mlplat.settings import embedded_postgres_url
from tests.conftest import short_folder
from tests.faults.lab import EXECUTORS, SCHEDULER, Lab, submitting
from tests.faults.proxy import FaultProxy
from tests.faults.verdicts import IDLE_S, close
from tests.platform import Platform, eventually


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The module's platform."""
    with short_folder() as folder:
        server = EmbeddedPostgres(folder / "db")
        server.home.parent.mkdir(mode=0o711)
        server.start()
        proxy = FaultProxy(server.socket_dir / ".s.PGSQL.5432")
        url = f"postgresql+psycopg://postgres@127.0.0.1:{proxy.port}/mlplat"
        platform = Platform(folder, extra={"MLPLAT_POSTGRES_URL": url, "MLPLAT_EXECUTORS": "2"})
        try:
            platform.mlplat("up")
            lab = Lab(platform, server, proxy, folder / "executions.jsonl")
            lab.watch()
            yield lab
        finally:
            proxy.heal()
            platform.run("down")
            proxy.close()
            server.stop()
        assert not platform.left_over()


def _kill_scheduler_while_submitting(lab: Lab, say: pytest.CaptureFixture[str], kills: int, prefix: str) -> None:
    fired = []
    with submitting(lab, lab.sweep("small", count=1), prefix, pace_s=0.2) as clients:
        for _ in range(kills):
            clients.progress(random.randint(1, 12))
            fired.append(lab.kill(SCHEDULER))
        clients.progress(4)
        accepted = clients.stop()
    close(lab, "scheduler killed while runs are submitted", fired[-1], accepted.runs, say, gap_s=accepted.gap_s)


def test_the_scheduler_dies_while_runs_are_submitted(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _kill_scheduler_while_submitting(lab, capsys, 2, "f1")


def test_scheduler_and_executor_die_while_steps_run(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Light attempts die with their executor, and that costs no retry; durable ones go on in the same process."""
    spec = lab.sweep("long", count=24, pause_s=3, durable=3, durable_s=14, retry={"max_attempts": 1})
    run_id = lab.submit(spec, "f2-0")
    eventually(lambda: len(lab.running(run_id)) >= 8, 60, "many steps run")
    fired = [lab.kill(SCHEDULER)]
    assert not lab.query("SELECT 1 FROM attempt WHERE run_id = %s AND state = 'LOST'", run_id)
    eventually(lambda: len(lab.running(f"{run_id}/light")) >= 4, 60, "many steps run again")
    fired.append(lab.kill(_executor(lab, run_id)))
    verdict = close(lab, "scheduler, then executor killed", "; ".join(fired), {"f2-0": run_id}, capsys)
    assert verdict.lost_attempts > 0
    assert verdict.idle_s < IDLE_S
    failures = lab.query("SELECT sum(failures) FROM step_run WHERE run_id = %s", run_id)
    assert failures == [(0,)], "what was lost was no failure"
    durable = lab.query("SELECT state FROM attempt WHERE run_id = %s AND step = 'durable'", run_id)
    assert durable == [("SUCCEEDED",)] * 3, "no durable attempt had to run again"


def test_a_frozen_scheduler_writes_nothing_under_its_old_epoch(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGSTOP past its lease, another holder takes it, SIGCONT: nothing is accepted until somebody leads again."""
    with submitting(lab, lab.sweep("small", count=1), "f3", pace_s=0.2) as clients:
        pid = lab.pid_of(SCHEDULER)
        lab.strike(pid, signal.SIGSTOP)
        try:
            rival = asyncio.run(_take_lease(lab, SCHEDULER, ttl_s=4))
        finally:
            os.kill(pid, signal.SIGCONT)
        after = lab.successor(SCHEDULER, pid)
        clients.progress(4)
        accepted = clients.stop()
    written = lab.query("SELECT count(*) FROM watched_write WHERE holder = %s", rival.holder)
    assert written == [(0,)], "the old leader wrote after another one had taken over"
    epoch = int(lab.query("SELECT epoch FROM lease WHERE name = %s", SCHEDULER)[0][0])
    assert epoch > rival.epoch
    fired = f"pid {pid} frozen past its lease, epoch {rival.epoch} taken by another, {after} leads under {epoch}"
    close(lab, "scheduler frozen", fired, accepted.runs, capsys, gap_s=accepted.gap_s)


async def _take_lease(lab: Lab, name: str, ttl_s: float) -> Lease:
    """Waits for a lease as a rival of its holder does."""
    engine = open_engine(embedded_postgres_url(lab.server.home.parent), "rival", 1)
    try:
        async with asyncio.timeout(20):
            return await acquire(engine, name, "rival", ttl_s)
    finally:
        await engine.dispose()


def test_a_frozen_executor_loses_its_runs_to_the_other(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """What it still has to say when it goes on changes nothing."""
    spec = lab.sweep("long", count=4, pause_s=2, durable=2, durable_s=15)
    runs = {f"f3b-{number}": lab.submit(spec, f"f3b-{number}") for number in range(2)}
    frozen, other = EXECUTORS
    mine = next(run_id for run_id in runs.values() if _executor(lab, run_id) == frozen)
    eventually(lambda: len(lab.running(mine)) >= 4, 60, "its steps run")
    pid = lab.pid_of(frozen)
    lab.strike(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        eventually(lambda: _executor(lab, mine) == other, 40, "its run goes to the other executor")
        moved_s = time.monotonic() - began
        eventually(lambda: lab.running(f"{mine}/light/"), 40, "the other one drives it")
    finally:
        os.kill(pid, signal.SIGCONT)
    fired = f"{frozen} {pid} frozen, its run moved after {moved_s:.1f} s, then it went on"
    verdict = close(lab, "executor frozen", fired, runs, capsys)
    assert verdict.lost_attempts > 0
    assert verdict.idle_s < IDLE_S
    durable = lab.query("SELECT state FROM attempt WHERE run_id = %s AND step = 'durable'", mine)
    assert durable == [("SUCCEEDED",)] * 2, "no durable attempt had to run again"
    assert lab.pid_of(frozen) == pid, "it lives, and takes runs again"


def _executor(lab: Lab, run_id: str) -> str:
    return str(lab.query("SELECT executor FROM pipeline_run WHERE run_id = %s", run_id)[0][0])
