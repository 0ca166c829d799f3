"""Step outputs between steps: JSON inline, anything else pickled into the artifact store.

``stored`` has the form they are kept in. Only the worker that runs a step ever unpickles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import cloudpickle

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput
from mlplat.pipelines.expressions import OutputRef

MAX_INLINE_BYTES = 64 * 1024
MAX_BLOB_BYTES = 2 * 1024**3


def store_output(value: object, artifacts: ArtifactStore) -> dict[str, Any]:
    """Stores what a step returned.

    Raises:
        InvalidInput: it cannot be pickled, or is larger than 2 GiB.
    """
    text = _json_text(value)
    if text is not None and len(text) <= MAX_INLINE_BYTES:
        return {"kind": "json", "value": json.loads(text)}
    try:
        body = cloudpickle.dumps(value)
    except Exception as error:  # pickling runs the user's own code, which may raise anything
        raise InvalidInput(f"the output, a {type(value).__name__}, cannot be pickled: {error}") from error
    if len(body) > MAX_BLOB_BYTES:
        raise InvalidInput(f"the output has {len(body)} bytes, at most {MAX_BLOB_BYTES} are allowed; use artifacts")
    return {"kind": "blob", "digest": artifacts.put_blob(body), "type": type(value).__name__}


def load_arguments(value: Any, artifacts: ArtifactStore) -> Any:
    """Rendered arguments with every ``OutputRef`` replaced by its object. Unpickles: workers only."""
    if isinstance(value, OutputRef):
        return cloudpickle.loads(artifacts.get_blob(value.digest))
    if isinstance(value, Mapping):
        return {key: load_arguments(inner, artifacts) for key, inner in value.items()}
    if isinstance(value, list):
        return [load_arguments(inner, artifacts) for inner in value]
    return value


def _json_text(value: object) -> str | None:
    """The value as JSON, or None when it is not exactly JSON."""
    try:
        return json.dumps(value) if _is_json(value) else None
    except (ValueError, RecursionError):  # an integer too long to print, or a list that contains itself
        return None


def is_storable_text(text: str) -> bool:
    """False for text that Postgres refuses: with NUL, or with half of a surrogate pair."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _is_json(value: object) -> bool:
    """True when a JSON round trip gives an equal value (so: no tuples, no NaN, no subclasses)."""
    if type(value) is str:
        return is_storable_text(value)
    if value is None or type(value) in (bool, int):
        return True
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is list:
        return all(_is_json(inner) for inner in value)
    if type(value) is dict:
        return all(type(key) is str and is_storable_text(key) and _is_json(inner) for key, inner in value.items())
    return False
