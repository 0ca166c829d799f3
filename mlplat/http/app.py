"""The ASGI app: routes over services. It holds no state and knows nothing of Ray."""

from __future__ import annotations

import ipaddress

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp, Receive, Scope, Send

from mlplat.errors import PermissionDenied
from mlplat.http.errors import error_response, install_error_handlers
from mlplat.http.mlflow import artifacts, experiments, registry, runs
from mlplat.http.mlflow.endpoint import install
from mlplat.http.routes import pipelines, platform
from mlplat.http.services import Services


class LoopbackOnly:
    """Refuses peers on other machines: there is no authentication yet, so nobody else may come in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] in {"http", "websocket"} and not _is_loopback(scope.get("client")):
            await error_response(PermissionDenied("this platform serves its own machine only"))(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_loopback(client: tuple[str, int] | None) -> bool:
    if client is None:
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def create_app(services: Services, version: str) -> FastAPI:
    """The whole API. ``/docs`` works without a network: its scripts come from an installed package."""
    app: FastAPI = FastAPIOffline(
        title="mlplat", version=version, description="Tracking, registry, pipelines and artifacts.", redoc_url=None
    )
    install_error_handlers(app)
    for endpoints in (experiments.ENDPOINTS, runs.ENDPOINTS, registry.ENDPOINTS):
        install(app, services, endpoints)
    artifacts.install(app, services)
    app.include_router(pipelines.router(services))
    app.include_router(platform.router(services))
    app.add_middleware(LoopbackOnly)
    return app
