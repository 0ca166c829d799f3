"""Pipelines that would harm others, and faults around them: a second scheduler, a lost node, a node without memory.

Each test prints a line, as in ``test_pipelines``.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlplat.artifacts.segments import MAX_LOG_BYTES
from mlplat.artifacts.store import ArtifactStore
from mlplat.pipelines.loader import build_spec
from tests.faults import pipeline_steps as steps
from tests.faults.lab import EXECUTORS, SCHEDULER, Lab, submitting
from tests.faults.nodes import Node, joined
from tests.faults.stage import rows
from tests.faults.verdicts import close
from tests.platform import eventually

PATIENCE_S = 120
#: The resource of the node that is lost, and how much of it there is.
EDGE = {"edge": 8.0}
GIB = 1024**3
#: What may still be taken on a node before it ends who has taken most; and what a step takes then.
ROOM_BYTES, TAKEN_BYTES = GIB, 3 * GIB
ONCE = {"max_attempts": 1}
TWICE = {"max_attempts": 2, "initial_s": 0.1}


# -- a second scheduler ----------------------------------------------------------------------------


@contextmanager
def _rival(lab: Lab) -> Iterator[str]:
    """A second scheduler; who it is as the holder of a lease. At its end it hands over, as in an upgrade."""
    yield lab.as_driver("rival.start()")
    lab.as_driver("rival.end()")


def _leader(lab: Lab) -> tuple[str, int]:
    """Who leads, and under which epoch."""
    [(holder, epoch)] = lab.query("SELECT holder, epoch FROM lease WHERE name = %s", SCHEDULER)
    return str(holder), int(epoch)


def _two_schedulers(lab: Lab, say: pytest.CaptureFixture[str], starts: int, prefix: str) -> None:
    """Both start at one moment, again and again; then one takes over from the other, and back."""
    with submitting(lab, lab.sweep("small", count=1), prefix, pace_s=0.2) as clients:
        epochs = [_leader(lab)[1]]
        with _rival(lab) as rival:
            for _ in range(starts):
                _start_again_at_once(lab)
                epochs.append(_led_since(lab, epochs[-1]))
            if _leader(lab)[0] != rival:
                _freeze_until(lab, lab.pid_of(SCHEDULER), rival)
                epochs.append(_led_since(lab, epochs[-1]))
        eventually(lambda: _leader(lab)[0] != rival, PATIENCE_S, "the first one leads again")
        epochs.append(_led_since(lab, epochs[-1]))
        clients.progress(4)
        accepted = clients.stop()
    fired = f"{starts} starts of both at once, then the rival led and handed over: epochs {epochs}"
    close(lab, "two schedulers at once", fired, accepted.runs, say, gap_s=accepted.gap_s)


def _start_again_at_once(lab: Lab) -> None:
    before = eventually(lambda: _both(lab), PATIENCE_S, "two schedulers run")
    for pid in random.sample(sorted(before), 2):
        lab.strike(pid)
    eventually(lambda: not before & _both(lab) and _both(lab), PATIENCE_S, "both run again")


def _both(lab: Lab) -> set[int]:
    """The processes of the schedulers, once there are two."""
    found = set()
    for process in lab.platform.processes():
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith("ray::PipelineScheduler"):
                found.add(process.pid)
    return found if len(found) == 2 else set()


def _led_since(lab: Lab, epoch: int) -> int:
    """The epoch of whoever leads after the leader of ``epoch``."""
    found: int = eventually(lambda: max(0, _leader(lab)[1] - epoch), PATIENCE_S, "somebody leads") + epoch
    return found


def _freeze_until(lab: Lab, pid: int, holder: str) -> None:
    """The leader stands still until the other one has taken its lease, and then goes on."""
    lab.strike(pid, signal.SIGSTOP)
    try:
        eventually(lambda: _leader(lab)[0] == holder, PATIENCE_S, "the rival leads")
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.soak
def test_two_schedulers_at_once(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _two_schedulers(lab, capsys, 2, "f4")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_schedulers_start_at_once_again_and_again(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _two_schedulers(lab, capsys, 50, "f4soak")


# -- results that come late, or again --------------------------------------------------------------


@pytest.mark.soak
def test_results_that_come_late_or_again_change_nothing(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An executor stands still while another one drives its run to the end; then it hears of every result, too."""
    gate = tmp_path / "gate"
    spec = lab.sweep("late", count=1, durable=2, gate=gate, timeout_s=600)
    runs = {f"f17-{number}": lab.submit(spec, f"f17-{number}") for number in range(2)}
    frozen, other = EXECUTORS
    mine = next(run_id for run_id in runs.values() if _executor(lab, run_id) == frozen)
    eventually(lambda: len(lab.running(mine)) == 3, PATIENCE_S, "its steps run")
    pid = lab.pid_of(frozen)
    lab.strike(pid, signal.SIGSTOP)
    try:
        eventually(lambda: f"{mine}/light/0/2" in lab.running(mine), PATIENCE_S, "the other one drives it")
        again = lab.as_driver(f"drivers.say_again({other!r}, {_labels(mine)!r})")
        gate.touch()
        assert not lab.wait([mine]), "the run ends without it"
        before = lab.rows_of(mine)
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: _idle(lab, frozen), PATIENCE_S, "it has let its attempts go")
    for executor in EXECUTORS:
        again += lab.as_driver(f"drivers.say_again({executor!r}, {_labels(mine)!r})")
    assert lab.rows_of(mine) == before
    late = [label for label in ("light/0/1", "light/0/2") if f"{mine}/{label}" in _ended(lab)]
    fired = f"{frozen} heard of a run that was over, {len(late)} ends of one item, {again} notices again"
    close(lab, "results late and again", fired, runs, capsys)
    assert late == ["light/0/1", "light/0/2"], "the attempt that was given up ended, too"


