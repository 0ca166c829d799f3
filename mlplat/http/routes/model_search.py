"""/api/v1/model-versions: search of versions, over all models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from mlplat.http.routes.models import VersionAnswer
from mlplat.http.services import Services
from mlplat.registry.search import search_versions
from mlplat.tracking.paging import MAX_TOKEN_LENGTH
from mlplat.tracking.search import MAX_FILTER_LENGTH

MAX_PAGE = 10_000
MAX_ORDERS = 10


class VersionsAnswer(BaseModel):
    """A page of versions."""

    versions: list[VersionAnswer]
    next_page_token: str | None = Field(description="null: this page is the last.")


def router(services: Services) -> APIRouter:
    """Versions, by what is known of them and of the runs that they come from."""
    api = APIRouter(prefix="/api/v1/model-versions", tags=["models"])

    @api.get("")
    async def search(
        filter_: Annotated[
            str,
            Query(
                alias="filter",
                max_length=MAX_FILTER_LENGTH,
                description="Such as `alias = 'champion' AND metrics.accuracy > 0.9`.",
            ),
        ] = "",
        order_by: Annotated[
            list[str],
            Query(max_length=MAX_ORDERS, description="Such as `semantic_version DESC`; by default the newest first."),
        ] = [],  # noqa: B006 - FastAPI copies defaults
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
        page_token: Annotated[str | None, Query(max_length=MAX_TOKEN_LENGTH)] = None,
    ) -> VersionsAnswer:
        """Versions that satisfy a filter, in pages. Metrics, params and datasets are those of a version's run."""
        page = await search_versions(services.registry, services.metrics, filter_, order_by, limit, page_token)
        versions = [VersionAnswer.of(version) for version in page.versions]
        return VersionsAnswer(versions=versions, next_page_token=page.next_token)

    return api
