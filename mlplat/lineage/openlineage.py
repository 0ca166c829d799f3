"""The lineage of a model version as OpenLineage events: one for each run that it comes from. Pure.

By the specification 2-0-2: facets carry who produced them and the schema that they follow. What the platform knows and
no standard facet holds is in facets with the prefix ``mlplat_``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from mlplat.lineage.model import Kind, Node
from mlplat.lineage.records import DataUse, RunRecord
from mlplat.lineage.store import PipelineFacts, Provenance

NAMESPACE = "mlplat"
#: Runs whose ids are no UUIDs have one made of this and their id.
_IDS = uuid.UUID("6d6c706c-6174-4000-8000-6c696e656167")
_SPEC = "https://openlineage.io/spec"
_EVENT_TYPES = {"FINISHED": "COMPLETE", "FAILED": "FAIL", "KILLED": "ABORT", "RUNNING": "RUNNING", "SCHEDULED": "START"}
Json = dict[str, Any]


def openlineage_events(found: Provenance, producer: str) -> list[Json]:
    """The events, the earliest run first.

    Args:
        producer: a URI of the code that made them.
    """
    pipelines = {each.run_id: each for each in found.pipelines}
    facet = _Facets(producer)
    return [_event(found, run, pipelines, facet) for run in sorted(found.runs, key=lambda run: run.started_at)]


class _Facets:
    def __init__(self, producer: str) -> None:
        self.producer = producer

    def __call__(self, schema: str, **fields: Any) -> Json:
        return {"_producer": self.producer, "_schemaURL": f"{_SPEC}/{schema}", **fields}


def _event(found: Provenance, run: RunRecord, pipelines: Mapping[str, PipelineFacts], facet: _Facets) -> Json:
    return {
        "eventType": _EVENT_TYPES.get(run.status, "OTHER"),
        "eventTime": (run.ended_at or run.started_at).isoformat(),
        "producer": facet.producer,
        "schemaURL": f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent",
        "run": {"runId": _uuid(run.run_id), "facets": _run_facets(run, pipelines, facet)},
        "job": {"namespace": NAMESPACE, "name": _job(run, pipelines), "facets": _job_facets(run, facet)},
        "inputs": [_dataset(use, facet) for use in run.data] + _models(found, run, facet, upstream=True),
        "outputs": _models(found, run, facet, upstream=False),
    }


def _run_facets(run: RunRecord, pipelines: Mapping[str, PipelineFacts], facet: _Facets) -> Json:
    times = {"nominalStartTime": run.started_at.isoformat()} | _given(nominalEndTime=_iso(run.ended_at))
    facets = {
        "nominalTime": facet("facets/1-0-1/NominalTimeRunFacet.json#/$defs/NominalTimeRunFacet", **times),
        "mlplat_run": facet(
            "2-0-2/OpenLineage.json#/$defs/RunFacet", runId=run.run_id, name=run.name, experiment=run.experiment,
            user=run.user, params=run.params, metrics=run.metrics,
        ),
        "mlplat_environment": facet(
            "2-0-2/OpenLineage.json#/$defs/RunFacet", environment=run.environment, packages=run.packages
        ),
    }  # fmt: skip
    pipeline = pipelines.get(run.pipeline_run or "")
    if pipeline is not None:
        facets["parent"] = facet(
            "facets/1-0-1/ParentRunFacet.json#/$defs/ParentRunFacet",
            run={"runId": _uuid(pipeline.run_id)},
            job={"namespace": NAMESPACE, "name": pipeline.name},
        )
    return facets


def _job_facets(run: RunRecord, facet: _Facets) -> Json:
    facets: Json = {
        "jobType": facet(
            "facets/2-0-3/JobTypeJobFacet.json#/$defs/JobTypeJobFacet",
            processingType="BATCH", integration="MLPLAT", jobType="RUN",
        )
    }  # fmt: skip
    code = run.code
    if code.repository:
        facets["sourceCodeLocation"] = facet(
            "facets/1-0-1/SourceCodeLocationJobFacet.json#/$defs/SourceCodeLocationJobFacet",
            type="git", url=code.repository, repoUrl=code.repository,
            **_given(version=code.commit, branch=code.branch, path=code.entry_point),
        )  # fmt: skip
    if code.commit or code.diff:
        facets["mlplat_code"] = facet(
            "2-0-2/OpenLineage.json#/$defs/JobFacet",
            **_given(commit=code.commit, entryPoint=code.entry_point, dirty=code.dirty, diff=code.diff),
        )
    return facets


def _job(run: RunRecord, pipelines: Mapping[str, PipelineFacts]) -> str:
    pipeline = pipelines.get(run.pipeline_run or "")
    return (
        f"{pipeline.name}.{run.step}" if pipeline is not None else f"{run.experiment}.{run.code.entry_point or 'run'}"
    )


def _dataset(use: DataUse, facet: _Facets) -> Json:
    fields = list(_fields(use.schema))
    facets: Json = {
        "version": facet(
            "facets/1-0-1/DatasetVersionDatasetFacet.json#/$defs/DatasetVersionDatasetFacet", datasetVersion=use.digest
        ),
        "dataSource": facet(
            "facets/1-0-1/DatasourceDatasetFacet.json#/$defs/DatasourceDatasetFacet",
            name=use.source_type, uri=_uri(use.source),
        ),
    }  # fmt: skip
    if use.feature_views:
        facets["mlplat_featureViews"] = facet(
            "2-0-2/OpenLineage.json#/$defs/DatasetFacet", featureViews=use.feature_views
        )
    if fields:
        facets["schema"] = facet("facets/1-1-1/SchemaDatasetFacet.json#/$defs/SchemaDatasetFacet", fields=fields)
    found: Json = {"namespace": use.source_type or NAMESPACE, "name": use.name, "facets": facets}
    if use.rows is not None:
        counted = facet(
            "facets/1-0-0/InputStatisticsInputDatasetFacet.json#/$defs/InputStatisticsInputDatasetFacet",
            rowCount=use.rows,
        )
        found["inputFacets"] = {"inputStatistics": counted}
    return found


def _models(found: Provenance, run: RunRecord, facet: _Facets, *, upstream: bool) -> list[Json]:
    """The logged models and model versions that the run read, or made."""
    node = Node(Kind.RUN, run.run_id)
    ends = [
        edge.upstream if upstream else edge.downstream
        for edge in sorted(found.graph.edges)
        if (edge.downstream if upstream else edge.upstream) == node
    ]
    models = [end for end in ends if end.kind in {Kind.LOGGED_MODEL, Kind.MODEL_VERSION}]
    return [_model(model, facet) for model in models]


def _model(node: Node, facet: _Facets) -> Json:
    name, version = node.parts if node.kind is Kind.MODEL_VERSION else (node.id, node.id)
    return {
        "namespace": f"{NAMESPACE}/{node.kind}",
        "name": name,
        "facets": {
            "version": facet(
                "facets/1-0-1/DatasetVersionDatasetFacet.json#/$defs/DatasetVersionDatasetFacet", datasetVersion=version
            )
        },
    }


def _fields(schema: object) -> Iterable[Json]:
    """The columns of MLflow's schemas: a list, or an object that has one or a tensor specification."""
    columns = schema.get("mlflow_colspec") if isinstance(schema, Mapping) else schema
    for column in columns if isinstance(columns, list) else ():
        if isinstance(column, Mapping) and isinstance(column.get("name"), str):
            yield {"name": column["name"]} | _given(type=str(column["type"]) if "type" in column else None)


def _uri(source: object) -> str:
    if isinstance(source, Mapping):
        for key in ("uri", "url", "path", "table_name", "name"):
            if isinstance(source.get(key), str):
                return str(source[key])
    return source if isinstance(source, str) else ""


def _uuid(run_id: str) -> str:
    try:
        return str(uuid.UUID(run_id))
    except ValueError:
        return str(uuid.uuid5(_IDS, run_id))


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _given(**fields: Any) -> Json:
    return {key: value for key, value in fields.items() if value is not None}
