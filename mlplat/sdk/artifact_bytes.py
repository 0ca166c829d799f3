"""Bytes of artifacts over HTTP, up and down, by their paths in the artifact store."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import quote

import httpx

from mlplat.artifacts.entry import INLINE_BYTES
from mlplat.errors import AlreadyExists, InvalidInput, NotFound, PermissionDenied
from mlplat.sdk import transfer
from mlplat.sdk.client import ARTIFACTS, Client

#: A longer range is fetched by several requests: one that breaks off costs no more than that.
PIECE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Part:
    """Bytes of a file.

    Args:
        body: the bytes.
        size: of the whole file.
        etag: names the version of the file, where the platform says so.
    """

    body: bytes
    size: int
    etag: str | None


class _PastTheEnd(Exception):
    """The file ends before the range begins."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__()
        self.response = response


@contextmanager
def as_os_errors(path: str) -> Iterator[None]:
    """Raises what the platform refuses as Python's own errors; that it is out of reach stays ``Unavailable``."""
    try:
        yield
    except NotFound as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except PermissionDenied as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path) from error
    except AlreadyExists as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
    except InvalidInput as error:
        raise ValueError(error.message) from error


def list_folder(client: Client, stored: str) -> list[dict[str, Any]]:
    """``path`` (a name), ``is_dir`` and ``file_size`` of what is in a folder; a file or nothing there has nothing."""
    found: list[dict[str, Any]] = client.get(ARTIFACTS, path=stored).get("files", [])
    return found


def fetch(client: Client, stored: str, start: int, end: int | None) -> Part:
    """Bytes ``start`` to ``end`` (exclusive; None: the end) of a file, as many of them as it has.

    Raises:
        NotFound: no such file.
        OSError: it was replaced meanwhile.
    """
    first = part = _fetch_piece(client, stored, start, end)
    bodies, at = [first.body], start + len(first.body)
    while part.body and at < min(first.size, first.size if end is None else end):
        part = _fetch_piece(client, stored, at, end)
        if (part.size, part.etag) != (first.size, first.etag):
            raise changed(stored)
        bodies.append(part.body)
        at += len(part.body)
    return Part(b"".join(bodies), first.size, first.etag)


def changed(path: str) -> OSError:
    """What is raised when parts of a file would be of different versions."""
    return OSError(errno.ESTALE, "the file was replaced while it was read; open it again", path)


def download(client: Client, stored: str, into: Any, callback: Any) -> None:
    """Writes a file into another one from its start; tells the callback how many bytes there are.

    Raises:
        NotFound: no such file.
    """
    client.download(f"{ARTIFACTS}/{stored}", cast("BinaryIO", _Sink(into, callback)))


def upload(client: Client, stored: str, source: Any, size: int, callback: Any) -> None:
    """Writes a file of ``size`` bytes, replacing what is there once all of it has arrived.

    Raises:
        InvalidInput: a folder is there, or a file in place of a folder.
    """
    transfer.upload_from(client, stored, lambda: cast("BinaryIO", _Source(source)), size, progress_of(callback))


def copy(client: Client, source: str, target: str) -> bool:
    """Makes a file of the bytes of another, which need not travel; False: they do, it is a small one.

    Raises:
        NotFound: no such file.
    """
    file = client.get(f"{transfer.NATIVE}/files/{quote(source)}")
    if file["size"] <= INLINE_BYTES:
        return False
    client.put(f"{transfer.NATIVE}/files/{quote(target)}", file)
    return True


def progress_of(callback: Any) -> transfer.OnProgress:
    """What tells an fsspec callback how far a transfer is."""
    return lambda done, _total: callback.absolute_update(done)


def delete(client: Client, stored: str) -> None:
    """Removes a file, or a folder with all in it; nothing there is fine."""
    client.delete(quote(f"{ARTIFACTS}/{stored}"))


def _fetch_piece(client: Client, stored: str, start: int, end: int | None) -> Part:
    stop = start + PIECE_BYTES if end is None else min(end, start + PIECE_BYTES)
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}

    def send(http: httpx.Client) -> httpx.Response:
        response = http.get(quote(f"{ARTIFACTS}/{stored}"), headers=headers)
        if response.status_code == 416:
            raise _PastTheEnd(response)
        return response

    try:
        response = client.exchange(send)
        body = response.content
    except _PastTheEnd as past:
        response, body = past.response, b""
    etag = response.headers.get("etag")
    if response.status_code == 200:  # something on the way does not know ranges
        return Part(body[start:stop], len(body), etag)
    return Part(body, int(response.headers["content-range"].rpartition("/")[2]), etag)


class _Source:
    """A file to be sent, from its start however often that begins; it stays open."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _Source:
        self._file.seek(0)
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def read(self, size: int = -1) -> bytes:
        chunk: bytes = self._file.read(size)
        return chunk


class _Sink:
    """A file to be received, from its start however often that begins."""

    def __init__(self, file: Any, callback: Any) -> None:
        self._file = file
        self._callback = callback

    def seek(self, position: int) -> int:
        self._callback.absolute_update(position)
        return int(self._file.seek(position))

    def truncate(self) -> int:
        return int(self._file.truncate())

    def write(self, chunk: bytes) -> int:
        self._callback.relative_update(len(chunk))
        return int(self._file.write(chunk))
