"""The one place where errors become answers."""

from __future__ import annotations

import logging

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mlplat.db.engine import CONNECTION_ERRORS, why_away
from mlplat.errors import InvalidInput, PayloadTooLarge, PlatformError, Unavailable

_log = logging.getLogger(__name__)
RETRY_AFTER_S = "1"


def error_response(error: PlatformError) -> Response:
    """MLflow's error body, which the native API shares."""
    body = msgspec.json.encode({"error_code": error.code, "message": error.message})
    headers = {"Retry-After": RETRY_AFTER_S} if error.status in {429, 503} else {}
    return Response(body, status_code=error.status, media_type="application/json", headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Maps every exception a route may raise."""

    async def platform_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, PlatformError)
        return error_response(error)

    async def validation_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problems = "; ".join(f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors())
        return error_response(InvalidInput(problems))

    async def body_error(_request: Request, error: Exception) -> Response:
        return error_response(InvalidInput(f"Invalid request: {error}"))

    async def refused_data(_request: Request, error: Exception) -> Response:
        assert isinstance(error, DataError)
        return error_response(InvalidInput(f"Invalid value: {str(error.orig).splitlines()[0]}"))

    async def away(_request: Request, error: Exception) -> Response:
        return error_response(Unavailable(why_away(error)))

    async def http_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = {404: "ENDPOINT_NOT_FOUND", 405: "METHOD_NOT_ALLOWED", 413: PayloadTooLarge.code}
        code = known.get(error.status_code, "BAD_REQUEST")
        body = msgspec.json.encode({"error_code": code, "message": str(error.detail)})
        return Response(body, status_code=error.status_code, media_type="application/json")

    async def unexpected(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(PlatformError(f"internal error: {type(error).__name__}"))

    app.add_exception_handler(PlatformError, platform_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(msgspec.DecodeError, body_error)
    app.add_exception_handler(DataError, refused_data)
    for kind in CONNECTION_ERRORS:
        app.add_exception_handler(kind, away)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
