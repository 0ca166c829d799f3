"""Pipelines under faults: every accepted run ends as it should, and no step succeeds twice, whatever breaks.

Each test prints a line: fault → what fired → accepted, lost, twice, stuck, longest gap. ``make soak`` does much more.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from mlplat.db.engine import open_engine
from mlplat.db.lease import Lease, acquire
from mlplat.settings import embedded_postgres_url
from tests.faults import pipeline_steps as steps
from tests.faults.lab import EXECUTORS, SCHEDULER, Lab, submitting
from tests.faults.verdicts import close
from tests.platform import eventually

#: Seconds after which an attempt times out that is adopted meanwhile.
LATE_S = 20
#: For what must happen, however much else this machine has to do.
PATIENCE_S = 120
#: How long nothing arrives: more than a lease lasts.
SILENT_S = 8
#: Attempts that fail by themselves, and what their steps are allowed.
FAILING = 0.2
#: Kills for each run: what dies has to start anew, which takes a CPU a second.
KILLED = 0.25
RETRY = {"max_attempts": 12, "initial_s": 0.1, "factor": 1, "cap_s": 0.1}


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


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_scheduler_dies_a_hundred_times(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _kill_scheduler_while_submitting(lab, capsys, 100, "f1soak")


def test_scheduler_and_executors_die_while_steps_run(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Light attempts die with their executor, and that costs no retry; durable ones go on, and keep their timeout."""
    gate = tmp_path / "gate"
    spec = lab.sweep("long", count=20, durable=3, gate=gate, retry={"max_attempts": 1})
    work = {"number": 0, "pause_s": 600, "failing": 0, "gate": "", "log": str(lab.log)}
    late = lab.single(
        "late", steps.piece, durable=True, timeout_s=LATE_S, resources={"cpus": 0}, **{"with": work}
    )  # fmt: skip
    runs = {"f2-0": lab.submit(spec, "f2-0"), "f2-1": lab.submit(late, "f2-1")}
    eventually(lambda: len(lab.running(runs["f2-0"])) >= 8, PATIENCE_S, "many steps run")
    fired = [lab.kill(SCHEDULER)]
    assert not lab.query("SELECT 1 FROM attempt WHERE run_id = %s AND state = 'LOST'", runs["f2-0"])
    assert lab.running(f"{runs['f2-0']}/light/"), "light attempts run"
    pids = {executor: lab.pid_of(executor) for executor in EXECUTORS}
    for pid in pids.values():
        lab.strike(pid)
    fired += [f"{executor} {pid} became {lab.successor(executor, pid)}" for executor, pid in pids.items()]
    gate.touch()
    states = {"f2-1": "FAILED"}
    verdict = close(lab, "scheduler, then executors killed", "; ".join(fired), runs, capsys, expected=states)
    assert verdict.lost_attempts > 0
    failures = lab.query("SELECT sum(failures) FROM step_run WHERE run_id = %s", runs["f2-0"])
    assert failures == [(0,)], "what was lost was no failure"
    ends = lab.query("SELECT state FROM attempt WHERE run_id = %s AND step = 'durable'", runs["f2-0"])
    assert ends == [("SUCCEEDED",)] * 3, "no durable attempt had to run again"
    over = [entry["at"] for entry in lab.executions() if "/durable/" in entry["label"] and entry["what"] == "end"]
    assert min(over) > lab.struck[-1], "they were under way when their executor died"
    errors = lab.query("SELECT error FROM attempt WHERE run_id = %s", runs["f2-1"])
    assert errors == [(f"timed out after {LATE_S:g} s",)], "an adopted attempt keeps its timeout"


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
        async with asyncio.timeout(PATIENCE_S):
            return await acquire(engine, name, "rival", ttl_s)
    finally:
        await engine.dispose()


