"""/api/v1/lineage: what models come from, and what came of data."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from mlplat import __version__
from mlplat.http.routes.models import Name
from mlplat.http.services import Services
from mlplat.lineage.audit import audit_json, audit_page, graph_json, provenance_json
from mlplat.lineage.model import MAX_DEPTH, MAX_NODE_LENGTH, MAX_NODES, Direction, Graph, Kind, parse_node
from mlplat.lineage.openlineage import openlineage_events
from mlplat.lineage.store import Provenance
from mlplat.registry.history import Recorded, Subject
from mlplat.registry.semver import MAX_RANGE_LENGTH

#: Of the history, of requests and of refusals: what an audit file has at most.
MAX_AUDITED = 10_000
#: OpenLineage wants a URI.
PRODUCER = f"urn:mlplat:{__version__}"
Spec = Annotated[
    str,
    Path(max_length=MAX_RANGE_LENGTH, description="A number, a semantic version, a range, a stage, `@` and an alias."),
]


class Ways(StrEnum):
    """In which directions to walk."""

    UPSTREAM = "upstream"
    DOWNSTREAM = "downstream"
    BOTH = "both"


class AuditFormat(StrEnum):
    """`html`: for people, with the JSON inside. `json`: that alone."""

    HTML = "html"
    JSON = "json"


def router(services: Services) -> APIRouter:
    """Provenance of model versions, and walks through the graph."""
    api = APIRouter(prefix="/api/v1/lineage", tags=["lineage"])

    async def provenance(name: str, spec: str) -> Provenance:
        version = await services.registry.resolve(name, spec)
        return await services.lineage.provenance(name, version.version)

    @api.get("/model-versions/{name}/{spec}")
    async def of_version(name: Name, spec: Spec) -> Response:
        """What a model version comes from: runs, data, code, environment, pipelines and parents, at any distance."""
        return _json(provenance_json(await provenance(name, spec)))

    @api.get("/model-versions/{name}/{spec}/openlineage")
    async def openlineage(name: Name, spec: Spec) -> Response:
        """The same as OpenLineage events, one for each run, the earliest first."""
        return _json(openlineage_events(await provenance(name, spec), PRODUCER))

    @api.get("/model-versions/{name}/{spec}/audit")
    async def audit(
        name: Name, spec: Spec, format_: Annotated[AuditFormat, Query(alias="format")] = AuditFormat.HTML
    ) -> Response:
        """All that is known of a model version, in one file: also its history, approvals and refusals."""
        document = await _audit(services, await provenance(name, spec))
        headers = {"Content-Disposition": f'attachment; filename="audit.{format_.value}"'}
        if format_ is AuditFormat.JSON:
            return _json(document, headers)
        page = await asyncio.to_thread(audit_page, document)
        return Response(page, media_type="text/html", headers=headers)

    @api.get("/graph")
    async def graph(
        node: Annotated[
            str,
            Query(
                max_length=MAX_NODE_LENGTH,
                description="Such as `model-version:digits/3`, `run:ID`, `dataset:NAME@DIGEST`, `feature-view:NAME`.",
            ),
        ],
        direction: Ways = Ways.UPSTREAM,
        depth: Annotated[int, Query(ge=1, le=MAX_DEPTH)] = MAX_DEPTH,
        limit: Annotated[int, Query(ge=1, le=MAX_NODES, description="Of nodes.")] = MAX_NODES,
    ) -> Response:
        """What can be reached from a node. Edges lead from what was there first to what came of it."""
        start = [parse_node(node)]
        found = Graph()
        for way in Direction:
            if direction in {Ways.BOTH, Ways(way.value)}:
                part = await services.lineage.graph(start, way, depth, limit)
                found = Graph(part.nodes | found.nodes, part.edges | found.edges, part.truncated or found.truncated)
        return _json(graph_json(found))

    @api.get("/datasets")
    async def of_dataset(
        digest: Annotated[str, Query(min_length=1, max_length=100)],
        name: Annotated[str | None, Query(max_length=500)] = None,
    ) -> Response:
        """Which models used a dataset: all that came of it, and the model versions among that."""
        found = await services.lineage.versions_of_dataset(digest, name)
        return _json({"model_versions": [each.id for each in found.of_kind(Kind.MODEL_VERSION)], **graph_json(found)})

    return api


async def _audit(services: Services, found: Provenance) -> dict[str, Any]:
    name, number = found.version.name, found.version.version
    history = await services.registry_history.changes(name, None, None, MAX_AUDITED)
    moves = await services.moves.search_moves(name, None, MAX_AUDITED)
    refusals = await services.moves.refusals(name, MAX_AUDITED)
    policy = await services.moves.get_policy(name)
    return await asyncio.to_thread(
        audit_json,
        found,
        [item for item in history if _concerns(item, number)],
        policy,
        [move for move in moves if move.version == number],
        refusals,
        at=datetime.now(UTC),
        producer=PRODUCER,
    )


def _concerns(item: Recorded, version: int) -> bool:
    """Whether a change is one of the model's name, of an alias to or from the version, or of its stage."""
    change = item.change
    match change.subject:
        case Subject.STAGE:
            return change.key == str(version)
        case Subject.ALIAS:
            return str(version) in {change.before, change.after}
        case _:
            return True


def _json(document: object, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json", headers=headers)
