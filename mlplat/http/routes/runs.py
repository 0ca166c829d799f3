"""/api/v1/runs: what a run measured, and runs side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Literal, get_args

import msgspec
from fastapi import APIRouter, Query
from pydantic import BaseModel, Field, JsonValue
from starlette.responses import Response

from mlplat.artifacts.model import served_path
from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import wire_double
from mlplat.http.routes.curves import MAX_RUNS, Double, RunId
from mlplat.http.services import Services
from mlplat.metrics.curves import RunOrigin
from mlplat.tracking import comparison
from mlplat.tracking.comparison import RunFacts, align, compare_code, differences, uses_by_name
from mlplat.tracking.metric_summaries import MetricSummary, read_summaries
from mlplat.tracking.model import Run, to_ms
from mlplat.tracking.run_facts import read_facts

#: Runs whose files are read at the same time.
READERS = 8

Section = Literal["info", "params", "tags", "datasets", "metrics", "environment", "code"]
SECTIONS: tuple[Section, ...] = get_args(Section)


class Summary(BaseModel):
    """One series: its last point, and its least and greatest number (absent when it is NaN throughout)."""

    value: Double
    step: int
    timestamp: int
    min: Double | None = None
    max: Double | None = None


class NamedSummary(Summary):
    """One series by its key."""

    key: str


class MetricsAnswer(BaseModel):
    """The metrics of a run, by key."""

    run_id: str
    metrics: list[NamedSummary]


class ComparedRow(BaseModel):
    """One key over all runs: a value per run in the order of `run_ids`, null where a run has none."""

    key: str
    differs: bool
    values: list[JsonValue]


class ComparedCode(BaseModel):
    """A run's code against that of the base run; `diff` is a unified diff of their uncommitted changes."""

    run_id: str
    base_commit: str | None
    commit: str | None
    differs: bool
    diff: str | None
    note: str | None


class CompareRequest(BaseModel):
    """Runs to compare."""

    run_ids: list[RunId] = Field(min_length=1, max_length=MAX_RUNS)
    base: RunId | None = Field(default=None, description="The run whose code others are compared with; else the first.")
    only_differences: bool = Field(default=False, description="Only what is not the same in all runs.")
    sections: list[Section] = Field(default=list(SECTIONS), description="What to compare.")


class CompareAnswer(BaseModel):
    """Sections that were not asked for, or that no run has anything for, are null."""

    run_ids: list[str]
    base: str
    info: list[ComparedRow] | None = None
    params: list[ComparedRow] | None = None
    tags: list[ComparedRow] | None = None
    datasets: list[ComparedRow] | None = Field(
        default=None, description="By name; a value lists the digest and context of each use: what went into the run."
    )
    metrics: list[ComparedRow] | None = Field(default=None, description="Values are like those of a run's metrics.")
    environment: list[ComparedRow] | None = None
    code: list[ComparedCode] | None = None


def router(services: Services) -> APIRouter:
    """Reading and comparing runs."""
    api = APIRouter(prefix="/api/v1/runs", tags=["runs"])

    @api.post("/compare", response_model=CompareAnswer)
    async def compare(request: CompareRequest) -> Response:
        """Runs side by side: info, params, tags, input datasets, last metrics, environment and code."""
        return _answer(await _compare(services, request))

    @api.get("/compare", response_model=CompareAnswer)
    async def compare_by_query(
        run_id: Annotated[list[RunId], Query(min_length=1, max_length=MAX_RUNS)],
        base: RunId | None = None,
        only_differences: bool = False,
        section: Annotated[list[Section], Query()] = list(SECTIONS),  # noqa: B006 - FastAPI copies defaults
    ) -> Response:
        """The same, by a link: `?run_id=…&run_id=…`."""
        request = CompareRequest(run_ids=run_id, base=base, only_differences=only_differences, sections=section)
        return _answer(await _compare(services, request))

    @api.get("/{run_id}/metrics", response_model=MetricsAnswer, response_model_exclude_none=True)
    async def metrics(run_id: str) -> Response:
        """All metrics of a run, each with its last point, its least and its greatest number."""
        runs = await services.runs.origins([run_id])
        found = (await read_summaries(services.metrics.query, runs))[run_id]
        return _answer({"run_id": run_id, "metrics": [{"key": one.key, **_summary(one)} for one in found]})

    return api


