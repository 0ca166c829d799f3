"""The registry under faults: whatever dies, what its clients see could have happened one change after another."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from cluster.postgres import EmbeddedPostgres
from tests.faults.stage import RECOVERY_S, kill_actor, rows
from tests.linearizability import UNKNOWN, Operation, is_linearizable
from tests.platform import Platform, eventually

CLIENTS = 16
VERSIONS = 3
ALIASES = ("champion", "previous")
REQUEST_TIMEOUT_S = 30.0
PACE_S = 0.02
#: Operations that every client has to end after each fault.
PROGRESS = 3
_MLFLOW = "/api/2.0/mlflow"

#: Versions of the aliases (0: not set), and stages of the versions.
State = tuple[tuple[int, ...], tuple[str, ...]]
START: State = ((0,) * len(ALIASES), ("None",) * VERSIONS)


def step(state: State, operation: Operation) -> State | None:
    """What the registry should do; see ``linearizability.Step``. Results are ``True``, ``False`` or what was read."""
    aliases, stages = state
    known, after = operation.returned != UNKNOWN, state
    match operation.what, operation.arguments:
        case "move", (moves,):
            accepted = all(expected in {None, aliases[index]} for index, _version, expected in moves)
            if accepted:
                targets = {index: version for index, version, _expected in moves}
                after = tuple(targets.get(index, version) for index, version in enumerate(aliases)), stages
            return None if known and operation.result != accepted else after
        case "stage", (version, stage, archive_others):
            made_way = [
                "Archived" if archive_others and found == stage and stage != "None" else found for found in stages
            ]
            made_way[version - 1] = stage
            return aliases, tuple(made_way)
        case "read", (index,):
            return None if known and operation.result != aliases[index] else state
        case "read all", ():
            return None if known and operation.result != aliases else state
        case "read stage", (version,):
            return None if known and operation.result != stages[version - 1] else state
    raise AssertionError(operation)


@dataclass
class Clients:
    """Clients that change and read one model, and note every operation."""

    url: str
    name: str
    history: list[Operation] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _ended: Counter[int] = field(default_factory=Counter)

    def start(self) -> None:
        """Lets them work."""
        self._threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def progress(self) -> None:
        """Returns when every client has had some further answers."""
        before = Counter(self._ended)

        def enough() -> bool:
            return all(self._ended[number] >= before[number] + PROGRESS for number in range(CLIENTS))

        eventually(enough, RECOVERY_S, "every client has answers")

    def stop(self) -> None:
        """Lets every client have its last answer."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * REQUEST_TIMEOUT_S)
            assert not thread.is_alive()
        assert not self.wrong, self.wrong[:3]

    def _work(self, number: int) -> None:
        dice = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S, trust_env=False) as http:
            while not self._stop.is_set():
                try:
                    self._one(http, dice)
                except Exception as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                    return
                self._ended[number] += 1
                self._stop.wait(PACE_S)

    def _one(self, http: httpx.Client, dice: random.Random) -> None:
        kind = dice.choice(["set", "cas", "swap", "delete", "stage", "read", "read", "read all", "read stage"])
        index, version = dice.randrange(len(ALIASES)), dice.randint(1, VERSIONS)
        if kind == "read":
            self._note("read", (index,), http, "GET", f"{_MLFLOW}/registered-models/alias", alias=ALIASES[index])
        elif kind == "read all":
            self._note("read all", (), http, "GET", f"/api/v1/models/{self.name}/aliases")
        elif kind == "read stage":
            self._note("read stage", (version,), http, "GET", f"{_MLFLOW}/model-versions/get", version=version)
        elif kind == "stage":
            stage, others = dice.choice(["Staging", "Production"]), dice.random() < 0.5
            url = f"/api/v1/models/{self.name}/versions/{version}/stage"
            self._note("stage", (version, stage, others), http, "POST", url, stage=stage, archive_others=others)
        else:
            moves = _moves(kind, index, version, dice)
            body = [
                {"alias": ALIASES[index], "version": version or None, "expected_version": expected}
                for index, version, expected in moves
            ]
            self._note("move", (moves,), http, "POST", f"/api/v1/models/{self.name}/aliases", moves=body)

    def _note(
        self, what: str, arguments: tuple[Any, ...], http: httpx.Client, method: str, url: str, **fields: Any
    ) -> None:
        called = time.monotonic()
        try:
            if method == "GET":
                answer = http.get(url, params={"name": self.name, **fields})
            else:
                answer = http.post(url, json=fields, headers={"Idempotency-Key": uuid.uuid4().hex})
        except httpx.TransportError as error:
            self._failed(what, arguments, called, type(error).__name__)
            return
        returned = time.monotonic()
        ours = answer.headers.get("content-type", "").startswith("application/json")
        if answer.status_code in {429, 503} or (answer.status_code == 500 and not ours):
            self._failed(what, arguments, called, str(answer.status_code))
            return
        self.history.append(Operation(what, arguments, called, returned, _result(what, answer)))

    def _failed(self, what: str, arguments: tuple[Any, ...], called: float, why: str) -> None:
        self.failures[why] += 1
        if not what.startswith("read"):  # a read without an answer says nothing
            self.history.append(Operation(what, arguments, called, UNKNOWN))


