"""What params, metrics and tags may be called: MLflow's rules."""

from __future__ import annotations

import posixpath
import re
from functools import lru_cache

from mlplat.errors import InvalidInput

MAX_KEY_LENGTH = 250
_KEY = re.compile(r"[\w\-. :/]+\Z")


def check_key(kind: str, key: str) -> None:
    """Checks the key of a param, metric or tag.

    Raises:
        InvalidInput: empty, too long, forbidden characters, or not a normal relative path.
    """
    problem = _problem(kind, key)
    if problem is not None:
        raise InvalidInput(problem)


@lru_cache(maxsize=10_000)  # a metric's key arrives with each of its points
def _problem(kind: str, key: str) -> str | None:
    if not key or len(key) > MAX_KEY_LENGTH:
        return f"Invalid {kind} name: {key[:300]!r}. Names have 1 to {MAX_KEY_LENGTH} characters, this has {len(key)}."
    if not _KEY.match(key):
        return (
            f"Invalid {kind} name: {key!r}. Names may only contain letters, digits, underscores (_), dashes (-), "
            "periods (.), spaces ( ), colons (:) and slashes (/)."
        )
    if posixpath.normpath(key) != key or key.startswith(("/", "..")) or key == ".":
        return f"Invalid {kind} name: {key!r}. Names may be treated as files, so a plain path is needed."
    return None