def _labels(run_id: str) -> list[str]:
    """Attempts of the run, and some that there never were."""
    real = [f"{run_id}/light/0/1", f"{run_id}/light/0/2", f"{run_id}/durable/0/1", f"{run_id}/numbers/-1/1"]
    return [*real, f"{run_id}/light/0/9", f"{run_id}/light/7/1", f"{run_id}/nobody/-1/1", "nobody/light/0/1"]


def _executor(lab: Lab, run_id: str) -> str:
    return str(lab.query("SELECT executor FROM pipeline_run WHERE run_id = %s", run_id)[0][0])


def _idle(lab: Lab, executor: str) -> bool:
    return bool(rows(lab.platform).get(executor, {}).get("lag") == "0 attempts")


def _ended(lab: Lab) -> set[str]:
    return {entry["label"] for entry in lab.executions() if entry["what"] == "end"}


# -- a node ----------------------------------------------------------------------------------------


def _on_edge(lab: Lab, name: str, gate: Path) -> dict[str, Any]:
    """Two light attempts and a durable one on the further node, none of which may fail."""
    work = {"pause_s": 0, "failing": 0, "gate": str(gate), "log": str(lab.log)}
    piece = {"uses": lab.uses(steps.piece), "retry": ONCE, "resources": {"cpus": 0, "custom": {"edge": 1}}}
    numbers = "${{ [steps.light.output[0], steps.light.output[1], steps.durable.output] }}"
    document = {
        "name": name,
        "steps": {
            "light": piece | {"foreach": [1, 2], "with": work | {"number": "${{ item }}"}},
            "durable": piece | {"durable": True, "with": work | {"number": 4}},
            "total": {"uses": lab.uses(steps.total), "with": {"values": numbers, "log": str(lab.log)}},
        },
    }
    return build_spec(document).to_json()


