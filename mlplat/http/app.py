"""The ASGI app: routes over services. It holds no state and knows nothing of Ray."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mlplat.errors import PermissionDenied
from mlplat.http.bodies import BodyLimit
from mlplat.http.errors import error_response, install_error_handlers
from mlplat.http.live.hub import Hub
from mlplat.http.live.registry_feed import RegistryFeed
from mlplat.http.mlflow import (
    artifacts,
    datasets,
    experiments,
    listing,
    log_data,
    logged_models,
    metric_history,
    multipart,
    registry,
    runs,
)
from mlplat.http.mlflow import webhooks as mlflow_webhooks
from mlplat.http.mlflow.endpoint import install
from mlplat.http.routes import (
    approvals,
    console,
    curves,
    heartbeats,
    imports,
    lifecycle,
    lineage,
    model_events,
    model_search,
    models,
    pipeline_events,
    pipeline_logs,
    pipelines,
    platform,
    schedules,
    storage,
    triggers,
    webhooks,
)
from mlplat.http.routes import artifacts as native_artifacts
from mlplat.http.routes import runs as native_runs
from mlplat.http.services import Services
from mlplat.http.uploads import Uploads


class LocalOnly:
    """Refuses everybody but this machine, because there is no authentication yet.

    The peer must be a loopback address. So must the names in ``Host`` and ``Origin``: otherwise any web
    page that the user visits could send requests here, through DNS rebinding or a form.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] in {"http", "websocket"}:
            refusal = _refusal(scope.get("client"), Headers(scope=scope))
            if refusal:
                await error_response(PermissionDenied(refusal))(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refusal(client: tuple[str, int] | None, headers: Headers) -> str | None:
    if client is None or not _is_loopback(client[0]):
        return "this platform serves its own machine only"
    if not _is_local_name(f"//{headers.get('host', '')}"):
        return f"this platform is not {headers.get('host', '')!r}; use 127.0.0.1 or localhost"
    origin = headers.get("origin")
    if origin is not None and not _is_local_name(origin):
        return f"pages of {origin} may not call this platform"
    return None


@lru_cache(maxsize=1_000)
def _is_local_name(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    host = parts.hostname
    return host is not None and "@" not in parts.netloc and (host == "localhost" or _is_loopback(host))


@lru_cache(maxsize=1_000)
def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _lifespan(
    services: Services, hub: Hub, feed: RegistryFeed
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        catching_up = asyncio.create_task(services.lifecycle.catch_up())
        collecting = asyncio.create_task(services.upkeep.collect_when_due())
        yield
        catching_up.cancel()
        collecting.cancel()
        hub.close()
        feed.close()

    return lifespan


def create_app(services: Services, version: str) -> FastAPI:
    """The whole API. ``/docs`` works without a network: its scripts come from an installed package."""
    hub = Hub(services.pipelines, services.artifacts)
    feed = RegistryFeed(services.events, hub)
    app: FastAPI = FastAPIOffline(
        title="mlplat",
        version=version,
        description="Tracking, registry, pipelines and artifacts.",
        redoc_url=None,
        lifespan=_lifespan(services, hub, feed),
    )
    install_error_handlers(app)
    endpoints = (
        *log_data.ENDPOINTS,
        *runs.ENDPOINTS,
        *registry.ENDPOINTS,
        *mlflow_webhooks.ENDPOINTS,
        *experiments.ENDPOINTS,
        *metric_history.ENDPOINTS,
        *datasets.ENDPOINTS,
        *logged_models.ENDPOINTS,
        *listing.ENDPOINTS,
    )
    install(app, services, endpoints)
    uploads = Uploads()
    artifacts.install(app, services, uploads)
    multipart.install(app, services, uploads)
    app.include_router(native_artifacts.router(services, uploads))
    listing.install_files(app, services)
    app.include_router(pipelines.router(services))
    app.include_router(pipeline_events.router(hub))
    app.include_router(pipeline_logs.router(services, hub))
    app.include_router(heartbeats.router(services))
    app.include_router(console.router(services))
    app.include_router(platform.router(services))
    app.include_router(curves.router(services))
    app.include_router(native_runs.router(services))
    app.include_router(lifecycle.router(services))
    app.include_router(imports.router(services))
    app.include_router(model_events.router(services.events, feed))
    app.include_router(models.router(services))
    app.include_router(approvals.router(services))
    app.include_router(lineage.router(services))
    app.include_router(model_search.router(services))
    app.include_router(schedules.router(services))
    app.include_router(storage.router(services))
    app.include_router(triggers.router(services))
    app.include_router(webhooks.router(services.webhooks))
    app.add_middleware(BodyLimit)
    app.add_middleware(LocalOnly)
    return app
