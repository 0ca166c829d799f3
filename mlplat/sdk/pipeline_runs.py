"""Submitting pipelines and following their runs."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from mlplat.errors import InvalidPipeline, NotFound, Overloaded, Unavailable
from mlplat.pipelines.headings import Headings
from mlplat.pipelines.loader import load_file
from mlplat.pipelines.spec import PipelineSpec
from mlplat.sdk.capture.entry import user
from mlplat.sdk.client import Client, client_for, default_url
from mlplat.sdk.definition import Pipeline
from mlplat.sdk.live import EventParser, LiveRun, LogPositions, RunEvent
from mlplat.sdk.shipping import Shipper, StoreBlob, load_module, ship

OCTETS = "application/octet-stream"
#: Between two looks at a run that cannot be streamed, and at logs that are followed.
POLL_S = 1.0
LOG_POLL_S = 0.5
#: The platform says something at least every 15 s.
SILENCE_S = 45.0
GRACE_S = 5.0
#: Before a stream that ended early is taken up again; longer when it said nothing.
RECONNECT_S = 0.2
MAX_RECONNECT_S = 5.0
FINAL_STATES = {"SUCCEEDED", "FAILED", "CANCELLED"}


class PipelineRunHandle:
    """A submitted run."""

    def __init__(self, client: Client, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    @property
    def url(self) -> str:
        """Where the run can be read."""
        return f"{self._client.url}{self._path}"

    @property
    def _path(self) -> str:
        return f"/api/v1/pipeline-runs/{quote(self.run_id, safe='')}"

    def status(self) -> dict[str, Any]:
        """The run with its steps, as ``/api/v1/pipeline-runs/{id}`` answers it."""
        answer: dict[str, Any] = self._client.get(self._path)
        return answer

    def events(
        self, *, logs: Literal["none", "step", "all"] = "step", timeout_s: float | None = None
    ) -> Iterator[RunEvent]:
        """What happens to the run, from its state now to its ``end``; ``LiveRun`` folds it into the run's state.

        A connection that breaks is taken up again where it was, so nothing is missed but logs that were printed faster
        than anybody reads. Where there is no stream to be had, every state that is seen comes as a ``snapshot``.

        Args:
            logs: whose new text to tell: nobody's, that of steps, or that of a fan-out's items too.
            timeout_s: None goes on until the run ends.

        Raises:
            NotFound: no such run.
            Unavailable: the run is not over after ``timeout_s``, or the platform stays away.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            yield from self._streamed(logs, deadline, timeout_s)
        except (NotFound, Overloaded):  # an older platform, or too many who watch: a run that is unknown stays unknown
            yield from self._polled(deadline, timeout_s)

    def wait(
        self, timeout_s: float | None = None, on_change: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Waits for the end of the run and returns its last status.

        Args:
            timeout_s: None waits for ever.
            on_change: called with every status that was seen.

        Raises:
            Unavailable: the run is not over after ``timeout_s``.
        """
        live = LiveRun()
        for event in self.events(logs="none", timeout_s=timeout_s):
            live.apply(event)
            if on_change is not None and event.kind != "end":
                on_change(deepcopy(live.status))
        return live.status

    def output(self, step: str) -> Any:
        """The JSON output of a step (a list for a fan-out); None while there is none or when it is not JSON."""
        return self.status()["steps"][step]["output"]

    def definition(self) -> PipelineSpec:
        """The definition that the run was made from."""
        return PipelineSpec.model_validate(self._client.get(f"/api/v1/pipeline-runs/{self.run_id}/definition"))

    def cancel(self, comment: str = "") -> None:
        """Stops the run. Its attempts are asked to end, then forced; its finally steps still run."""
        self._tell("cancel", comment)

    def approve(self, step: str, comment: str = "") -> None:
        """Lets the approval step succeed.

        Raises:
            NotFound: no such step.
            InvalidInput: the step waits for no decision.
            PermissionDenied: it is for others to decide.
        """
        self._tell(f"steps/{quote(step, safe='')}/approve", comment)

    def reject(self, step: str, comment: str = "") -> None:
        """Lets the approval step fail; raises what ``approve`` does."""
        self._tell(f"steps/{quote(step, safe='')}/reject", comment)

    def resume(
        self,
        source: Source | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        from_step: str | None = None,
        priority: int | None = None,
        idempotency_key: str | None = None,
    ) -> PipelineRunHandle:
        """Starts a run that keeps those results of this one that still hold, and runs what failed or changed.

        Args:
            source: another definition, with which steps that are the same as before keep their results.
            params: other values; parameters that are not named keep theirs.
            from_step: this step and what depends on it run again, whatever became of them.

        Raises:
            InvalidPipeline: the definition or a parameter was refused; one problem a line.
            InvalidInput: this run is not over, or there is no such step.
        """
        spec = self.definition() if source is None else load_pipeline(source, self._client)
        kept = {name: value for name, value in self.status()["params"].items() if name in spec.parameters}
        return _submit(
            self._client, spec, {**kept, **(params or {})}, idempotency_key, priority=priority,
            resumed_from=self.run_id, from_step=from_step,
        )  # fmt: skip

    def _tell(self, what: str, comment: str) -> None:
        self._client.post(f"/api/v1/pipeline-runs/{self.run_id}/{what}", {"by": user(), "comment": comment})

    def logs(self, step: str | None = None) -> str:
        """What the attempts printed."""
        return "".join(self.log_parts(step))

    def log_parts(self, step: str | None = None, attempt: int | None = None, *, follow: bool = False) -> Iterator[str]:
        """What the attempts printed, under headings, in parts; with ``follow`` also what they print until the run ends.

        Args:
            step: only this step's.
            attempt: only the attempts with this number.
            follow: goes on until the run ends.

        Raises:
            NotFound: no such run or step.
        """
        cursor, headings = None, Headings()
        while True:
            page = self._client.get(f"{self._path}/logs", format="json", step=step, attempt=attempt, after=cursor)
            for part in page["parts"]:
                yield headings.add(part["step"], part["item"], part["attempt"], part["state"], part["text"])
            cursor = page["cursor"]
            if page["more"]:
                continue
            if not (follow and page["running"]):
                yield headings.close()
                return
            time.sleep(LOG_POLL_S)

    def _streamed(self, logs: str, deadline: float | None, timeout_s: float | None) -> Iterator[RunEvent]:
        cursor, told, pause_s = None, LogPositions(), RECONNECT_S
        while True:
            pause_s = min(2 * pause_s, MAX_RECONNECT_S)
            left = None if deadline is None else max(0.001, deadline - time.monotonic())
            silence_s = SILENCE_S if left is None else min(SILENCE_S, left + GRACE_S)
            with self._client.stream(f"{self._path}/events", silence_s, logs=logs, after=cursor, lasts_s=left) as body:
                parser = EventParser()
                for event in chain.from_iterable(map(parser.feed, body)):
                    pause_s = RECONNECT_S
                    if event is None:
                        continue
                    cursor = cursor if event.number is None else event.number
                    part = told.new_part(event.data) if event.kind == "log" else event.data
                    if part is not None:
                        yield RunEvent(event.kind, part, event.number)
                    if event.kind == "end":
                        if event.data["state"] is None:
                            raise Unavailable(f"pipeline run {self.run_id}: {event.data['error']}")
                        return
            self._check(deadline, timeout_s)
            time.sleep(pause_s)

    def _polled(self, deadline: float | None, timeout_s: float | None) -> Iterator[RunEvent]:
        seq = None
        while True:
            status = self.status()
            if status["seq"] != seq:
                seq = status["seq"]
                yield RunEvent("snapshot", {"run": status, "dag": []}, seq)
            if status["state"] in FINAL_STATES:
                yield RunEvent("end", {"seq": seq, "state": status["state"], "error": status["error"]}, seq)
                return
            self._check(deadline, timeout_s)
            time.sleep(POLL_S)

    def _check(self, deadline: float | None, timeout_s: float | None) -> None:
        if deadline is not None and time.monotonic() >= deadline:
            raise Unavailable(f"pipeline run {self.run_id} is not over after {timeout_s:g} s")


#: A YAML file, a Python file with one ``@pipeline``, or an object of either kind.
Source = str | Path | Pipeline | PipelineSpec


def load_pipeline(source: Source, client: Client) -> PipelineSpec:
    """The definition; code that is not installed and files beside it are uploaded through ``client``.

    Raises:
        InvalidPipeline: it cannot be read, or is not sound; one problem a line.
    """

    def store_blob(body: bytes) -> str:
        digest: str = client.post_bytes("/api/v1/blobs", body, OCTETS)["digest"]
        return digest

    return compile_pipeline(source, store_blob)


def check_pipeline(source: Source) -> PipelineSpec:
    """The definition, without a platform: nothing is uploaded.

    Raises:
        InvalidPipeline: it cannot be read, or is not sound; one problem a line.
    """
    return compile_pipeline(source, lambda body: hashlib.sha256(body).hexdigest())


def compile_pipeline(source: Source, store_blob: StoreBlob) -> PipelineSpec:
    """The definition, with what lies beside it stored by ``store_blob``.

    Raises:
        InvalidPipeline: it cannot be read, or is not sound; one problem a line.
    """
    if isinstance(source, PipelineSpec):
        return source
    if isinstance(source, Pipeline):
        return source.build(store_blob)
    file, _colon, name = str(source).partition(".py:")
    if name:
        return _pipeline_of(Path(f"{file}.py"), name).build(store_blob)
    path = Path(source)
    if path.suffix == ".py":
        return _pipeline_of(path, None).build(store_blob)
    loaded = load_file(path)
    try:
        return ship(loaded.spec, loaded.folders, Shipper(store_blob))
    except InvalidPipeline as error:
        raise InvalidPipeline(f"{path}: {error.message}") from error


def submit(
    source: Source,
    params: Mapping[str, Any] | None = None,
    *,
    priority: int | None = None,
    idempotency_key: str | None = None,
    url: str | None = None,
) -> PipelineRunHandle:
    """Submits a pipeline; the run is durable when this returns.

    Args:
        source: a YAML or Python file, or a pipeline object.
        params: values of the pipeline's parameters.
        priority: instead of the definition's, -100 to 100; higher runs first.
        idempotency_key: submitting twice under one key gives one run; random by default.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.

    Raises:
        InvalidPipeline: the definition or a parameter was refused; one problem a line.
    """
    client = client_for(url or default_url())
    return _submit(client, load_pipeline(source, client), params or {}, idempotency_key, priority=priority)


def pipeline_run(run_id: str, url: str | None = None) -> PipelineRunHandle:
    """A run that was submitted before."""
    return PipelineRunHandle(client_for(url or default_url()), run_id)


def _submit(
    client: Client, spec: PipelineSpec, params: Mapping[str, Any], idempotency_key: str | None, **more: Any
) -> PipelineRunHandle:
    body = {
        "spec": spec.to_json(),
        "params": dict(params),
        "idempotency_key": idempotency_key or uuid.uuid4().hex,
        "submitted_by": user(),
        **{key: value for key, value in more.items() if value is not None},
    }
    return PipelineRunHandle(client, client.post("/api/v1/pipeline-runs", body)["run_id"])


def _pipeline_of(path: Path, name: str | None) -> Pipeline:
    """The pipeline of that name in a Python file; without a name the one that is no part of another."""
    if not path.is_file():
        raise InvalidPipeline(f"{path}: no such file")
    found = {key: value for key, value in vars(load_module(path)).items() if isinstance(value, Pipeline)}
    if name is not None and name in found:
        return found[name]
    if name is None:
        whole = found if len(found) == 1 else _whole_ones(found)
        if len(whole) == 1:
            return next(iter(whole.values()))
    what = "one @pipeline function that is no part of another" if name is None else f"a @pipeline function {name!r}"
    raise InvalidPipeline(
        f"{path}: expected {what}, found {', '.join(found) or 'none'}; {path.name}:NAME names the one you mean"
    )


def _whole_ones(found: Mapping[str, Pipeline]) -> dict[str, Pipeline]:
    inside: set[str] = set()
    for each in found.values():
        for step in each.build(lambda body: hashlib.sha256(body).hexdigest()).all_steps.values():
            if step.pipeline is not None:
                inside.add(step.pipeline.name)
    return {key: value for key, value in found.items() if value.pipeline_name not in inside}
