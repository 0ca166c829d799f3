"""A run's files: to the platform at once where that is possible, else by way of the disk."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import BinaryIO

from mlplat.artifacts.console import FOLDER as CONSOLE
from mlplat.artifacts.model import proxied_path, safe_path
from mlplat.errors import InvalidInput, NotFound, Overloaded, Unavailable
from mlplat.sdk.client import API, Client, client_for
from mlplat.sdk.known_files import KnownFiles
from mlplat.sdk.outbox import SEND_TIMEOUT_S, Outbox
from mlplat.sdk.transfer import put_at_once, upload, upload_from
from mlplat.settings import Settings


class RunFiles:
    """The artifacts of one run. Thread-safe.

    A file that cannot go at once is copied to disk and follows in its turn, as everything else does that is logged.

    Args:
        outbox: the way to the platform.
        run_id: the run.
        artifact_uri: where its artifacts are, if that is known yet.
        retry_for_s: how long a platform that goes away is tried before the file goes to disk.
    """

    def __init__(self, outbox: Outbox, run_id: str, artifact_uri: str | None, retry_for_s: float) -> None:
        self._outbox = outbox
        self._run_id = run_id
        self._artifact_uri = artifact_uri
        self._retry_for_s = retry_for_s
        self._known = KnownFiles(Settings().cache_folder)

    def put(self, path: str, source: bytes | Path) -> bool:
        """Writes a file, replacing what is there; False when the platform is away and the disk has no room for it.

        Raises:
            InvalidInput: the path is not allowed, or the platform does not have the run's artifacts.
            OSError: the source cannot be read.
        """
        path = safe_path(path)
        if not path:
            raise InvalidInput("a file needs a name")
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if self._outbox.takes_files and self._upload(path, source, size):
            return True
        with _opened(source) as body:
            return self._outbox.put_file(self._run_id, path, body, size)

    def _upload(self, path: str, source: bytes | Path, size: int) -> bool:
        client = client_for(self._outbox.url, self._retry_for_s, SEND_TIMEOUT_S)
        try:
            uri = self._artifact_uri or self._find_uri(client)
            if uri is None:
                return False
            target = f"{proxied_path(uri)}/{path}"
            if isinstance(source, Path):
                upload(client, target, source, self._known)
            elif path.startswith(CONSOLE):
                put_at_once(client, target, source)
            else:
                upload_from(client, target, partial(io.BytesIO, source), size)
        except (Unavailable, Overloaded):
            self._outbox.note_away()
            return False
        return True

    def _find_uri(self, client: Client) -> str | None:
        try:
            self._artifact_uri = client.get(f"{API}/runs/get", run_id=self._run_id)["run"]["info"]["artifact_uri"]
        except NotFound:  # its start has not arrived yet
            return None
        return self._artifact_uri


def _opened(source: bytes | Path) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
