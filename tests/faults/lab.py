"""A platform to break: two executors, and a Postgres of the tests' own behind a proxy that can be slow or fall silent.

Triggers in its database note whatever must never happen: epochs that go back, final states that change.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg

from cluster.postgres import EmbeddedPostgres
from mlplat.pipelines.loader import build_spec
from mlplat.sdk.client import Client
from mlplat.sdk.pipeline_runs import OCTETS
from mlplat.sdk.shipping import Shipper
from tests.faults import pipeline_steps as steps
from tests.faults.proxy import FaultProxy
from tests.faults.stage import rows
from tests.platform import ROOT, Platform, eventually

RECOVERY_S = 120
SCHEDULER = "pipeline-scheduler"
EXECUTORS = ("run-executor-0", "run-executor-1")
_TABLES = ("pipeline_run", "step_run", "attempt")

_WATCH = """
CREATE TABLE IF NOT EXISTS watched_violation (at timestamptz DEFAULT clock_timestamp(), what text);
CREATE TABLE IF NOT EXISTS watched_write (at timestamptz DEFAULT clock_timestamp(), run_id text, epoch bigint,
    executor text, holder text);
CREATE OR REPLACE FUNCTION watch_run() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF new.epoch < old.epoch OR new.seq < old.seq
            OR (old.state IN ('SUCCEEDED', 'FAILED', 'CANCELLED') AND new.state <> old.state) THEN
            INSERT INTO watched_violation (what) VALUES (format('run %s: epoch %s → %s, seq %s → %s, %s → %s',
                old.run_id, old.epoch, new.epoch, old.seq, new.seq, old.state, new.state));
        END IF;
    END IF;
    IF TG_OP = 'INSERT' OR new.epoch <> old.epoch THEN
        INSERT INTO watched_write (run_id, epoch, executor, holder) VALUES (new.run_id, new.epoch, new.executor,
            (SELECT holder FROM lease WHERE name = 'pipeline-scheduler'));
    END IF;
    RETURN new; END $$;
CREATE OR REPLACE FUNCTION watch_attempt() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF old.state NOT IN ('QUEUED', 'RUNNING') AND new.state <> old.state THEN
        INSERT INTO watched_violation (what) VALUES (format('attempt %s/%s/%s/%s: %s → %s',
            old.run_id, old.step, old.item, old.attempt, old.state, new.state));
    END IF;
    RETURN new; END $$;
CREATE OR REPLACE FUNCTION watch_lease() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF new.epoch < old.epoch THEN
        INSERT INTO watched_violation (what) VALUES (format('lease %s: %s → %s', old.name, old.epoch, new.epoch));
    END IF;
    RETURN new; END $$;
