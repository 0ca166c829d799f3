"""/api/v1/storage: how much there is, collections, scrubbing, legal holds, quotas."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from mlplat.artifacts.model import safe_path
from mlplat.artifacts.verify import Checked, verify, verify_folder
from mlplat.http.services import Services
from mlplat.storage.model import MAX_REASON, Hold
from mlplat.storage.upkeep import Collection

#: How long a request for a collection waits for its end; after that it goes on by itself.
WAIT_S = 30.0
NDJSON = "application/x-ndjson"
#: A line of a scrub that found nothing comes after so many objects.
CHECKED_PER_LINE = 200
_MAX_BYTES = 2**63 - 1
_ExperimentId = Annotated[int, Path(ge=0, le=_MAX_BYTES)]


class CollectRequest(BaseModel):
    """What to do."""

    dry_run: bool = False


class CollectionAnswer(BaseModel):
    """A collection. While `finished_at` is missing it is under way; without a `report` it was cut short. Bytes are as
    stored."""

    collection_id: int
    dry_run: bool
    started_at: datetime
    finished_at: datetime | None
    report: dict[str, Any] | None


class ExperimentUsage(BaseModel):
    """Files of an experiment and their bytes, before anything is shared or compressed."""

    experiment_id: str
    name: str | None
    team: str | None
    files: int
    bytes: int


class ModelUsage(BaseModel):
    """Versions of a registered model and the bytes of their files, before anything is compressed; equal versions count
    once. They are a part of what the experiments of their runs have."""

    name: str
    versions: int
    bytes: int


class UsageAnswer(BaseModel):
    """As of the last collection. `stored_bytes`: what all blobs take up, shared and compressed."""

    measured_at: datetime | None
    experiments: list[ExperimentUsage]
    teams: dict[str, int]
    models: list[ModelUsage]
    other_bytes: int
    blobs: int
    stored_bytes: int


class HoldRequest(BaseModel):
    """Why, and who says so."""

    reason: str = Field(min_length=1, max_length=MAX_REASON)
    user: str = Field(default="", max_length=500)


class HoldAnswer(BaseModel):
    """A legal hold."""

    kind: str
    id: str
    reason: str
    user: str
    created_at: datetime


class QuotaRequest(BaseModel):
    """How many bytes of artifacts an experiment may have; none: no limit."""

    limit_bytes: int | None = Field(default=None, ge=0, le=_MAX_BYTES)


class QuotaAnswer(BaseModel):
    """A quota. `used_bytes` is exact after a collection, and an upper estimate between two."""

    experiment_id: str
    limit_bytes: int
    used_bytes: int


def router(services: Services) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/api/v1/storage", tags=["storage"])
    upkeep, guard = services.upkeep, services.guard
    under_way = set[asyncio.Task[Collection]]()

    @api.post("/collections")
    async def collect(request: CollectRequest) -> CollectionAnswer:
        """Removes checkpoints and logs past their time, then blobs that nothing refers to. What takes longer than half
        a minute goes on, and is found by GET."""
        task = asyncio.create_task(upkeep.collect(dry_run=request.dry_run))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        done, _pending = await asyncio.wait([task], timeout=WAIT_S)
        return _collection(task.result() if done else (await upkeep.last())[0])

    @api.get("/collections")
    async def collections(limit: Annotated[int, Query(ge=1, le=1_000)] = 20) -> list[CollectionAnswer]:
        """The newest first."""
        return [_collection(each) for each in await upkeep.last(limit=limit)]

    @api.get("/usage")
    async def usage() -> UsageAnswer:
        """Storage by experiment, team (the experiment's tag `team`) and registered model, the largest first."""
        found = await upkeep.use()
        if found is None:
            return UsageAnswer(
                measured_at=None, experiments=[], teams={}, models=[], other_bytes=0, blobs=0, stored_bytes=0
            )
        return UsageAnswer(**asdict(found))

    @api.get("/verify", response_class=StreamingResponse)
    async def scrub(path: str = "") -> StreamingResponse:
        """Reads all that is stored, or a folder, and names what is damaged: JSON lines with `checked`, `bytes`, and
        `problems`."""
        folder = safe_path(path)
        return await _told(verify_folder(services.artifacts, folder) if folder else verify(services.artifacts))

    @api.post("/repair", response_class=StreamingResponse)
    async def repair() -> StreamingResponse:
        """Reads all that is stored, as `verify` does, and removes damaged blobs: who stores the same bytes again heals
        the files."""
        return await _told(verify(services.artifacts, repair=True))

    @api.get("/holds")
    async def holds() -> list[HoldAnswer]:
        """All legal holds, the newest first."""
        return [_hold(each) for each in await guard.holds()]

    @api.put("/holds/{kind}/{id_}")
    async def hold(kind: str, id_: str, request: HoldRequest) -> HoldAnswer:
        """Puts an `experiment` or a `run` under a legal hold: its artifacts cannot be changed or removed, and it is not
        purged."""
        return _hold(await guard.hold(kind, id_, request.reason, request.user))

    @api.delete("/holds/{kind}/{id_}")
    async def lift(kind: str, id_: str) -> dict[str, str]:
        """Ends a legal hold."""
        await guard.lift(kind, id_)
        return {}

    @api.get("/quotas")
    async def quotas() -> list[QuotaAnswer]:
        """All quotas."""
        return [
            QuotaAnswer(experiment_id=str(each.experiment_id), limit_bytes=each.limit_bytes, used_bytes=each.used_bytes)
            for each in await guard.quotas()
        ]

    @api.put("/quotas/{experiment_id}")
    async def set_quota(experiment_id: _ExperimentId, request: QuotaRequest) -> dict[str, int]:
        """Limits the artifacts of an experiment; uploads that do not fit are refused with 507."""
        _files, used = await asyncio.to_thread(services.artifacts.usage, str(experiment_id))
        await guard.set_quota(experiment_id, request.limit_bytes, used)
        return {"used_bytes": used}

    return api


def _collection(found: Collection) -> CollectionAnswer:
    return CollectionAnswer(**asdict(found))


def _hold(hold: Hold) -> HoldAnswer:
    subject = hold.subject
    return HoldAnswer(kind=subject.kind, id=subject.id, reason=hold.reason, user=hold.by, created_at=hold.at)


async def _told(found: Iterator[Checked]) -> StreamingResponse:
    lines = _lines(found)
    first = await asyncio.to_thread(next, lines)  # what is wrong with the path or the store can still be answered
    return StreamingResponse(itertools.chain([first], lines), media_type=NDJSON)


def _lines(found: Iterator[Checked]) -> Iterator[bytes]:
    """A line for each problem, one now and then, and a last one."""
    checked = size = 0
    for each in found:
        checked, size = checked + 1, size + each.size
        problems = [{"name": each.name, "problem": each.problem}] if each.problem else []
        if problems or checked % CHECKED_PER_LINE == 0:
            yield msgspec.json.encode({"checked": checked, "bytes": size, "problems": problems}) + b"\n"
    yield msgspec.json.encode({"checked": checked, "bytes": size, "problems": [], "done": True}) + b"\n"
