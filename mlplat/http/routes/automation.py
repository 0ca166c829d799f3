"""What /api/v1/schedules and /api/v1/triggers have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from mlplat.errors import InvalidInput, Unavailable
from mlplat.http.bodies import read_body
from mlplat.http.services import Services
from mlplat.pipelines.automation.firings import FiringState, Recorded
from mlplat.pipelines.loader import MAX_BYTES
from mlplat.pipelines.model import State
from mlplat.pipelines.parsing import ParsedSpec, parse_json

#: A definition, its parameters and what else a request says.
MAX_REQUEST_BYTES = 2 * MAX_BYTES
MAX_OFFSET = 1_000_000_000
#: Of schedules and triggers: it is part of idempotency keys.
Name = Annotated[str, Path(pattern=r"^[A-Za-z][A-Za-z0-9_\-]{0,62}$")]
Limit = Annotated[int, Query(ge=1, le=1_000)]
Offset = Annotated[int, Query(ge=0, le=MAX_OFFSET)]
B = TypeVar("B", bound=BaseModel)


class AutomationRequest(BaseModel):
    """What runs, and with which parameters."""

    model_config = ConfigDict(extra="forbid")

    spec: dict[str, Any] = Field(description="A definition, as YAML files and Python pipelines compile to.")
    params: dict[str, Any] = Field(
        default={},
        description="Values may have ${{ … }} over trigger.name, trigger.time, trigger.date, trigger.timestamp and "
        "trigger.event.",
    )
    paused: bool | None = Field(default=None, description="Unset: as it is, and a new one is not.")
    created_by: str = Field(default="", max_length=200, description="Whose runs they are.")

    def parse(self) -> ParsedSpec:
        """The checked definition.

        Raises:
            InvalidPipeline: one problem a line.
        """
        return parse_json(msgspec.json.encode(self.spec))


class FiringAnswer(BaseModel):
    """What was decided about a fire time or an event. Without a run, ``reason`` says why there is none."""

    firing_id: int
    event_id: str
    event_at: datetime
    state: FiringState
    reason: str
    run_id: str | None
    run_state: State | None
    params: dict[str, Any] | None
    created_at: datetime


async def read_request(request: Request, kind: type[B]) -> B:
    """The JSON body.

    Raises:
        InvalidInput: what is wrong with it, field by field.
        PayloadTooLarge: it is too large.
    """
    body = await read_body(request, MAX_REQUEST_BYTES)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in item['loc']) or 'body'}: {item['msg']}" for item in error.errors()
        ]
        raise InvalidInput("; ".join(problems)) from error


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """For OpenAPI, where a route reads its body itself."""
    schema = kind.model_json_schema()
    whole = _inline(schema, schema.pop("$defs", {}))
    return {"requestBody": {"content": {"application/json": {"schema": whole}}, "required": True}}


def _inline(schema: Any, parts: Mapping[str, Any]) -> Any:
    """The schema with its parts where they are named: a reference would be looked up in the whole document."""
    if isinstance(schema, list):
        return [_inline(item, parts) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(parts[schema["$ref"].rpartition("/")[2]], parts) | {
            k: v for k, v in schema.items() if k != "$ref"
        }
    return {key: _inline(value, parts) for key, value in schema.items() if key != "discriminator"}


async def wake(services: Services) -> None:
    """Tells the scheduler, which would see it by itself some seconds later."""
    with suppress(Unavailable):
        await services.scheduler.wake()


def firing_answer(found: Recorded) -> FiringAnswer:
    """A decision as it is answered."""
    firing, run_state = found.firing, found.run_state
    return FiringAnswer(
        firing_id=found.firing_id, event_id=firing.event_id, event_at=firing.event_at, state=firing.state,
        reason=firing.reason, run_id=found.run_id, run_state=None if run_state is None else State(run_state),
        params=firing.params, created_at=found.created_at,
    )  # fmt: skip
