"""A run's files behind the platform: small ones by value, large ones streamed."""

from __future__ import annotations

from collections.abc import Callable

from mlplat.artifacts.model import proxied_path
from mlplat.sdk.client import Client

ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


def artifact_root(artifact_uri: str) -> str:
    """The HTTP path below which a run's artifacts are written.

    Raises:
        InvalidInput: they live elsewhere, not behind the platform.
    """
    return f"{ARTIFACTS}/{proxied_path(artifact_uri)}"


class RunFiles:
    """The artifacts of one run. Thread-safe. ``connect`` gives the client, when it is first needed."""

    def __init__(self, connect: Callable[[], Client], artifact_uri: str) -> None:
        self._connect = connect
        self._artifact_uri = artifact_uri

    def put(self, path: str, body: bytes) -> None:
        """Writes a file, replacing what is there.

        Raises:
            InvalidInput: the path is not allowed, or the artifacts do not live behind the platform.
        """
        self._connect().put_bytes(f"{artifact_root(self._artifact_uri)}/{path}", body)

    def names(self, folder: str) -> list[str]:
        """The names in a folder; none when there is no such folder."""
        path = f"{proxied_path(self._artifact_uri)}/{folder}"
        return [entry["path"] for entry in self._connect().get(ARTIFACTS, path=path).get("files", [])]
