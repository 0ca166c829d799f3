"""What is sent to a webhook: the event, and where MLflow has such an event, that in MLflow's form too. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from mlplat.events.model import MLFLOW_NAMES, TAG_DELETED, RegistryEvent

#: What MLflow's events tell of, beside the model's name.
_DATA: Mapping[str, tuple[str, ...]] = {
    "registered_model.created": ("tags", "description"),
    "model_version.created": ("version", "source", "run_id", "tags", "description"),
    "model_version_tag.set": ("version", "key", "value"),
    TAG_DELETED: ("version", "key"),
    "model_version_alias.created": ("alias", "version"),
    "model_version_alias.deleted": ("alias",),
}
#: The names of MLflow's events that there are here.
MLFLOW_EVENTS = frozenset(_DATA)
_EXAMPLE = {
    "model": "example_model", "version": 1, "source": "models:/example_model/1", "run_id": None, "tags": {},
    "description": "", "key": "example_key", "value": "example_value", "alias": "example_alias",
}  # fmt: skip


def body_of(event: RegistryEvent) -> bytes:
    """The body of a delivery; the same for every attempt."""
    form = {} if event.mlflow_name is None else _mlflow_form(event.mlflow_name, event.body)
    return msgspec.json.encode({**event.body, **form})


def body_of_test(at: str, mlflow_name: str | None) -> bytes:
    """The body of a test; with the name of one of MLflow's events, an example of that."""
    form = {} if mlflow_name is None else _mlflow_form(mlflow_name, {**_EXAMPLE, "at": at})
    return msgspec.json.encode({"id": 0, "kind": "test", "model": "", "by": "", "reason": "", "at": at, **form})


def mlflow_events(kinds: frozenset[str]) -> list[str]:
    """The names of MLflow's events among the kinds that a webhook wants; none named: all."""
    if not kinds:
        return sorted(MLFLOW_EVENTS)
    named = kinds | {MLFLOW_NAMES[kind] for kind in kinds & MLFLOW_NAMES.keys()}
    return sorted((named | ({TAG_DELETED} if "version_tag_set" in kinds else set())) & MLFLOW_EVENTS)


def _mlflow_form(name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    entity, action = name.split(".")
    data = {field: body.get(field) for field in _DATA[name]}
    if "version" in data:
        data["version"] = str(data["version"])
    return {"entity": entity, "action": action, "timestamp": body["at"], "data": {"name": body["model"], **data}}
