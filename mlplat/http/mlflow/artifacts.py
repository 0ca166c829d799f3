"""MLflow's artifact proxy: files of runs over HTTP, streamed."""

from __future__ import annotations

import asyncio
import mimetypes
import posixpath
import re
from collections.abc import AsyncIterator, Iterator
from urllib.parse import quote

import msgspec
from fastapi import FastAPI
from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from mlplat.artifacts.model import safe_path
from mlplat.errors import InvalidInput, PlatformError
from mlplat.http.services import Services

PREFIX = "/api/2.0/mlflow-artifacts/artifacts"
AJAX_PREFIX = "/ajax-api/2.0/mlflow-artifacts/artifacts"
MLFLOW_VERSION = "3.17.2"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})\Z", re.ASCII)
#: Chunks of an upload that may wait for the disk.
QUEUE_CHUNKS = 8


class _NotImplemented(PlatformError):
    code = "NOT_IMPLEMENTED"
    status = 501


def install(app: FastAPI, services: Services) -> None:
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
        return await send_file(services, _path(request), request)

    async def upload(request: Request) -> Response:
        await _upload(services, request)
        return Response(b"{}", media_type="application/json")

    async def delete(request: Request) -> Response:
        await asyncio.to_thread(services.artifacts.delete, _path(request))
        return Response(b"{}", media_type="application/json")

    async def no_multipart(_request: Request) -> Response:
        raise _NotImplemented("Multipart and presigned transfers are not supported by this artifact store.")

    async def health(_request: Request) -> Response:
        return PlainTextResponse("OK")

    async def version(_request: Request) -> Response:
        return PlainTextResponse(MLFLOW_VERSION)

    async def server_info(_request: Request) -> Response:
        facts = {"store_type": "SqlStore", "workspaces_enabled": False}
        return Response(msgspec.json.encode(facts), media_type="application/json")

    for prefix in (PREFIX, AJAX_PREFIX):
        app.add_route(prefix, listing, ["GET"], include_in_schema=False)
        app.add_route(f"{prefix}/{{path:path}}", download, ["GET"], include_in_schema=False)
        app.add_route(f"{prefix}/{{path:path}}", upload, ["PUT"], include_in_schema=False)
        app.add_route(f"{prefix}/{{path:path}}", delete, ["DELETE"], include_in_schema=False)
        base = prefix.removesuffix("/artifacts")
        app.add_route(f"{base}/mpu/{{rest:path}}", no_multipart, ["POST"], include_in_schema=False)
        app.add_route(f"{base}/presigned/{{rest:path}}", no_multipart, ["GET"], include_in_schema=False)
    app.add_route("/health", health, ["GET"], include_in_schema=False)
    app.add_route("/version", version, ["GET"], include_in_schema=False)
    for prefix in ("/api/3.0/mlflow", "/ajax-api/3.0/mlflow"):
        app.add_route(f"{prefix}/server-info", server_info, ["GET"], include_in_schema=False)


def _path(request: Request) -> str:
    path = safe_path(request.path_params["path"])
    if not path:
        raise InvalidInput("Invalid path '': a file needs a name.")
    return path


async def _upload(services: Services, request: Request) -> None:
    """Streams the body to the store with constant memory; a body that breaks off leaves nothing."""
    path = _path(request)
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_CHUNKS)
    loop = asyncio.get_running_loop()
    broken = False

    def chunks() -> Iterator[bytes]:
        while True:
            chunk = asyncio.run_coroutine_threadsafe(queue.get(), loop).result()
            if chunk is None:
                if broken:
                    raise InvalidInput("the upload broke off")
                return
            yield chunk

    writing = asyncio.create_task(asyncio.to_thread(services.artifacts.write, path, chunks()))
    try:
        async for chunk in request.stream():
            if chunk:
                await _put(queue, chunk, writing)
    except BaseException:
        broken = True
        raise
    finally:
        await _put(queue, None, writing)
        await asyncio.wait([writing])
    writing.result()


async def _put(queue: asyncio.Queue[bytes | None], chunk: bytes | None, writing: asyncio.Task[int]) -> None:
    """Queues a chunk, unless the writer has ended (its error is raised by whoever awaits it)."""
    putting = asyncio.create_task(queue.put(chunk))
    await asyncio.wait([putting, writing], return_when=asyncio.FIRST_COMPLETED)
    if not putting.done():
        putting.cancel()
        if chunk is not None:
            writing.result()


async def send_file(services: Services, path: str, request: Request) -> Response:
    """A file of the store as a download, or the range of it that the request wants.

    Raises:
        NotFound: no such file.
    """
    size = await asyncio.to_thread(services.artifacts.size, path)
    start, end, status = 0, size, 200
    wanted = _RANGE.match(request.headers.get("range", ""))
    if wanted and (wanted[1] or wanted[2]):
        start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        end = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
        if start >= end:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        status = 206
    name = posixpath.basename(path)
    headers = {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}",
        "Content-Length": str(end - start),
        "X-Content-Type-Options": "nosniff",
        "Accept-Ranges": "bytes",
    }
    if status == 206:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    chunks = await asyncio.to_thread(services.artifacts.read, path, start, end)
    body: AsyncIterator[bytes] = iterate_in_threadpool(chunks)
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return StreamingResponse(body, status_code=status, media_type=media_type, headers=headers)