def _answer(document: Mapping[str, object]) -> Response:
    """Without pydantic, which would check 10,000 rows one by one."""
    return Response(msgspec.json.encode(document), media_type="application/json")


async def _compare(services: Services, request: CompareRequest) -> dict[str, object]:
    run_ids = list(dict.fromkeys(request.run_ids))
    base = request.base or run_ids[0]
    if base not in run_ids:
        raise InvalidInput(f"base: run {base} is not one of the runs to compare")
    runs = await services.runs.get_many(run_ids)
    wanted = set(request.sections)
    sections: dict[str, Sequence[Mapping[str, comparison.JsonValue]]] = {
        "info": [_info(run) for run in runs],
        "params": [dict(run.params) for run in runs],
        "tags": [dict(run.tags) for run in runs],
        "datasets": [uses_by_name(run.links.datasets) for run in runs],
    }
    answer: dict[str, object] = {"run_ids": run_ids, "base": base}
    rows = {name: align(columns) for name, columns in sections.items() if name in wanted}
    if "metrics" in wanted:
        rows["metrics"] = align(await _metrics(services, runs), _judged_metric)
    if wanted & {"environment", "code"}:
        facts = await _facts(services, runs)
        if "environment" in wanted:
            rows["environment"] = align([one.environment for one in facts])
        if "code" in wanted:
            answer["code"] = await asyncio.to_thread(_code, run_ids, base, facts, request.only_differences)
    for name, found in rows.items():
        kept = differences(found) if request.only_differences else found
        answer[name] = [asdict(row) for row in kept] if found else None
    return answer


def _info(run: Run) -> dict[str, comparison.JsonValue]:
    start, end = to_ms(run.started_at), None if run.ended_at is None else to_ms(run.ended_at)
    return {
        "name": run.name,
        "status": run.status.value,
        "experiment_id": str(run.experiment_id),
        "user": run.user_id or None,
        "start_time": start,
        "end_time": end,
        "duration_ms": None if end is None else end - start,
        "lifecycle_stage": "deleted" if run.deleted else "active",
    }


async def _metrics(services: Services, runs: Sequence[Run]) -> list[dict[str, comparison.JsonValue]]:
    origins = [RunOrigin(run.run_id, to_ms(run.started_at)) for run in runs]
    found = await read_summaries(services.metrics.query, origins)
    return [{one.key: _summary(one) for one in found[run.run_id]} for run in runs]


def _summary(one: MetricSummary) -> dict[str, comparison.JsonValue]:
    shown: dict[str, comparison.JsonValue] = {
        "value": wire_double(one.value), "step": one.step, "timestamp": one.timestamp,
    }  # fmt: skip
    if one.lowest is not None and one.highest is not None:
        shown |= {"min": wire_double(one.lowest), "max": wire_double(one.highest)}
    return shown


def _judged_metric(value: comparison.JsonValue) -> object:
    """Two series are the same if their numbers are: when they were measured does not matter."""
    assert isinstance(value, dict)
    return value["value"], value.get("min"), value.get("max")


async def _facts(services: Services, runs: Sequence[Run]) -> list[RunFacts]:
    turn = asyncio.Semaphore(READERS)

    async def read(run: Run) -> RunFacts:
        async with turn:
            return await asyncio.to_thread(read_facts, services.artifacts, run, served_path(run.artifact_uri))

    return list(await asyncio.gather(*(read(run) for run in runs)))


def _code(
    run_ids: Sequence[str], base: str, facts: Sequence[RunFacts], only_differences: bool
) -> list[dict[str, object]] | None:
    code = {run_id: one.code for run_id, one in zip(run_ids, facts, strict=True)}
    if not any(one.known for one in code.values()):
        return None
    found = [compare_code(base, code[base], run_id, code[run_id]) for run_id in run_ids if run_id != base]
    return [asdict(one) for one in found if one.differs or not only_differences]
