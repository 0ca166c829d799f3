"""Request bodies: bounded, and decoded by msgspec."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlplat.errors import InvalidInput, PayloadTooLarge

MAX_JSON_BYTES = 32 * 1024 * 1024
MAX_BATCH_BYTES = 64 * 1024 * 1024
MAX_BLOB_BYTES = 512 * 1024 * 1024

#: Routes that bound their bodies themselves, or store them as they come.
_UNBOUNDED = (
    "/api/2.0/mlflow-artifacts/artifacts/",
    "/ajax-api/2.0/mlflow-artifacts/artifacts/",
    "/api/v1/artifacts/chunks",
    "/api/v1/artifact-uploads/",
    "/api/v1/blobs",
    "/api/v1/metrics",
)

S = TypeVar("S", bound=msgspec.Struct)


class BodyLimit:
    """Refuses bodies of more than ``MAX_BATCH_BYTES`` while they come: what reads them whole would take the memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"].startswith(_UNBOUNDED):
            await self._app(scope, receive, send)
            return
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BATCH_BYTES:
                # FastAPI lets these through, and no other errors of reading a body.
                raise HTTPException(413, f"the body has more than {MAX_BATCH_BYTES} bytes")
            return message

        await self._app(scope, bounded, send)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        PayloadTooLarge: it has more than ``limit`` bytes.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise PayloadTooLarge(f"the body has {declared} bytes, at most {limit} are accepted here")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise PayloadTooLarge(f"the body has more than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


async def decode_request(request: Request, kind: type[S]) -> S:
    """The request as a struct: the JSON body, or for GET the query.

    Raises:
        InvalidInput: malformed, or a field has the wrong type. Unknown fields are ignored.
    """
    try:
        if request.method == "GET":
            return msgspec.convert(_query(request, kind), kind, strict=False)
        body = await read_body(request, MAX_JSON_BYTES)
        if b"\\" in body and b"\\u0000" in body:  # the first test is a memchr
            raise InvalidInput("Invalid value: text may not contain NUL characters (\\u0000).")
        return _decode(body or b"{}", kind)
    except RecursionError as error:
        raise InvalidInput("The request body is nested too deeply.") from error
    except msgspec.ValidationError as error:
        raise InvalidInput(f"Invalid value: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"The request body is not JSON: {error}") from error


def _decode(body: bytes, kind: type[S]) -> S:
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except msgspec.ValidationError:
        # To protobuf's JSON a null is a field that is not set; bodies with nulls are rare and may take longer.
        if b"null" not in body:
            raise
        return msgspec.convert(_without_nulls(msgspec.json.decode(body)), kind, strict=False)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _query(request: Request, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Repeated keys become lists where the struct has a list."""
    lists = _lists(kind)
    query = request.query_params
    return {key: query.getlist(key) if key in lists else query[key] for key in query}


@cache
def _lists(kind: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(kind) if "list" in str(field.type))
