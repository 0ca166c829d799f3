"""Artifacts by the run, logged model or version they belong to: listings, downloads, small uploads."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from mlplat.artifacts.model import proxied_path, safe_path
from mlplat.errors import InvalidInput
from mlplat.http.bodies import read_body
from mlplat.http.guarded import guarded
from mlplat.http.intact import require_intact
from mlplat.http.mlflow.artifacts import send_file
from mlplat.http.mlflow.endpoint import PREFIXES, Answer, Endpoint, page_offset, paged, require
from mlplat.http.mlflow.runs import ById, run_id_of
from mlplat.http.services import Services
from mlplat.registry.model import parse_version

#: Entries of a folder in one answer.
PAGE = 1_000
MAX_UPLOAD_BYTES = 10 * 1024 * 1024


class ListArtifacts(ById):
    """artifacts/list"""

    path: str = ""
    page_token: str | None = None


def _inside(artifact_uri: str, path: str) -> str:
    return f"{proxied_path(artifact_uri)}/{safe_path(path)}"


async def list_files(services: Services, root_uri: str, folder: str, page_token: str | None) -> Answer:
    """A page of a folder below an artifact root; the paths are relative to the root.

    Raises:
        InvalidInput: the path or token is malformed, or the artifacts live elsewhere.
    """
    path, offset = safe_path(folder), page_offset(page_token)
    root = proxied_path(root_uri)
    entries = await asyncio.to_thread(services.artifacts.list, f"{root}/{path}" if path else root)
    files = [
        {"path": f"{path}/{entry.path}" if path else entry.path, "is_dir": entry.is_dir}
        | ({} if entry.size is None else {"file_size": entry.size})
        for entry in entries[offset : offset + PAGE + 1]
    ]
    return {"root_uri": root_uri} | paged("files", files, PAGE, offset)


async def list_artifacts(services: Services, request: ListArtifacts) -> Answer:
    """GET artifacts/list"""
    run = await services.runs.get(run_id_of(request))
    return await list_files(services, run.artifact_uri, request.path, request.page_token)


def install_files(app: FastAPI, services: Services) -> None:
    """Adds the routes whose answers or bodies are files."""

    async def file_of_run(request: Request) -> Response:
        query = request.query_params
        run = await services.runs.get(require("run_id", query.get("run_id") or query.get("run_uuid")))
        return await send_file(services, _inside(run.artifact_uri, require("path", query.get("path"))), request)

    async def file_of_version(request: Request) -> Response:
        query = request.query_params
        name, version = require("name", query.get("name")), require("version", query.get("version"))
        found = await services.registry.get_version(name, parse_version(version))
        await require_intact(services, found)
        return await send_file(services, _inside(found.artifact_uri, require("path", query.get("path"))), request)

    async def file_of_model(request: Request) -> Response:
        path = require("artifact_file_path", request.query_params.get("artifact_file_path"))
        model = await services.logged_models.get(request.path_params["model_id"])
        return await send_file(services, _inside(model.artifact_location, path), request)

    async def upload(request: Request) -> Response:
        run_id = request.query_params.get("run_uuid") or request.query_params.get("run_id")
        if not run_id:
            raise InvalidInput("Request must specify run_uuid.")
        path = safe_path(request.query_params.get("path", ""))
        if not path:
            raise InvalidInput("Request must specify path.")
        body = await read_body(request, MAX_UPLOAD_BYTES)
        if not body:
            raise InvalidInput("Request must specify data.")
        run = await services.runs.get(run_id)
        target = _inside(run.artifact_uri, path)
        async with guarded(services, target, len(body)) as written:
            written.size = (await asyncio.to_thread(services.artifacts.write, target, [body])).size
        return Response(msgspec.json.encode({}), media_type="application/json")

    app.add_route("/get-artifact", file_of_run, ["GET"], include_in_schema=False)
    app.add_route("/model-versions/get-artifact", file_of_version, ["GET"], include_in_schema=False)
    for prefix in PREFIXES:
        files = f"{prefix}/logged-models/{{model_id}}/artifacts/files"
        app.add_route(files, file_of_model, ["GET"], include_in_schema=False)
        app.add_route(f"{prefix}/upload-artifact", upload, ["POST"], include_in_schema=False)


ENDPOINTS = (Endpoint(("GET",), "artifacts/list", ListArtifacts, list_artifacts),)
