"""Submitting pipelines and following their runs."""

from __future__ import annotations

import getpass
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlplat.errors import InvalidPipeline, Unavailable
from mlplat.pipelines.loader import load_file
from mlplat.pipelines.spec import PipelineSpec
from mlplat.sdk.client import Client, client_for, default_url
from mlplat.sdk.definition import Pipeline
from mlplat.sdk.shipping import load_module, ship_local_code

OCTETS = "application/octet-stream"
POLL_S = 0.25
FINAL_STATES = {"SUCCEEDED", "FAILED", "CANCELLED"}


class PipelineRunHandle:
    """A submitted run."""

    def __init__(self, client: Client, run_id: str) -> None:
        self._client = client
        self.run_id = run_id

    @property
    def url(self) -> str:
        """Where the run can be read."""
        return f"{self._client.url}/api/v1/pipeline-runs/{self.run_id}"

    def status(self) -> dict[str, Any]:
        """The run with its steps, as ``/api/v1/pipeline-runs/{id}`` answers it."""
        answer: dict[str, Any] = self._client.get(f"/api/v1/pipeline-runs/{self.run_id}")
        return answer

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
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            status = self.status()
            if on_change is not None:
                on_change(status)
            if status["state"] in FINAL_STATES:
                return status
            if deadline is not None and time.monotonic() > deadline:
                raise Unavailable(f"pipeline run {self.run_id} is still {status['state']} after {timeout_s:g} s")
            time.sleep(POLL_S)

    def output(self, step: str) -> Any:
        """The JSON output of a step (a list for a fan-out); None while there is none or when it is not JSON."""
        return self.status()["steps"][step]["output"]

    def logs(self, step: str | None = None) -> str:
        """What the attempts printed."""
        return self._client.text(f"/api/v1/pipeline-runs/{self.run_id}/logs", step=step)


def load_pipeline(source: str | Path | Pipeline | PipelineSpec, client: Client) -> PipelineSpec:
    """The definition in a YAML file, a Python file with one ``@pipeline``, or an object of either kind.

    Code that is not installed is uploaded through ``client``.

    Raises:
        InvalidPipeline: it cannot be read, or is not sound.
    """

    def store_blob(body: bytes) -> str:
        digest: str = client.post_bytes("/api/v1/blobs", body, OCTETS)["digest"]
        return digest

    if isinstance(source, PipelineSpec):
        return source
    if isinstance(source, Pipeline):
        return source.build(store_blob)
    path = Path(source)
    if path.suffix == ".py":
        return _only_pipeline(path).build(store_blob)
    return ship_local_code(load_file(path), path.resolve().parent, store_blob)


def submit(
    source: str | Path | Pipeline | PipelineSpec,
    params: Mapping[str, Any] | None = None,
    *,
    idempotency_key: str | None = None,
    url: str | None = None,
) -> PipelineRunHandle:
    """Submits a pipeline; the run is durable when this returns.

    Args:
        source: a YAML or Python file, or a pipeline object.
        params: values of the pipeline's parameters.
        idempotency_key: submitting twice under one key gives one run; random by default.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.

    Raises:
        InvalidPipeline: the definition or a parameter was refused; one problem a line.
    """
    client = client_for(url or default_url())
    spec = load_pipeline(source, client)
    body = {
        "spec": spec.to_json(),
        "params": dict(params or {}),
        "idempotency_key": idempotency_key or uuid.uuid4().hex,
        "submitted_by": getpass.getuser(),
    }
    return PipelineRunHandle(client, client.post("/api/v1/pipeline-runs", body)["run_id"])


def _only_pipeline(path: Path) -> Pipeline:
    if not path.is_file():
        raise InvalidPipeline(f"{path}: no such file")
    found = [value for value in vars(load_module(path)).values() if isinstance(value, Pipeline)]
    if len(found) != 1:
        names = ", ".join(item.name for item in found) or "none"
        raise InvalidPipeline(f"{path}: expected one @pipeline function, found {names}")
    return found[0]