def test_a_frozen_executor_loses_its_runs_to_the_other(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it still has to say when it goes on changes nothing."""
    gate = tmp_path / "gate"
    spec = lab.sweep("long", count=2, durable=2, gate=gate)  # half of the CPUs are left for light attempts that go over
    runs = {f"f3b-{number}": lab.submit(spec, f"f3b-{number}") for number in range(2)}
    frozen, other = EXECUTORS
    mine = next(run_id for run_id in runs.values() if _executor(lab, run_id) == frozen)
    eventually(lambda: len(lab.running(mine)) >= 4, PATIENCE_S, "its steps run")
    pid = lab.pid_of(frozen)
    lab.strike(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        eventually(lambda: _executor(lab, mine) == other, PATIENCE_S, "its run goes to the other executor")
        moved_s = time.monotonic() - began
        eventually(lambda: _second_attempts(lab, mine), PATIENCE_S, "the other one drives it")
    finally:
        os.kill(pid, signal.SIGCONT)
    gate.touch()
    fired = f"{frozen} {pid} frozen, its run moved after {moved_s:.1f} s, then it went on"
    verdict = close(lab, "executor frozen", fired, runs, capsys)
    assert verdict.lost_attempts > 0
    durable = lab.query("SELECT state FROM attempt WHERE run_id = %s AND step = 'durable'", mine)
    assert durable == [("SUCCEEDED",)] * 2, "no durable attempt had to run again"
    assert lab.pid_of(frozen) == pid, "it lives, and takes runs again"


def _second_attempts(lab: Lab, run_id: str) -> list[str]:
    return [label for label in lab.running(f"{run_id}/light/") if label.endswith("/2")]


def _executor(lab: Lab, run_id: str) -> str:
    return str(lab.query("SELECT executor FROM pipeline_run WHERE run_id = %s", run_id)[0][0])


def _kill_workers(lab: Lab, say: pytest.CaptureFixture[str], runs: int, prefix: str, every_s: float) -> None:
    spec = lab.sweep("flaky", count=2, pause_s=0.5, failing=FAILING, retry=RETRY)
    for step in spec["steps"].values():
        step["retry"] = RETRY
    accepted = {f"{prefix}-{number}": lab.submit(spec, f"{prefix}-{number}") for number in range(runs)}
    chance, killed = random.Random(prefix), 0
    deadline = time.monotonic() + 2 * runs + 60
    while lab.wait(list(accepted.values()), every_s) and time.monotonic() < deadline:
        victims = lab.running() if killed < runs * KILLED else {}
        if victims:
            with suppress(ProcessLookupError):
                lab.strike(victims[chance.choice(sorted(victims))])
                killed += 1
    assert killed > 0
    fired = f"{killed} workers killed, {FAILING:.0%} of attempts fail by themselves"
    close(lab, "worker processes killed", fired, accepted, say)


def test_workers_die_at_random(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _kill_workers(lab, capsys, 60, "f5", 0.4)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_runs_survive_random_kills(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _kill_workers(lab, capsys, 1000, "f5soak", 0.4)


def _stop_postgres_under_load(lab: Lab, say: pytest.CaptureFixture[str], away_s: list[float], prefix: str) -> None:
    """Each outage ends with one more stop while the server recovers."""
    long = {f"{prefix}long-0": lab.submit(lab.sweep("long", count=8, pause_s=1), f"{prefix}long-0")}
    fired = []
    with submitting(lab, lab.sweep("small", count=1), prefix, pace_s=0.2) as clients:
        for seconds in away_s:
            pid = lab.stop_postgres()
            if seconds:
                _refused(lab)
                time.sleep(seconds)
            again = lab.stop_postgres_during_recovery()
            lab.server.start()
            fired.append(f"{pid} away for {seconds:g} s, {again}")
            clients.progress(4)
        accepted = clients.stop()
    odd = [failure for failure in accepted.failures if failure not in {"503 Retry-After", "ReadTimeout"}]
    assert not odd, "clients wait, or are told when to come back"
    fault = f"Postgres stopped {len(away_s)} times"
    close(lab, fault, fired[-1], accepted.runs | long, say, gap_s=accepted.gap_s)


def _refused(lab: Lab) -> None:
    """A request that needs Postgres is told when to come back."""
    answer = httpx.get(f"{lab.platform.url}/api/v1/pipeline-runs", timeout=30, trust_env=False)
    assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "1"), answer.text


def test_postgres_stops_under_load(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _stop_postgres_under_load(lab, capsys, [0, 3], "f8")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_postgres_stops_again_and_again(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _stop_postgres_under_load(lab, capsys, [random.uniform(0, 8) for _ in range(40)], "f8soak")


def test_the_way_to_postgres_fails(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Slow, then silent for longer than the scheduler's lease; connections that fell silent stay so."""
    long = {"f9long-0": lab.submit(lab.sweep("long", count=8, pause_s=1), "f9long-0")}
    delayed, swallowed = lab.proxy.delayed, lab.proxy.swallowed
    pid = lab.pid_of(SCHEDULER)
    with submitting(lab, lab.sweep("small", count=1), "f9", pace_s=0.2) as clients:
        lab.proxy.slow_down(0.2)
        clients.progress(4)
        lab.proxy.heal()
        lab.struck.append(time.time())
        lab.proxy.swallow()
        time.sleep(SILENT_S)
        lab.proxy.heal()
        after = lab.successor(SCHEDULER, pid)
        clients.progress(4)
        accepted = clients.stop()
    slow, lost = lab.proxy.delayed - delayed, lab.proxy.swallowed - swallowed
    assert slow
    assert lost
    fired = f"{slow} chunks slow, {lost} lost, scheduler {pid} gave its lease up and became {after}"
    close(lab, "the way to Postgres slow, then silent", fired, accepted.runs | long, capsys, gap_s=accepted.gap_s)
