"""All that is known of a run, in one piece: as it is now, or as it was when it was purged."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.artifacts.model import served_path
from mlplat.artifacts.store import ArtifactStore
from mlplat.db.tables import experiment, lineage_run
from mlplat.errors import InvalidInput
from mlplat.lineage.pipelines import PIPELINE_RUN_TAG, STEP_TAG
from mlplat.metrics.curves import Query
from mlplat.tracking.comparison import JsonValue
from mlplat.tracking.inputs import DATASET_CONTEXT_TAG, DatasetInput
from mlplat.tracking.metric_summaries import read_last_values
from mlplat.tracking.model import Run
from mlplat.tracking.run_facts import DIRTY_TAG, SOURCE_TAG, read_facts
from mlplat.tracking.runs import load_runs

READERS = 8
MAX_METRICS = 10_000
MAX_SCHEMA_LENGTH = 64 * 1024
_PACKAGES = "packages."


class DataUse(msgspec.Struct, frozen=True):
    """A dataset that a run read. ``rows`` is None where nobody said; ``schema`` is JSON, or text that is none;
    ``feature_views`` are those of a feature store that it was read through."""

    name: str
    digest: str
    source_type: str
    source: Any
    schema: Any
    rows: int | None
    context: str | None
    feature_views: list[str] = []


class CodeFacts(msgspec.Struct, frozen=True):
    """The code that a run ran; ``diff`` is what was not committed: empty if nothing, None if not known."""

    commit: str | None
    branch: str | None
    repository: str | None
    dirty: bool | None
    entry_point: str | None
    diff: str | None


class RunRecord(msgspec.Struct, frozen=True):
    """A run. ``environment`` maps flat keys (``python``, ``cpu.model``, ``gpus.0.name`` …) to values; ``packages``
    names to versions; ``metrics`` keys to last values, as text where JSON has no such number."""

    run_id: str
    name: str
    experiment_id: int
    experiment: str
    status: str
    user: str
    started_at: datetime
    ended_at: datetime | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float | str]
    data: list[DataUse]
    code: CodeFacts
    environment: dict[str, Any]
    packages: dict[str, str]
    pipeline_run: str | None = None
    step: str | None = None
    #: When it was purged; this record is what is left.
    purged_at: datetime | None = None


@dataclass(frozen=True)
class RunRecords:
    """Reads of records. All methods are safe to call concurrently."""

    engine: AsyncEngine
    artifacts: ArtifactStore
    query: Query

    async def load(self, run_ids: Sequence[str]) -> dict[str, RunRecord]:
        """The records of the runs, also of purged ones; unknown ids are left out.

        Raises:
            Unavailable: the metric store is away.
        """
        found = await self.live(run_ids)
        gone = [run_id for run_id in run_ids if run_id not in found]
        if gone:
            kept = select(lineage_run).where(lineage_run.c.run_id.in_(gone))
            async with self.engine.connect() as connection:
                for row in await connection.execute(kept):
                    found[row.run_id] = msgspec.convert({**row.record, "purged_at": row.created_at}, RunRecord)
        return {run_id: found[run_id] for run_id in run_ids if run_id in found}

    async def live(self, run_ids: Sequence[str]) -> dict[str, RunRecord]:
        """Those that were not purged."""
        async with self.engine.connect() as connection:
            runs = await load_runs(connection, run_ids)
            named = select(experiment.c.experiment_id, experiment.c.name)
            named = named.where(experiment.c.experiment_id.in_({run.experiment_id for run in runs}))
            names = {row.experiment_id: row.name for row in await connection.execute(named)}
        if not runs:
            return {}
        metrics = await read_last_values(self.query, [run.run_id for run in runs])
        turn = asyncio.Semaphore(READERS)

        async def record(run: Run) -> RunRecord:
            async with turn:
                name = names.get(run.experiment_id, "")
                return await asyncio.to_thread(_record, self.artifacts, run, name, _numbers(metrics[run.run_id]))

        return {one.run_id: one for one in await asyncio.gather(*map(record, runs))}


async def keep_records(connection: AsyncConnection, records: Sequence[RunRecord]) -> None:
    """Keeps records for good; one that is kept already stays as it is."""
    if records:
        rows = [{"run_id": one.run_id, "record": msgspec.to_builtins(one)} for one in records]
        await connection.execute(upsert(lineage_run).values(rows).on_conflict_do_nothing())


def _record(artifacts: ArtifactStore, run: Run, experiment_name: str, metrics: dict[str, float | str]) -> RunRecord:
    try:
        root = served_path(run.artifact_uri)
    except InvalidInput:  # nothing that the platform could have stored
        root = None
    facts = read_facts(artifacts, run, root)
    environment = {key: value for key, value in facts.environment.items() if not key.startswith(_PACKAGES)}
    packages = {
        key.removeprefix(_PACKAGES): str(value) for key, value in facts.environment.items() if key.startswith(_PACKAGES)
    }
    dirty = run.tags.get(DIRTY_TAG)
    code = CodeFacts(
        facts.code.commit,
        run.tags.get("mlflow.source.git.branch"),
        run.tags.get("mlflow.source.git.repoURL"),
        None if dirty is None else dirty == "true",
        run.tags.get(SOURCE_TAG) or _text(environment.get("entry_point")),
        facts.code.changes,
    )
    return RunRecord(
        run.run_id, run.name, run.experiment_id, experiment_name, run.status.value, run.user_id, run.started_at,
        run.ended_at, run.params, run.tags, metrics, [_use(found) for found in run.links.datasets], code, environment,
        packages, run.tags.get(PIPELINE_RUN_TAG), run.tags.get(STEP_TAG),
    )  # fmt: skip


def _numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """With text for what JSON has no number for."""
    return {key: value if math.isfinite(value) else str(value) for key, value in islice(values.items(), MAX_METRICS)}


def _use(found: DatasetInput) -> DataUse:
    data = found.dataset
    schema = data.schema if data.schema is None or len(data.schema) <= MAX_SCHEMA_LENGTH else None
    profile = _json(data.profile)
    return DataUse(
        data.name, data.digest, data.source_type, _json(data.source), _json(schema), _rows(profile),
        found.tags.get(DATASET_CONTEXT_TAG), found.feature_views,
    )  # fmt: skip


def _json(text: str | None) -> Any:
    """What a JSON text says; text that is none stays text."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _rows(profile: object) -> int | None:
    """MLflow's profiles call it ``num_rows``."""
    rows = profile.get("num_rows") if isinstance(profile, Mapping) else None
    return rows if isinstance(rows, int) else None


def _text(value: JsonValue) -> str | None:
    return value if isinstance(value, str) else None
