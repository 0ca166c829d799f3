"""MLflow's multipart uploads and presigned downloads. The URLs that it hands out lead back to the platform."""

from __future__ import annotations

import asyncio
from functools import partial
from urllib.parse import quote

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from mlplat.artifacts.model import safe_path
from mlplat.artifacts.parts import MAX_PARTS, PartUploads
from mlplat.artifacts.store import file_key
from mlplat.errors import InvalidInput
from mlplat.http.bodies import decode_request
from mlplat.http.guarded import guarded
from mlplat.http.mlflow.artifacts import BASES, file_path
from mlplat.http.services import Services
from mlplat.http.uploads import Uploads, wanted_digest

PART_URL = "/api/v1/artifact-uploads"


class _Create(msgspec.Struct):
    path: str
    num_parts: int = 1


class _Part(msgspec.Struct):
    part_number: int
    etag: str = ""


class _Complete(msgspec.Struct):
    path: str
    upload_id: str = ""
    parts: list[_Part] = msgspec.field(default_factory=list)


class _Abort(msgspec.Struct):
    path: str
    upload_id: str = ""


def install(app: FastAPI, services: Services, uploads: Uploads) -> None:
    """Adds the routes."""
    parts = PartUploads(services.artifacts)

    async def create(request: Request) -> Response:
        body = await decode_request(request, _Create)
        _target(request, body.path)
        if not 1 <= body.num_parts <= MAX_PARTS:
            raise InvalidInput(f"num_parts must be between 1 and {MAX_PARTS}, not {body.num_parts}")
        upload = await asyncio.to_thread(parts.begin)
        base = f"{request.base_url}".rstrip("/") + f"{PART_URL}/{upload}"
        credentials = [
            {"url": f"{base}/{number}", "part_number": number, "headers": {}} for number in range(1, body.num_parts + 1)
        ]
        return _json({"upload_id": upload, "credentials": credentials})

    async def put_part(request: Request) -> Response:
        upload, number, digest = request.path_params["upload"], request.path_params["number"], wanted_digest(request)
        found = await uploads.store(request, partial(parts.put, upload, number, digest=digest))
        return Response(headers={"ETag": f'"{found}"'})

    async def complete(request: Request) -> Response:
        body = await decode_request(request, _Complete)
        target = _target(request, body.path)
        wanted = [(part.part_number, part.etag.strip('"') or None) for part in body.parts]
        if await asyncio.to_thread(parts.is_joined, body.upload_id, target):  # whoever asks has not heard of it
            return _json({})
        size = await asyncio.to_thread(parts.size, body.upload_id, [number for number, _digest in wanted])
        async with guarded(services, target, size) as written:
            written.size = (await asyncio.to_thread(parts.join, body.upload_id, wanted, target)).size
        return _json({})

    async def abort(request: Request) -> Response:
        body = await decode_request(request, _Abort)
        await asyncio.to_thread(parts.forget, body.upload_id)
        return _json({})

    async def presigned(request: Request) -> Response:
        path = file_path(request)
        size = await asyncio.to_thread(services.artifacts.size, path)
        url = f"{request.base_url}".rstrip("/") + f"{BASES[0]}/artifacts/{quote(path)}"
        return _json({"url": url, "headers": {}, "file_size": size})

    app.add_route(f"{PART_URL}/{{upload}}/{{number:int}}", put_part, ["PUT"], include_in_schema=False)
    for base in BASES:
        for name, route in (("create", create), ("complete", complete), ("abort", abort)):
            app.add_route(f"{base}/mpu/{name}", route, ["POST"], include_in_schema=False)
            app.add_route(f"{base}/mpu/{name}/{{path:path}}", route, ["POST"], include_in_schema=False)
        app.add_route(f"{base}/presigned/{{path:path}}", presigned, ["GET"], include_in_schema=False)


def _target(request: Request, local_file: str) -> str:
    """The file's path: MLflow sends where the file lies on the client's disk, of which the name counts."""
    folder = safe_path(request.path_params.get("path", ""))
    name = local_file.replace("\\", "/").rpartition("/")[2]
    if not name:
        raise InvalidInput("Invalid path '': a file needs a name.")
    return file_key(f"{folder}/{name}" if folder else name)


def _json(body: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
