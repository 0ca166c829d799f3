"""MLflow's artifact proxy: files of runs over HTTP, streamed and checked."""

from __future__ import annotations

import asyncio
import itertools
import mimetypes
import posixpath
import re
from collections.abc import Iterator
from functools import partial
from urllib.parse import quote

import msgspec
from fastapi import FastAPI
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from mlplat.artifacts.console import FOLDER as CONSOLE
from mlplat.artifacts.digests import content_digest, sha256
from mlplat.artifacts.entry import Entry
from mlplat.artifacts.model import safe_path
from mlplat.artifacts.segments import MAX_SEGMENT_BYTES
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import Changed, InvalidInput, NotFound
from mlplat.http.bodies import read_body
from mlplat.http.guarded import guarded
from mlplat.http.services import Services
from mlplat.http.uploads import Uploads, wanted_digest
from mlplat.storage.guard import held

BASES = ("/api/2.0/mlflow-artifacts", "/ajax-api/2.0/mlflow-artifacts")
MLFLOW_VERSION = "3.17.2"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})\Z", re.ASCII)


def install(app: FastAPI, services: Services, uploads: Uploads) -> None:
    """Adds the proxy and MLflow's server facts."""

    async def listing(request: Request) -> Response:
        path = safe_path(request.query_params.get("path", ""))
        entries = await asyncio.to_thread(services.artifacts.list, path)
        files = [
            {"path": entry.path, "is_dir": entry.is_dir} | ({} if entry.size is None else {"file_size": entry.size})
            for entry in entries
        ]
        return Response(msgspec.json.encode({"files": files} if files else {}), media_type="application/json")

    async def download(request: Request) -> Response:
        return await send_file(services, file_path(request), request)

    async def upload(request: Request) -> Response:
        path, digest = file_path(request), wanted_digest(request)
        if f"/{CONSOLE}/" in path:
            body = await read_body(request, MAX_SEGMENT_BYTES)
            if digest not in {None, sha256(body)}:
                raise InvalidInput(f"The bytes of {path!r} do not have the SHA-256 {digest}.")
            hold = await services.guard.hold_at(path)
            if hold is not None and not await asyncio.to_thread(_continues, services.artifacts, path, body):
                raise held(path, hold)
            await asyncio.to_thread(services.artifacts.write_inline, path, body)
            return Response(b"{}", media_type="application/json")
        declared = request.headers.get("content-length", "")
        async with guarded(services, path, int(declared) if declared.isdecimal() else 0) as written:
            write = partial(services.artifacts.write, path, digest=digest, limit=written.room)
            entry = await uploads.store(request, write)
            written.size = entry.size
        headers = {"Repr-Digest": content_digest(entry.sha256), "ETag": etag(entry)}
        return Response(b"{}", media_type="application/json", headers=headers)

    async def delete(request: Request) -> Response:
        path = file_path(request)
        await services.guard.require_removable(path)
        await asyncio.to_thread(services.artifacts.delete, path)
        return Response(b"{}", media_type="application/json")

    async def health(_request: Request) -> Response:
        return PlainTextResponse("OK")

    async def version(_request: Request) -> Response:
        return PlainTextResponse(MLFLOW_VERSION)

    async def server_info(_request: Request) -> Response:
        facts = {"store_type": "SqlStore", "workspaces_enabled": False, "multipart_uploads_enabled": True}
        return Response(msgspec.json.encode(facts), media_type="application/json")

    for base in BASES:
        app.add_route(f"{base}/artifacts", listing, ["GET"], include_in_schema=False)
        app.add_route(f"{base}/artifacts/{{path:path}}", download, ["GET", "HEAD"], include_in_schema=False)
        app.add_route(f"{base}/artifacts/{{path:path}}", upload, ["PUT"], include_in_schema=False)
        app.add_route(f"{base}/artifacts/{{path:path}}", delete, ["DELETE"], include_in_schema=False)
    app.add_route("/health", health, ["GET"], include_in_schema=False)
    app.add_route("/version", version, ["GET"], include_in_schema=False)
    for prefix in ("/api/3.0/mlflow", "/ajax-api/3.0/mlflow"):
        app.add_route(f"{prefix}/server-info", server_info, ["GET"], include_in_schema=False)


def file_path(request: Request) -> str:
    """The path of a file in the request's URL.

    Raises:
        InvalidInput: it is not allowed, or empty.
    """
    path = safe_path(request.path_params["path"])
    if not path:
        raise InvalidInput("Invalid path '': a file needs a name.")
    return path


def etag(entry: Entry) -> str:
    """What changes with the bytes of a file."""
    return f'"{entry.sha256}"'


async def send_file(services: Services, path: str, request: Request) -> Response:
    """A file of the store as a download, or the range of it that the request wants.

    Raises:
        NotFound: no such file.
        Corrupted: its bytes are not what was written.
    """
    entry = await asyncio.to_thread(services.artifacts.entry, path)
    tag = etag(entry)
    if not _names(request.headers.get("if-match", "*"), tag):
        raise Changed(f"The artifact '{path}' is another version by now: {tag}")
    if _names(request.headers.get("if-none-match", "").replace("W/", ""), tag):
        return Response(status_code=304, headers={"ETag": tag})
    name = posixpath.basename(path)
    headers = {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}",
        "X-Content-Type-Options": "nosniff",
        "Accept-Ranges": "bytes",
        "ETag": tag,
        "Repr-Digest": content_digest(entry.sha256),
    }
    start, end, status = 0, entry.size, 200
    wanted = _RANGE.match(request.headers.get("range", ""))
    if wanted and (wanted[1] or wanted[2]) and request.headers.get("if-range", tag) == tag:
        start = int(wanted[1]) if wanted[1] else max(0, entry.size - int(wanted[2]))
        end = min(entry.size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else entry.size
        if start >= end:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{entry.size}"})
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{entry.size}"
    headers["Content-Length"] = str(end - start)
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    if request.method == "HEAD":
        return Response(status_code=status, media_type=media_type, headers=headers)
    pieces = await asyncio.to_thread(_begun, services.artifacts.read_entry(path, entry, start, end))
    return StreamingResponse(iterate_in_threadpool(pieces), status_code=status, media_type=media_type, headers=headers)


def _continues(artifacts: ArtifactStore, path: str, body: bytes) -> bool:
    """Whether a part of a log begins with what is there already."""
    try:
        return body.startswith(b"".join(artifacts.read(path)))
    except NotFound:
        return True


def _names(tags: str, tag: str) -> bool:
    """Whether a list of ETags, as ``If-Match`` has it, names this one or all."""
    return any(each.strip() in {tag, "*"} for each in tags.split(","))


def _begun(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same pieces, the first of which has been read: what is wrong with it can still be answered."""
    first = next(pieces, None)
    return pieces if first is None else itertools.chain([first], pieces)
