"""Schedules and triggers from Python."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mlplat.pipelines.automation.webhooks import SIGNATURE_HEADERS, Auth, signature
from mlplat.pipelines.spec import PipelineSpec
from mlplat.sdk.client import client_for, default_url
from mlplat.sdk.definition import Pipeline
from mlplat.sdk.pipeline_runs import load_pipeline
from mlplat.sdk.user import user_name

SCHEDULES = "/api/v1/schedules"
TRIGGERS = "/api/v1/triggers"


def schedule(
    name: str,
    source: str | Path | Pipeline | PipelineSpec,
    cron: str,
    *,
    time_zone: str = "UTC",
    params: Mapping[str, Any] | None = None,
    catch_up: Literal["skip", "latest", "all"] = "latest",
    catch_up_limit: int = 100,
    misfire_grace_s: float = 60.0,
    starts_at: datetime | None = None,
    ends_at: datetime | None = None,
    paused: bool | None = None,
    url: str | None = None,
) -> dict[str, Any]:
    """Runs a pipeline by the clock: creates the schedule of that name, or replaces it.

    Args:
        source: a YAML or Python file, or a pipeline object.
        cron: minute, hour, day of month, month, day of week; or ``@daily`` and the like.
        params: values of the pipeline's parameters; ``${{ trigger.time }}``, ``trigger.date`` and
            ``trigger.timestamp`` in them are the fire time's.
        catch_up: what becomes of fire times that were missed: nothing, a run for the newest, or a run for each.
        catch_up_limit: runs that are caught up on at once.
        misfire_grace_s: later than this a fire time counts as missed.
        paused: by default as it is, and a new one is not.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.

    Returns:
        The schedule, as ``/api/v1/schedules/{name}`` answers it.

    Raises:
        InvalidInput: the expression, the time zone, the definition or a parameter was refused.
    """
    client = client_for(url or default_url())
    body = {
        "spec": load_pipeline(source, client).to_json(), "params": dict(params or {}), "cron": cron,
        "time_zone": time_zone, "catch_up": catch_up, "catch_up_limit": catch_up_limit,
        "misfire_grace_s": misfire_grace_s, "starts_at": _text(starts_at), "ends_at": _text(ends_at),
        "paused": paused, "created_by": user_name(),
    }  # fmt: skip
    answer: dict[str, Any] = client.put(f"{SCHEDULES}/{name}", body)
    return answer


def trigger(
    name: str,
    source: str | Path | Pipeline | PipelineSpec,
    on: Mapping[str, Any],
    *,
    params: Mapping[str, Any] | None = None,
    max_per_hour: int = 1_000,
    paused: bool | None = None,
    url: str | None = None,
) -> dict[str, Any]:
    """Runs a pipeline when something happens: creates the trigger of that name, or replaces it.

    Args:
        source: a YAML or Python file, or a pipeline object.
        on: ``{"kind": "registry", "events": ["version_created"], "model": "digits*"}``,
            ``{"kind": "pipeline", "pipelines": ["prepare"], "states": ["SUCCEEDED"]}`` or
            ``{"kind": "webhook", "auth": "bearer", "secret": …}``; each may have a ``when``.
        params: values of the pipeline's parameters; ``${{ trigger.event.… }}`` in them are the event's.
        max_per_hour: further events of an hour are skipped.
        paused: by default as it is, and a new one is not.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.

    Returns:
        The trigger, as ``/api/v1/triggers/{name}`` answers it.

    Raises:
        InvalidInput: the filter, the definition, a parameter or the secret was refused.
    """
    client = client_for(url or default_url())
    body = {
        "spec": load_pipeline(source, client).to_json(), "params": dict(params or {}), "on": dict(on),
        "max_per_hour": max_per_hour, "paused": paused, "created_by": user_name(),
    }  # fmt: skip
    answer: dict[str, Any] = client.put(f"{TRIGGERS}/{name}", body)
    return answer


def fire_trigger(
    name: str, event: Mapping[str, Any], secret: str, *, delivery: str | None = None, url: str | None = None
) -> dict[str, Any]:
    """Fires a webhook trigger, with the secret or a signature, whichever it wants.

    Args:
        delivery: the same again fires nothing more; random by default.

    Returns:
        ``event_id``, ``state``, ``reason`` and ``run_id`` (None while the run is not submitted yet).
    """
    client = client_for(url or default_url())
    wants_signature = client.get(f"{TRIGGERS}/{name}")["on"].get("auth") == Auth.SIGNATURE
    body = json.dumps(dict(event)).encode()
    headers = {"Idempotency-Key": delivery or uuid.uuid4().hex}
    if wants_signature:
        headers[SIGNATURE_HEADERS[0]] = signature(secret, body)
    else:
        headers["Authorization"] = f"Bearer {secret}"
    answer: dict[str, Any] = client.post_bytes(f"{TRIGGERS}/{name}/fire", body, "application/json", headers)
    return answer


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone().isoformat()