@pytest.mark.soak
def test_a_node_is_lost_with_everything_on_it(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = tmp_path / "gate"
    here = lab.sweep("here", count=2, gate=gate, retry=ONCE)
    with joined(lab.platform, EDGE, {}) as node:
        runs = {"f6-0": lab.submit(_on_edge(lab, "there", gate), "f6-0"), "f6-1": lab.submit(here, "f6-1")}
        there = runs["f6-0"]
        eventually(lambda: len(lab.running(there)) == 3 and len(lab.running(runs["f6-1"])) == 2, PATIENCE_S, "all run")
        assert set(lab.running(there).values()) <= {process.pid for process in node.processes()}
        lab.struck.append(time.time())
        processes = node.kill()
    with joined(lab.platform, EDGE, {}) as node:
        eventually(lambda: len(lab.running(there)) == 3, PATIENCE_S, "its attempts run on another node")
        began = [entry["at"] for entry in lab.executions() if entry["label"] in lab.running(there)]
        gate.touch()
        fired = f"{processes} processes gone, noticed after {_noticed(lab, there)} s, all ran again "
        fired += f"{max(began) - lab.struck[-1]:.1f} s after it"
        verdict = close(lab, "a node lost", fired, runs, capsys)
    assert verdict.lost_attempts >= 3
    failures = lab.query("SELECT sum(failures) FROM step_run WHERE run_id = ANY(%s)", list(runs.values()))
    assert failures == [(0,)], "what was lost was no failure"
    assert not _unsuccessful(lab, runs["f6-1"]), "others went on"


def _unsuccessful(lab: Lab, run_id: str) -> list[tuple[Any, ...]]:
    """Attempts of the run that did not succeed."""
    statement = "SELECT step, item, attempt, state, error FROM attempt WHERE run_id = %s AND state <> 'SUCCEEDED'"
    return lab.query(statement, run_id)


def _noticed(lab: Lab, run_id: str) -> str:
    found = lab.query(
        "SELECT step, extract(epoch FROM max(finished_at))::float8 FROM attempt "
        "WHERE run_id = %s AND attempt = 1 AND finished_at IS NOT NULL GROUP BY step ORDER BY step", run_id,
    )  # fmt: skip
    return ", ".join(f"{at - lab.struck[-1]:.1f} ({step})" for step, at in found)


@contextmanager
def _node_with_little_memory(lab: Lab) -> Iterator[Node]:
    memory = psutil.virtual_memory()
    if memory.available < 2 * TAKEN_BYTES:
        pytest.skip(f"it takes a machine with {2 * TAKEN_BYTES // GIB} GiB free")
    taken = memory.total - memory.available
    threshold = {"RAY_memory_usage_threshold": f"{(taken + ROOM_BYTES) / memory.total:.4f}"}
    with joined(lab.platform, EDGE, threshold) as node:
        yield node


@pytest.mark.soak
def test_a_step_that_takes_all_memory_ends_alone(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The node ends it, light or durable; that counts as a failure, so it is not tried for ever."""
    gate = tmp_path / "gate"
    step = {"retry": TWICE, "resources": {"cpus": 0, "custom": {"edge": 8}}, "with": {"megabytes": TAKEN_BYTES >> 20}}
    with _node_with_little_memory(lab):
        runs = {"f19-2": lab.submit(lab.sweep("beside", count=2, gate=gate, retry=ONCE), "f19-2")}
        eventually(lambda: len(lab.running(runs["f19-2"])) == 2, PATIENCE_S, "others are at work")
        for number, durable in enumerate((False, True)):
            key = f"f19-{number}"
            runs[key] = lab.submit(lab.single("swallows", steps.swallow, durable=durable, **step), key)
        greedy = [runs["f19-0"], runs["f19-1"]]
        assert not lab.wait(greedy, PATIENCE_S)
        gate.touch()
        errors = lab.query("SELECT state, error FROM attempt WHERE run_id = ANY(%s)", greedy)
        fired = f"{sum('out of memory' in str(error) for _state, error in errors)} attempts out of memory"
        states = {"f19-0": "FAILED", "f19-1": "FAILED"}
        close(lab, "a node without memory", fired, runs, capsys, expected=states)
    assert errors == [("FAILED", "out of memory: the node killed the attempt's process")] * 4
    told = lab.query("SELECT DISTINCT error FROM pipeline_run WHERE run_id = ANY(%s)", greedy)
    assert told == [("step 'only' failed: out of memory: the node killed the attempt's process",)]
    assert not _unsuccessful(lab, runs["f19-2"]), "others went on"


# -- poison ----------------------------------------------------------------------------------------

TIMEOUT_S = 3
_TIMED_OUT = f"timed out after {TIMEOUT_S} s"
_SHORT = {"timeout_s": TIMEOUT_S, "resources": {"cpus": 0.25}}
_PLAIN = {"resources": {"cpus": 0.25}}
#: What the step does, its definition, and how its run ends: a part of the error, or None where it succeeds.
_POISON: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "spins": (steps.spin, _SHORT, _TIMED_OUT),
    "spins, deaf": (steps.spin_deaf, _SHORT, _TIMED_OUT),
    "spins, deaf, durable": (steps.spin_deaf, _SHORT | {"durable": True}, _TIMED_OUT),
    "forks": (steps.multiply, _SHORT | {"with": {"children": 3}}, _TIMED_OUT),
    "forks, durable": (steps.multiply, _SHORT | {"durable": True, "with": {"children": 3}}, _TIMED_OUT),
    "exits": (steps.exit_at_once, _PLAIN | {"retry": TWICE}, "the attempt's process died"),
    "exits, durable": (steps.exit_at_once, _PLAIN | {"retry": TWICE, "durable": True}, "the attempt's process died"),
    "cannot import": (steps.raise_import_error, _PLAIN, "ModuleNotFoundError: No module named 'no_such_module_any"),
    "prints": (steps.print_much, _PLAIN, None),
    "returns": (steps.return_much, _PLAIN, None),
}


def _poison(lab: Lab, say: pytest.CaptureFixture[str], prefix: str, printed: int, returned: int, rounds: int) -> None:
    large = {"prints": printed, "returns": returned}
    with submitting(lab, lab.sweep("neighbour", count=2, retry=ONCE), f"{prefix}n", clients=2) as clients:
        clients.progress(12)
        began = time.time()
        poison: dict[str, str] = {}
        for number in range(rounds):
            for index, (name, (function, step, _error)) in enumerate(_POISON.items()):
                size = {"with": {"megabytes": large[name]}} if name in large else {}
                key = f"{prefix}-{number * len(_POISON) + index}"
                poison[key] = lab.submit(lab.single(f"poison-{index}", function, **step, **size), key)
            assert not lab.wait(list(poison.values()), PATIENCE_S)
        accepted = clients.stop()
    names = dict(zip(poison, [*_POISON] * rounds, strict=True))
    assert not lab.wait(list(accepted.runs.values()))
    slow = [_slowest(lab, f"{prefix}n", first, last) for first, last in ((0.0, began), (began, time.time()))]
    fired = f"{len(poison)} poisonous runs; 99 % of the neighbours' took {slow[0]:.2f} s before, {slow[1]:.2f} s beside"
    states = {key: "FAILED" if _POISON[name][2] else "SUCCEEDED" for key, name in names.items()}
    close(lab, "poison", fired, accepted.runs | poison, say, gap_s=accepted.gap_s, expected=states)
    for key, name in names.items():
        _check_poison(lab, name, poison[key], printed)


def _check_poison(lab: Lab, name: str, run_id: str, printed: int) -> None:
    _function, step, error = _POISON[name]
    [(told,)] = lab.query("SELECT error FROM pipeline_run WHERE run_id = %s", run_id)
    assert (told is None) == (error is None), (name, told)
    assert error is None or error in told, (name, told)
    attempts = lab.query("SELECT count(*) FROM attempt WHERE run_id = %s", run_id)
    assert attempts == [(step.get("retry", ONCE)["max_attempts"],)], name
    if name == "prints":
        _files, kept = ArtifactStore(lab.platform.config.artifacts_url).usage(f"pipelines/{run_id}/logs")
        assert min(MAX_LOG_BYTES, printed << 20) <= kept <= MAX_LOG_BYTES + 1_000, "as much as a log may hold"


def _slowest(lab: Lab, prefix: str, first: float, last: float) -> float:
    """How long 99 % of the runs took at most that were accepted then."""
    [(seconds,)] = lab.query(
        "SELECT percentile_cont(0.99) WITHIN GROUP (ORDER BY extract(epoch FROM finished_at - created_at))::float8 "
        "FROM pipeline_run WHERE split_part(idempotency_key, '-', 1) = %s "
        "AND created_at BETWEEN to_timestamp(%s) AND to_timestamp(%s)", prefix, first, last,
    )  # fmt: skip
    return float(seconds)


@pytest.mark.soak
def test_poison_harms_only_itself(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _poison(lab, capsys, "f20", printed=110, returned=100, rounds=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_much_poison_harms_only_itself(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    _poison(lab, capsys, "f20soak", printed=500, returned=1024, rounds=5)
