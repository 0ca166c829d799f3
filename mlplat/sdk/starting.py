"""How runs begin: ``start_run`` makes one, ``resume_run`` joins one."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

from mlplat.errors import InvalidInput
from mlplat.sdk.capture.options import Capture
from mlplat.sdk.capture.recorder import Recorder
from mlplat.sdk.client import API
from mlplat.sdk.context import current_step
from mlplat.sdk.process import Mode, outbox_for
from mlplat.sdk.records import Call, CreateRun
from mlplat.sdk.run import Run, RunWarning
from mlplat.sdk.user import user_name
from mlplat.sdk.values import tag_texts
from mlplat.tracking.model import ATTEMPT_TAG, PARENT_RUN_TAG, RUN_NAME_TAG, random_run_name, run_id_for

DEFAULT_EXPERIMENT = "Default"


def start_run(
    experiment: str = DEFAULT_EXPERIMENT,
    name: str | None = None,
    *,
    run_id: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    parent: Run | str | None = None,
    url: str | None = None,
    mode: Mode | None = None,
    capture: Capture | None = None,
) -> Run:
    """Starts a run in an experiment, which is created on first use.

    When the platform does not answer within a few seconds, the run starts all the same: a warning says so, and
    what it logs is kept on disk until the platform is back.

    Args:
        experiment: the experiment's name.
        name: the run's name; a random one by default.
        run_id: writes to this run instead of a new one, see ``resume_run``.
        params: logged at once.
        tags: set at once.
        parent: the run (or its id) that this one belongs under.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.
        mode: ``offline`` keeps everything on disk for ``mlplat sync``; by default ``MLPLAT_MODE``, or online.
        capture: what the run records by itself; by default all that ``MLPLAT_CAPTURE_*`` leaves on.

    Raises:
        InvalidInput: the platform refused, for instance because the experiment is deleted; or a setting is not allowed.
    """
    if run_id is not None:
        run = resume_run(run_id, url=url, mode=mode, capture=capture)
        if tags:
            run.set_tags(tags)
    else:
        run = _start(experiment, name, _given_tags(tags or {}, parent), url, mode, capture)
    if params:
        run.log_params(params)
    return run


def resume_run(
    run_id: str,
    *,
    owner: bool = False,
    url: str | None = None,
    mode: Mode | None = None,
    capture: Capture | None = None,
) -> Run:
    """A handle on a run that exists, or that another process has started. The run is RUNNING again.

    Many processes may write to one run. Unless it is the ``owner``, a process does not end the run by its own end;
    ``finish`` with a status does. Of what runs record by themselves such a process adds what it prints, and the system
    metrics of its node if no other process there does that already.

    Args:
        run_id: the run.
        owner: the run ends with this process, as if it had started it.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.
        mode: ``offline`` keeps everything on disk for ``mlplat sync``.
        capture: what this process records by itself; by default all that ``MLPLAT_CAPTURE_*`` leaves on.

    Raises:
        InvalidInput: not an id, or a setting is not allowed.
    """
    if not run_id or not isinstance(run_id, str):
        raise InvalidInput(f"a run id is a text, not {run_id!r}")
    recorder = Recorder(capture, owner=owner)
    outbox = outbox_for(url, mode)
    run = Run(outbox, run_id, owner=owner, capture=capture)
    body = {"run_id": run_id, "status": "RUNNING", "resumed_at": _now_ms()}
    outbox.put(Call(run_id, "start of the run", f"{API}/runs/update", body))
    run.record(recorder)
    return run


def _start(
    experiment: str,
    name: str | None,
    given: Mapping[str, str],
    url: str | None,
    mode: Mode | None,
    capture: Capture | None,
) -> Run:
    recorder = Recorder(capture)
    outbox = outbox_for(url, mode)
    record = _new_run(experiment, name, recorder.first_tags() | dict(given))
    started = outbox.create_now(record)
    if started.away is not None:
        warnings.warn(
            f"{started.away} The run goes on; what it logs waits in {outbox.folder} until the platform is back.",
            RunWarning,
            stacklevel=3,
        )
    run_name, started_ms = record.body["run_name"], record.body["start_time"]
    run = Run(outbox, record.run_id, run_name, owner=True, info=started.info, started_ms=started_ms, capture=capture)
    run.record(recorder, frozenset(given))
    return run


def _given_tags(values: Mapping[str, Any], parent: Run | str | None) -> dict[str, str]:
    given = tag_texts(values)
    if parent is not None:
        given[PARENT_RUN_TAG] = parent.run_id if isinstance(parent, Run) else parent
    step = current_step()
    if step is not None:
        attempt = given.get(ATTEMPT_TAG, step.label)
        given |= step.run_tags | {ATTEMPT_TAG: attempt}
    return given


def _new_run(experiment: str, name: str | None, all_tags: Mapping[str, str]) -> CreateRun:
    key = uuid.uuid4().hex
    body = {
        "run_name": name or all_tags.get(RUN_NAME_TAG) or random_run_name(),
        "user_id": user_name(),
        "start_time": _now_ms(),
        "tags": [{"key": tag, "value": value} for tag, value in all_tags.items()],
        "heartbeat": True,
    }
    return CreateRun(run_id_for(key), experiment, key, body)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
