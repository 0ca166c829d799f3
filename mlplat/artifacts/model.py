"""Rules for artifact paths. A path that passes them names something below the store's root."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from urllib.parse import unquote

from mlplat.errors import InvalidInput

#: URIs of this scheme, MLflow's, name files behind the platform, wherever these are stored.
PROXY_SCHEME = "mlflow-artifacts"
MAX_PATH_BYTES = 1_024
MAX_SEGMENT_BYTES = 255
MAX_DEPTH = 64


@dataclass(frozen=True)
class ArtifactInfo:
    """A file or folder; ``path`` is relative to the folder that was listed."""

    path: str
    is_dir: bool
    size: int | None


def served_path(uri: str) -> str | None:
    """Path in the artifact store of a URI that the platform serves, None when the artifacts live elsewhere.

    Raises:
        InvalidInput: the path in it is not allowed.
    """
    scheme, _colon, path = uri.partition(":")
    return safe_path(path.lstrip("/")) if scheme == PROXY_SCHEME else None


def proxied_path(uri: str) -> str:
    """Path in the artifact store of a URI that the platform serves.

    Raises:
        InvalidInput: the artifacts live elsewhere, or the path in it is not allowed.
    """
    path = served_path(uri)
    if path is None:
        raise InvalidInput(f"The artifacts live at {uri}, which this platform does not serve.")
    return path


def safe_path(path: str) -> str:
    """The path in normal form; ``""`` is the root.

    Raises:
        InvalidInput: absolute, leaving the root (plainly or percent-encoded), or not a portable name.
    """
    decoded = path
    for _ in range(3):  # as deep as anybody encodes; a fourth layer is a literal per cent sign
        _check_path(decoded, path)
        again = unquote(decoded)
        if again == decoded:
            break
        decoded = again
    normal = posixpath.normpath(path)
    return "" if normal == "." else normal


def _check_path(path: str, shown: str) -> None:
    segments = path.split("/")
    problem = None
    if path.startswith("/") or "\\" in path or (len(path) > 1 and path[1] == ":" and path[0].isalpha()):
        problem = "it must be relative, with forward slashes"
    elif ".." in segments:
        problem = "it may not contain '..'"
    elif any(ord(character) < 32 or ord(character) == 127 for character in path):
        problem = "it may not contain control characters"
    elif len(path.encode(errors="surrogatepass")) > MAX_PATH_BYTES or len(segments) > MAX_DEPTH:
        problem = f"it may have at most {MAX_PATH_BYTES} bytes and {MAX_DEPTH} levels"
    elif any(len(segment.encode(errors="surrogatepass")) > MAX_SEGMENT_BYTES for segment in segments):
        problem = f"no part of it may be longer than {MAX_SEGMENT_BYTES} bytes"
    if problem:
        raise InvalidInput(f"Invalid path {shown[:200]!r}: {problem}.")
