"""Stored outputs: the JSON that stands in the database for what a step returned.

One of ``{"kind": "json", "value": …}``, ``{"kind": "blob", "digest": …, "type": …}`` and, for fan-outs and
sub-pipelines, ``{"kind": "list", "outputs": [stored, …]}`` and ``{"kind": "map", "outputs": {name: stored, …}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlplat.pipelines.expressions import OutputRef


def open_for_expressions(stored: Mapping[str, Any] | None) -> Any:
    """The output as expressions see it: JSON as it is, pickled objects as ``OutputRef``."""
    if stored is None:
        return None
    if stored["kind"] == "json":
        return stored["value"]
    if stored["kind"] == "list":
        return [open_for_expressions(inner) for inner in stored["outputs"]]
    if stored["kind"] == "map":
        return {name: open_for_expressions(inner) for name, inner in stored["outputs"].items()}
    return OutputRef(stored["digest"], stored["type"])


def stored_form(value: Any) -> dict[str, Any]:
    """The stored output that ``open_for_expressions`` makes this value of."""
    if isinstance(value, OutputRef):
        return {"kind": "blob", "digest": value.digest, "type": value.type_name}
    if _has_refs(value):
        if isinstance(value, Mapping):
            return {"kind": "map", "outputs": {name: stored_form(inner) for name, inner in value.items()}}
        return {"kind": "list", "outputs": [stored_form(inner) for inner in value]}
    return {"kind": "json", "value": value}


def canonical_form(value: Any) -> Any:
    """Rendered arguments as JSON, equal for equal arguments: the digest stands for a pickled object."""
    if isinstance(value, OutputRef):
        return {"digest": value.digest}
    if isinstance(value, Mapping):
        return {key: canonical_form(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [canonical_form(inner) for inner in value]
    return value


def _has_refs(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_refs(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_has_refs(inner) for inner in value)
    return isinstance(value, OutputRef)