def _moves(kind: str, index: int, version: int, dice: random.Random) -> tuple[tuple[int, int, int | None], ...]:
    """(alias, version or 0, expected version)"""
    if kind == "set":
        return ((index, version, None),)
    if kind == "delete":
        return ((index, 0, dice.choice([None, version])),)
    expected = dice.randint(0, VERSIONS)
    if kind == "cas":
        return ((index, version, expected),)
    return ((0, version, expected), (1, expected, None)) if expected else ((0, version, 0),)


def _result(what: str, answer: httpx.Response) -> Any:
    """What the answer says, for ``step``."""
    if what in {"move", "stage"}:
        assert answer.status_code in {200, 409}, answer.text
        return answer.status_code == 200
    if what == "read" and answer.status_code == 400:
        assert "not found" in answer.text
        return 0
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if what == "read all":
        return tuple(body["aliases"].get(alias, 0) for alias in ALIASES)
    found = body["model_version"]
    return found["current_stage"] if what == "read stage" else int(found["version"])


def test_every_history_is_linearizable(platform: Platform, capsys: pytest.CaptureFixture[str]) -> None:
    clients = Clients(platform.url, f"model-{uuid.uuid4().hex[:8]}")
    with httpx.Client(base_url=f"{platform.url}{_MLFLOW}", timeout=REQUEST_TIMEOUT_S, trust_env=False) as http:
        http.post("/registered-models/create", json={"name": clients.name}).raise_for_status()
        for _ in range(VERSIONS):
            body = {"name": clients.name, "source": "s3://bucket/m"}
            http.post("/model-versions/create", json=body).raise_for_status()
    clients.start()
    clients.progress()
    fired = []
    for fault in ("registry-coordinator", "gateway", "postgres", "registry-coordinator"):
        if fault == "postgres":
            fired.append(f"postgres {_kill_postgres(platform)} killed")
        else:
            before, after = kill_actor(platform, fault)
            fired.append(f"{fault} {before} became {after}")
        clients.progress()
    clients.stop()
    for subject in (("move", "read", "read all"), ("stage", "read stage")):
        history = [operation for operation in clients.history if operation.what in subject]
        assert is_linearizable(history, step, START), f"{subject[0]}s are not linearizable"
    unknown = sum(operation.returned == UNKNOWN for operation in clients.history)
    with capsys.disabled():
        print(
            f"\nregistry → {'; '.join(fired)} → {len(clients.history)} operations of {CLIENTS} clients, {unknown} of "
            f"unknown outcome, every history linearizable; failed tries: {dict(clients.failures)}"
        )
    assert rows(platform)["registry-coordinator"]["health"] == "ok"


def _kill_postgres(platform: Platform) -> int:
    server = EmbeddedPostgres(platform.state_dir)
    pid = server.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: server.pid() not in {None, pid}, RECOVERY_S, "Postgres is back")
    return pid
