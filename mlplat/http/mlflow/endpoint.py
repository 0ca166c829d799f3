"""One declaration per MLflow endpoint; each is served under both of MLflow's prefixes."""

from __future__ import annotations

import base64
import math
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, ExceptionHandler, Receive, Scope, Send

from mlplat.errors import InvalidInput
from mlplat.http.bodies import decode_request
from mlplat.http.services import Services

#: What repeats of one request have in common: the caller's ``Idempotency-Key``, else made up here.
request_id: ContextVar[str] = ContextVar("mlplat_request_id")
#: Whom the request comes from, as it says itself: the user name of MLflow's clients, else empty.
caller: ContextVar[str] = ContextVar("mlplat_caller", default="")
MAX_IDEMPOTENCY_KEY = 200
MAX_CALLER = 200
PREFIXES = ("/api/2.0/mlflow", "/ajax-api/2.0/mlflow")
Answer = dict[str, Any]
_FOUND = "mlplat.route"


@dataclass(frozen=True)
class Endpoint:
    """``methods`` and ``path`` below the prefix, the request's struct, and what answers it.

    ``{name}`` in the path is the request's field of that name. A handler may answer with a response of its own, to
    stream what is large.
    """

    methods: tuple[str, ...]
    path: str
    request: type[msgspec.Struct]
    handler: Callable[[Services, Any], Awaitable[Answer | Response]]


class _RouteTable(BaseRoute):
    """Routes whose paths have no parameters, found by their path: Starlette tries routes one after another."""

    path = PREFIXES[0]

    def __init__(self) -> None:
        self._routes: dict[str, list[Route]] = {}

    def add(self, route: Route) -> None:
        """Adds a route; several of one path differ in their methods."""
        self._routes.setdefault(route.path, []).append(route)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """See Starlette: the best match, of the path with another method if need be."""
        best: tuple[Match, Scope] = (Match.NONE, {})
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        for route in self._routes.get(path, ()):
            match, found = route.matches(scope)
            if match.value > best[0].value:
                best = match, {**found, _FOUND: route}
        return best

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the route that was found answer."""
        await scope[_FOUND].handle(scope, receive, send)


class _Direct:
    """Lets routes of the table answer at once: FastAPI's own layers, of which they need none but its error handlers,
    cost more than many of their answers."""

    def __init__(self, app: ASGIApp, table: _RouteTable, handlers: Mapping[Any, ExceptionHandler]) -> None:
        self._app = app
        self._table = table
        expected = {error: handler for error, handler in handlers.items() if error not in {500, Exception}}
        self._answer = ExceptionMiddleware(table.handle, expected)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            match, found = self._table.matches(scope)
            if match is Match.FULL:
                scope.update(found)
                await self._answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


def install(app: FastAPI, services: Services, endpoints: Sequence[Endpoint]) -> None:
    """Adds the endpoints to the app. They stay out of the OpenAPI document: MLflow documents them."""
    table = _RouteTable()
    app.router.routes.append(table)  # for what is no full match, such as another method
    app.add_middleware(_Direct, table=table, handlers=app.exception_handlers)
    for endpoint in endpoints:
        for prefix in PREFIXES:
            path = f"{prefix}/{endpoint.path}"
            route = Route(path, _route(services, endpoint), methods=list(endpoint.methods), include_in_schema=False)
            if route.param_convertors:
                app.router.routes.append(route)
            else:
                table.add(route)


def _route(services: Services, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def route(request: Request) -> Response:
        request_id.set(request.headers.get("idempotency-key", "")[:MAX_IDEMPOTENCY_KEY] or uuid.uuid4().hex)
        caller.set(caller_of(request.headers))
        _check_content_type(request)
        decoded = await decode_request(request, endpoint.request)
        for name, value in request.path_params.items():
            setattr(decoded, name, value)
        answer = await endpoint.handler(services, decoded)
        if isinstance(answer, Response):
            return answer
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return route


def caller_of(headers: Headers) -> str:
    """The user name of HTTP's basic authentication, which nothing has verified; empty without one."""
    scheme, _space, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        name = base64.b64decode(credentials, validate=True).decode().partition(":")[0]
    except ValueError:
        return ""
    return name.replace("\0", "")[:MAX_CALLER]


def _check_content_type(request: Request) -> None:
    if request.method != "POST":
        return
    content_type = request.headers.get("content-type")
    if content_type is None:
        raise InvalidInput("Bad Request. Content-Type header is missing.")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise InvalidInput("Bad Request. Content-Type must be one of ['application/json'].")


def require(name: str, value: str | None) -> str:
    """A required text field.

    Raises:
        InvalidInput: missing or empty.
    """
    if not value:
        raise InvalidInput(f"Missing value for required parameter '{name}'. See the API docs for more information.")
    return value


def parse_double(name: str, value: float | str | None) -> float:
    """A double from the wire: a number, a numeric string, or a name of NaN or an infinity.

    Raises:
        InvalidInput: missing, or none of those.
    """
    if value is None:
        raise InvalidInput(f"Missing value for required parameter '{name}'.")
    try:
        return float(value)
    except ValueError as error:
        raise InvalidInput(f"Invalid value {value!r} for parameter '{name}' supplied: expected a number.") from error


def wire_double(value: float) -> float | str:
    """A double as protobuf's JSON has it."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def wire_pairs(entries: Mapping[str, str]) -> list[Answer]:
    """Params or tags as MLflow writes them."""
    return [{"key": key, "value": value} for key, value in entries.items()]


def page_offset(token: str | None) -> int:
    """The offset in a page token; 0 without one.

    Raises:
        InvalidInput: not a token of ours.
    """
    if not token:
        return 0
    if not token.isascii() or not token.isdecimal() or len(token) > 12:
        raise InvalidInput(f"Invalid page token: {token[:100]!r}")
    return int(token)


def paged(name: str, items: Sequence[Any], limit: int, offset: int) -> Answer:
    """A page of ``items`` (which holds one more than the page when there is a next one)."""
    answer: Answer = {name: list(items[:limit])} if items else {}
    if len(items) > limit:
        answer["next_page_token"] = str(offset + limit)
    return answer


def token_page(name: str, items: Sequence[Any], next_token: str | None) -> Answer:
    """A page, and where the next one starts; what is empty is absent."""
    answer: Answer = {name: items} if items else {}
    if next_token is not None:
        answer["next_page_token"] = next_token
    return answer


def check_limit(limit: int, highest: int) -> int:
    """A page size within bounds.

    Raises:
        InvalidInput: less than 1 or more than ``highest``.
    """
    if not 1 <= limit <= highest:
        raise InvalidInput(f"Invalid value {limit} for parameter 'max_results' supplied: it must be 1 to {highest}.")
    return limit
