"""What is sent to a webhook: the event, and where MLflow has such an event, that in MLflow's form too. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from mlplat.events.model import RegistryEvent

Fields = Mapping[str, Any]


def body_of(event: RegistryEvent) -> bytes:
    """The body of a delivery; the same for every attempt."""
    return msgspec.json.encode({**event.body, **mlflow_form(event.body)})


def mlflow_form(body: Fields) -> dict[str, Any]:
    """``entity``, ``action``, ``timestamp`` and ``data`` as MLflow 3.17 sends them; nothing where it has no event."""
    known = _EVENTS.get(body["kind"])
    if known is None:
        return {}
    entity, action, names = known
    if action == "set" and body.get("value") is None:
        action, names = "deleted", tuple(name for name in names if name != "value")
    data = {name: body.get(name) for name in names}
    if "version" in data:
        data["version"] = str(data["version"])
    return {"entity": entity, "action": action, "timestamp": body["at"], "data": {"name": body["model"], **data}}


_EVENTS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "model_created": ("registered_model", "created", ("tags", "description")),
    "version_created": ("model_version", "created", ("version", "source", "run_id", "tags", "description")),
    "version_tag_set": ("model_version_tag", "set", ("version", "key", "value")),
    "alias_set": ("model_version_alias", "created", ("alias", "version")),
    "alias_deleted": ("model_version_alias", "deleted", ("alias",)),
}