CREATE OR REPLACE TRIGGER watch AFTER INSERT OR UPDATE ON pipeline_run FOR EACH ROW EXECUTE FUNCTION watch_run();
CREATE OR REPLACE TRIGGER watch AFTER UPDATE ON attempt FOR EACH ROW EXECUTE FUNCTION watch_attempt();
CREATE OR REPLACE TRIGGER watch AFTER UPDATE ON lease FOR EACH ROW EXECUTE FUNCTION watch_lease();
"""


@dataclass
class Lab:
    """The platform with everything that faults need. ``struck`` has the times of faults, as ``time.time()``."""

    platform: Platform
    server: EmbeddedPostgres
    proxy: FaultProxy
    log: Path
    struck: list[float] = field(default_factory=list)
    #: When a process was killed, by pid.
    killed: dict[int, float] = field(default_factory=dict)
    _uses: dict[Callable[..., Any], str] = field(default_factory=dict)

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows, past the proxy."""
        with self.connect() as connection:
            cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A connection past the proxy."""
        return psycopg.connect(
            host=str(self.server.socket_dir), user="postgres", dbname="mlplat", autocommit=True, connect_timeout=10
        )

    def watch(self) -> None:
        """Installs the triggers."""
        with self.connect() as connection:
            connection.execute(_WATCH.encode())

    def uses(self, function: Callable[..., Any]) -> str:
        """The function's ``uses``; its code lies on the platform afterwards."""
        if function not in self._uses:
            client = Client(self.platform.url)
            shipper = Shipper(lambda body: str(client.post_bytes("/api/v1/blobs", body, OCTETS)["digest"]))
            self._uses[function] = shipper.function(function)
        return self._uses[function]

    def sweep(
        self,
        name: str,
        *,
        count: int = 2,
        pause_s: float = 0.0,
        failing: float = 0.0,
        durable: int = 0,
        gate: Path | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """A definition: numbers → pieces, some of them light, some durable → total.

        ``gate`` is the file for which pieces wait, and ``options`` are theirs, too.
        """
        log = {"log": str(self.log)}
        piece = {"uses": self.uses(steps.piece), "resources": {"cpus": 0.5}, **options}
        work = {"number": "${{ item }}", "pause_s": pause_s, "failing": failing, "gate": str(gate or ""), **log}
        document: dict[str, Any] = {
            "name": name,
            "steps": {
                "numbers": {"uses": self.uses(steps.numbers), "with": {"count": count, **log}},
                "light": {**piece, "foreach": "${{ steps.numbers.output }}", "with": work},
                "total": {"uses": self.uses(steps.total), "with": {"values": "${{ steps.light.output }}", **log}},
            },
        }
        if durable:
            document["steps"]["durable"] = {
                **piece, "durable": True, "resources": {"cpus": 0}, "foreach": list(range(durable)),
                "with": {**work, "failing": 0.0},
            }  # fmt: skip
        return build_spec(document).to_json()

    def single(self, name: str, function: Callable[..., Any], /, **step: Any) -> dict[str, Any]:
        """A definition of one step."""
        return build_spec({"name": name, "steps": {"only": {"uses": self.uses(function), **step}}}).to_json()

    def submit(self, spec: Mapping[str, Any], key: str) -> str:
        """One run, submitted with patience; returns its id."""
        body = {"spec": spec, "idempotency_key": key, "submitted_by": key.partition("-")[0]}
        return str(Client(self.platform.url).post("/api/v1/pipeline-runs", body)["run_id"])

    def state(self, run_id: str) -> str:
        """The run's state, from the database."""
        return str(self.query("SELECT state FROM pipeline_run WHERE run_id = %s", run_id)[0][0])

    def wait(self, run_ids: Sequence[str], timeout_s: float = 90) -> set[str]:
        """Waits until they are over; returns those that are not."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.query(
                "SELECT run_id FROM pipeline_run WHERE run_id = ANY(%s) AND state IN ('PENDING', 'QUEUED', 'RUNNING')",
                list(run_ids),
            )
            if not found or time.monotonic() > deadline:
                return {str(row[0]) for row in found}
            time.sleep(0.1)

    def executions(self) -> list[dict[str, Any]]:
        """What the steps have written down."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def running(self, run_id: str = "") -> dict[str, int]:
        """Executions under way, of that run or of all: label → pid."""
        found: dict[str, int] = {}
        for entry in self.executions():
            if not entry["label"].startswith(run_id):
                continue
            if entry["what"] == "begin":
                found[entry["label"]] = entry["pid"]
            else:
                found.pop(entry["label"], None)
        return {label: pid for label, pid in found.items() if psutil.pid_exists(pid)}

    def rows_of(self, run_id: str) -> list[tuple[Any, ...]]:
        """Every row of a run, whole."""
        statement = "SELECT to_jsonb(r)::text FROM {0} r WHERE run_id = %s ORDER BY 1"
        return [row for table in _TABLES for row in self.query(statement.format(table), run_id)]

    def as_driver(self, code: str) -> Any:
        """What the expression gives in a process that may join the Ray cluster, as JSON."""
        text = f"import json\nfrom tests.faults import drivers, rival\nprint('\\n' + json.dumps({code}))"
        answer = self.platform.python(text, 120, PYTHONPATH=str(ROOT), **self.platform.ray_environment)
        return json.loads(answer.strip().splitlines()[-1])

    # -- faults ------------------------------------------------------------------------------------

    def pid_of(self, actor: str) -> int:
        """The actor's process."""
        pid: int = eventually(lambda: rows(self.platform).get(actor, {}).get("pid"), RECOVERY_S, f"{actor} has a pid")
        return pid

    def strike(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Sends the signal and notes when."""
        self.struck.append(time.time())
        os.kill(pid, number)
        if number == signal.SIGKILL:
            self.killed[pid] = self.struck[-1]

    def kill(self, actor: str) -> str:
        """``kill -9`` of the actor; returns when its successor answers."""
        pid = self.pid_of(actor)
        began = time.monotonic()
        self.strike(pid)
        after = self.successor(actor, pid)
        return f"{actor} {pid} became {after} in {time.monotonic() - began:.1f} s"

    def successor(self, actor: str, pid: int) -> int:
        """The pid of the process that has come for ``pid``, once it answers."""

        def find() -> int | None:
            row = rows(self.platform).get(actor, {})
            return row["pid"] if row.get("health") == "ok" and row["pid"] != pid else None

        found: int = eventually(find, RECOVERY_S, f"{actor} is back")
        return found

    def stop_postgres(self) -> int:
        """``pg_ctl -m immediate stop``: no connection is told, nothing is written."""
        pid = self.server.pid()
        assert pid is not None
        self.strike(pid, signal.SIGQUIT)
        eventually(lambda: not self.server.is_running(), 20, "Postgres has stopped")
        return pid

    def stop_postgres_during_recovery(self) -> str:
        """Starts the server and stops it as soon as it has a process."""
        starting = threading.Thread(target=self._start_in_vain, daemon=True)
        starting.start()
        pid = eventually(self._postmaster, 20, "Postgres starts")
        os.kill(pid, signal.SIGQUIT)
        starting.join(60)
        return f"{pid} stopped while it recovered"

    def _start_in_vain(self) -> None:
        with suppress(Exception):  # it is stopped meanwhile
            self.server.start()

    def _postmaster(self) -> int | None:
        try:
            return int((self.server.data / "postmaster.pid").read_text().split()[0])
        except (FileNotFoundError, IndexError, ValueError):
            return None

    def leftovers(self) -> list[str]:
        """Processes that belong to attempts which are over: durable actors, and what steps have started."""
        marks = ("ray::DurableAttempt", steps.CHILD_MARK)
        found = []
        for process in self.platform.processes():
            with suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline())
                if any(mark in command for mark in marks):
                    found.append(f"{process.pid} {command[:80]}")
        return found


@dataclass
class Accepted:
    """What clients were told: run ids by idempotency key, when, and what else they were told."""

    runs: dict[str, str] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def gap_s(self) -> float:
        """The longest time between two acceptances."""
        return max((after - before for before, after in pairwise(sorted(self.times))), default=0.0)


#: How long a client goes on asking with one key.
PATIENCE_S = 120.0
REQUEST_TIMEOUT_S = 20.0


class Clients:
    """Clients that submit one run after another, each with a key that they keep until they have an answer.

    Every fifth run is submitted a second time after its answer, as a client does that lost it.
    """

    def __init__(self, lab: Lab, spec: Mapping[str, Any], prefix: str, count: int, pace_s: float) -> None:
        self.accepted = Accepted()
        self._lab, self._spec, self._prefix, self._pace_s = lab, spec, prefix, pace_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def progress(self, runs: int) -> None:
        """Returns when so many further runs are accepted."""
        before = len(self.accepted.times)
        eventually(lambda: len(self.accepted.times) >= before + runs, RECOVERY_S, f"{runs} more runs are accepted")

    def stop(self) -> Accepted:
        """Lets every client have its last answer."""
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S + REQUEST_TIMEOUT_S)
            assert not thread.is_alive(), "a client has no answer"
        assert not self.accepted.wrong, self.accepted.wrong[:3]
        return self.accepted

    def _work(self, client: int) -> None:
        with httpx.Client(base_url=self._lab.platform.url, timeout=REQUEST_TIMEOUT_S, trust_env=False) as http:
            for number in range(1_000_000):
                if self._stop.is_set():
                    return
                key = f"{self._prefix}-{client}-{number}"
                run_id = self._submit(http, key)
                if run_id is None:
                    return
                self.accepted.runs[key] = run_id
                self.accepted.times.append(time.monotonic())
                if number % 5 == 0 and self._submit(http, key) not in {run_id, None}:
                    self.accepted.wrong.append(f"{key} has two runs")
                self._stop.wait(self._pace_s)

    def _submit(self, http: httpx.Client, key: str) -> str | None:
        body = {"spec": self._spec, "idempotency_key": key, "submitted_by": self._prefix}
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                answer = http.post("/api/v1/pipeline-runs", json=body)
            except httpx.TransportError as error:
                self.accepted.failures.append(type(error).__name__)
            else:
                if answer.is_success:
                    return str(answer.json()["run_id"])
                after = " Retry-After" if "retry-after" in answer.headers else ""
                self.accepted.failures.append(f"{answer.status_code}{after}")
                ours = answer.headers.get("content-type", "").startswith("application/json")
                if not after and (ours or answer.status_code != 500):  # HAProxy's own "no replica there" is a 500
                    self.accepted.wrong.append(f"{key} was answered {answer.status_code}: {answer.text[:300]}")
                    return None
            time.sleep(0.2)
        self.accepted.wrong.append(f"{key} has no answer after {PATIENCE_S:g} s: {self.accepted.failures[-3:]}")
        return None


@contextmanager
def submitting(
    lab: Lab, spec: Mapping[str, Any], prefix: str, *, clients: int = 4, pace_s: float = 0.15
) -> Iterator[Clients]:
    """Clients at work, from their first acceptances on."""
    working = Clients(lab, spec, prefix, clients, pace_s)
    try:
        working.progress(clients)
        yield working
    finally:
        working._stop.set()
