"""Lineage in Postgres: through runs, logged models, pipelines and sub-pipelines, and after a purge."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from mlplat.errors import NotFound
from mlplat.lineage.keeper import LineageKeeper
from mlplat.lineage.model import Direction, Graph, Kind, Node, parse_node
from mlplat.lineage.store import LineageStore, Provenance
from mlplat.registry.model import CreateModel, CreateVersion
from mlplat.registry.service import RegistryService
from mlplat.tracking.datasets import DatasetStore
from mlplat.tracking.inputs import Dataset, DatasetInput, ModelOutput
from mlplat.tracking.logged_model import NewModel
from mlplat.tracking.logged_models import LoggedModelStore
from mlplat.tracking.purge import Scope
from tests.contract.chdb import unique
from tests.contract.lifecycle import World
from tests.registry import registry_service


@dataclass
class Family:
    """Stores with shorthands for what comes from what."""

    world: World
    registry: RegistryService
    experiment: int

    def __post_init__(self) -> None:
        self.lineage = LineageStore(self.world.records)
        self.datasets = DatasetStore(self.world.engine)
        self.models = LoggedModelStore(self.world.engine)

    async def run(self, **tags: str) -> str:
        run_id = await self.world.run(self.experiment)
        await self.world.runs.log(run_id, {}, tags)
        return run_id

    async def reads(self, run_id: str, name: str, digest: str, *feature_views: str) -> Node:
        """The run reads a dataset of 42 rows, through feature views."""
        data = Dataset(
            name, digest, "local", json.dumps({"uri": f"/data/{name}"}),
            json.dumps({"mlflow_colspec": [{"name": "x", "type": "double"}]}), json.dumps({"num_rows": 42}),
        )  # fmt: skip
        tags = {"mlflow.data.context": "training"} | {f"mlplat.featureView.{view}": "" for view in feature_views}
        await self.datasets.log_inputs(run_id, [DatasetInput(data, tags)], [])
        return Node(Kind.DATASET, f"{name}@{digest}")

    async def makes(self, run_id: str) -> str:
        """The run makes a logged model."""
        model_id = f"m-{uuid.uuid4().hex}"
        await self.models.create(model_id, NewModel(self.experiment, source_run_id=run_id))
        await self.datasets.log_outputs(run_id, [ModelOutput(model_id, 0)])
        return model_id

    async def version(self, source: str = "s3://b/m", name: str | None = None, **options: Any) -> Node:
        """A version, of a new model if no name is given."""
        if name is None:
            name = unique("model")
            await self.registry.execute(unique("key"), [CreateModel(name)])
        [answer] = await self.registry.execute(unique("key"), [CreateVersion(name, source, source, **options)])
        return Node(Kind.MODEL_VERSION, f"{name}/{answer['version']}")

    async def pipeline(self, steps: dict[str, Any], source: str = "") -> str:
        """A pipeline run with these steps, which are given as what each needs."""
        run_id, digest = unique("pipeline"), unique("digest")
        spec = {
            "name": "p", "steps": {name: {"uses": "m:f", "needs": needs} for name, needs in steps.items()},
        }  # fmt: skip
        await self.world.execute(
            "INSERT INTO pipeline (digest, name, spec) VALUES (:d, 'p', CAST(:s AS json))", d=digest, s=json.dumps(spec)
        )
        await self.world.execute(
            "INSERT INTO pipeline_run (run_id, digest, name, params, state, submitted_by, source) "
            "VALUES (:r, :d, 'p', '{}', 'SUCCEEDED', 'ann', :source)", r=run_id, d=digest, source=source,
        )  # fmt: skip
        return run_id

    async def tracked(self, pipeline_run: str, step: str) -> str:
        """A run that a step tracked."""
        return await self.run(**{"mlplat.pipelineRun": pipeline_run, "mlplat.step": step})

    async def up(self, node: Node) -> Graph:
        return await self.lineage.graph([node], Direction.UPSTREAM)

    async def down(self, node: Node) -> Graph:
        return await self.lineage.graph([node], Direction.DOWNSTREAM)

    async def provenance(self, version: Node) -> Provenance:
        name, number = version.parts
        return await self.lineage.provenance(name, int(number))

    async def purge(self, *run_ids: str) -> None:
        for run_id in run_ids:
            await self.world.runs.set_deleted(run_id, True)
        report = await self.world.lifecycle.purger.purge(Scope(timedelta(0), run_ids))
        assert report.runs == len(run_ids)


@pytest.fixture
async def family(world: World) -> AsyncIterator[Family]:
    registry = registry_service(world.engine)
    await registry.start()
    yield Family(world, registry, await world.experiment())
    await registry.stop()


def node(kind: Kind, id_: str) -> Node:
    return Node(kind, id_)


async def test_a_version_comes_from_its_run_and_the_data_that_it_read(family: Family) -> None:
    run_id = await family.run()
    data = await family.reads(run_id, "digits", "1f")
    version = await family.version(run_id=run_id)
    assert (await family.up(version)).nodes == {version: 0, node(Kind.RUN, run_id): 1, data: 2}
    assert (await family.down(data)).nodes == {data: 0, node(Kind.RUN, run_id): 1, version: 2}
    found = await family.provenance(version)
    assert found.run is not None
    assert (found.run.run_id, found.run.params, found.run.metrics) == (run_id, {"rate": "0.1"}, {"loss": 2.0})
    [use] = found.data
    assert (use.name, use.digest, use.rows, use.context, use.source) == (
        "digits", "1f", 42, "training", {"uri": "/data/digits"},
    )  # fmt: skip
    assert use.schema["mlflow_colspec"][0]["name"] == "x"


async def test_feature_views_are_told_in_both_directions(family: Family) -> None:
    first, second = await family.run(), await family.run()
    digest = unique("digest")
    await family.reads(first, "trips", digest, "driver_stats", "weather:v2", "")
    await family.reads(second, "trips", digest, "%", "_")
    versions = [await family.version(run_id=run_id) for run_id in (first, second)]
    stats, weather = node(Kind.FEATURE_VIEW, "driver_stats"), node(Kind.FEATURE_VIEW, "weather:v2")
    assert {stats, weather} == set((await family.up(versions[0])).of_kind(Kind.FEATURE_VIEW))
    assert versions[0] in (await family.down(stats)).nodes
    assert versions[1] not in (await family.down(stats)).nodes
    assert versions[0] not in (await family.down(node(Kind.FEATURE_VIEW, "%"))).nodes
    assert (await family.provenance(versions[0])).data[0].feature_views == ["driver_stats", "weather:v2"]
    third = await family.version(f"models:/{versions[1].id}", run_id=first)
    assert (await family.provenance(third)).data[0].feature_views == ["%", "_", "driver_stats", "weather:v2"]
    await family.purge(first)
    assert versions[0] in (await family.down(weather)).nodes
    assert (await family.provenance(versions[0])).data[0].feature_views == ["driver_stats", "weather:v2"]


async def test_data_that_a_run_wrote_leads_to_it(family: Family) -> None:
    wrote, read = await family.run(), await family.run()
    raw = await family.reads(wrote, "raw", unique("digest"))
    source = json.dumps({"uri": f"mlplat://{wrote}/data/clean.parquet"})
    clean = Dataset("clean", unique("digest"), "mlplat", source)
    await family.datasets.log_inputs(
        read, [DatasetInput(clean), DatasetInput(Dataset("own", "1", "mlplat", source))], []
    )
    long = Dataset("long", "1", "mlplat", f"mlplat://{'x' * 9_000}")
    await family.datasets.log_inputs(read, [DatasetInput(long)], [])
    version = await family.version(run_id=read)
    found = await family.up(version)
    assert {raw, node(Kind.DATASET, f"clean@{clean.digest}"), node(Kind.RUN, wrote)} <= found.nodes.keys()
    assert version in (await family.down(raw)).nodes
    await family.purge(wrote)
    assert raw in (await family.up(version)).nodes
    assert version in (await family.down(raw)).nodes


async def test_feature_views_of_a_dataset_that_the_run_has_read_already_are_added(family: Family) -> None:
    run_id, digest = await family.run(), unique("digest")
    await family.reads(run_id, "trips", digest)
    await family.reads(run_id, "trips", digest, "driver_stats")
    version = await family.version(run_id=run_id)
    assert (await family.provenance(version)).data[0].feature_views == ["driver_stats"]


async def test_the_way_leads_through_logged_models_and_earlier_versions(family: Family) -> None:
    first = await family.run()
    data = await family.reads(first, "base", unique("digest"))
    model = await family.makes(first)
    base = await family.version(f"models:/{model}")
    tuned = await family.run()
    await family.datasets.log_inputs(tuned, [], [model])
    version = await family.version(run_id=tuned)
    copy = await family.version(f"models:/{version.id}")
    assert {base, version, copy} <= (await family.down(data)).nodes.keys()
    assert {data, version, node(Kind.LOGGED_MODEL, model)} <= (await family.up(copy)).nodes.keys()
    assert (await family.provenance(copy)).parents == [version.id]


async def test_a_version_whose_source_alone_names_the_run_comes_from_it(family: Family) -> None:
    run_id = await family.run()
    version = await family.version(f"runs:/{run_id}/model", source_run_id=run_id)
    assert node(Kind.RUN, run_id) in (await family.up(version)).nodes
    assert version in (await family.down(node(Kind.RUN, run_id))).nodes


async def test_a_child_comes_from_its_parent_and_not_from_its_siblings(family: Family) -> None:
    parent = await family.run()
    data = await family.reads(parent, "digits", unique("digest"))
    trials = [await family.run(**{"mlflow.parentRunId": parent}) for _ in range(3)]
    version = await family.version(run_id=trials[0])
    found = (await family.up(version)).nodes
    assert set(found) == {version, node(Kind.RUN, trials[0]), node(Kind.RUN, parent), data}
    assert version in (await family.down(data)).nodes


async def test_the_way_leads_through_the_steps_of_a_pipeline(family: Family) -> None:
    pipeline = await family.pipeline({"load": [], "other": [], "split": ["load"], "train": ["split"]})
    load, other, train = [await family.tracked(pipeline, step) for step in ("load", "other", "train")]
    data = await family.reads(load, "digits", unique("digest"))
    unrelated = await family.reads(other, "letters", unique("digest"))
    version = await family.version(run_id=train)
    up = await family.up(version)
    assert {data, node(Kind.STEP, f"{pipeline}/split"), node(Kind.RUN, load)} <= up.nodes.keys()
    assert unrelated not in up.nodes
    assert version in (await family.down(data)).nodes
    assert version not in (await family.down(unrelated)).nodes
    found = await family.provenance(version)
    assert [(each.run_id, each.submitted_by) for each in found.pipelines] == [(pipeline, "ann")]
    assert [run.run_id for run in found.runs] == [train, load]
    assert (found.runs[0].pipeline_run, found.runs[0].step) == (pipeline, "train")


async def test_the_way_leads_into_and_out_of_sub_pipelines(family: Family) -> None:
    outer = await family.pipeline({"load": [], "inner": ["load"], "train": ["inner"]})
    inner = await family.pipeline({"clean": [], "join": ["clean"]}, source=f"step:{outer}/inner/-1/1")
    await family.world.execute(
        "INSERT INTO attempt (run_id, step, item, attempt, state, child_id, queued_at) "
        "VALUES (:outer, 'inner', -1, 1, 'SUCCEEDED', :inner, now())", outer=outer, inner=inner,
    )  # fmt: skip
    load, clean, train = (
        await family.tracked(outer, "load"),
        await family.tracked(inner, "clean"),
        await family.tracked(outer, "train"),
    )
    first = await family.reads(load, "raw", unique("digest"))
    second = await family.reads(clean, "more", unique("digest"))
    version = await family.version(run_id=train)
    assert {first, second} <= (await family.up(version)).nodes.keys()
    for data in (first, second):
        assert version in (await family.down(data)).nodes
    assert first in (await family.up(node(Kind.RUN, clean))).nodes


async def test_a_step_whose_output_was_reused_leads_to_the_run_that_made_it(family: Family) -> None:
    first, second = [await family.pipeline({"load": [], "train": ["load"]}) for _ in range(2)]
    data = await family.reads(await family.tracked(first, "load"), "digits", unique("digest"))
    await family.world.execute(
        "INSERT INTO step_run (run_id, step, item, state, reused_from) VALUES (:r, 'load', -1, 'SUCCEEDED', :o)",
        r=second, o=first,
    )  # fmt: skip
    version = await family.version(run_id=await family.tracked(second, "train"))
    assert data in (await family.up(version)).nodes
    assert version in (await family.down(data)).nodes


async def test_up_and_down_are_the_same_edges(family: Family) -> None:
    pipeline = await family.pipeline({"load": [], "train": ["load"]})
    load, train = await family.tracked(pipeline, "load"), await family.tracked(pipeline, "train")
    data = await family.reads(load, "digits", unique("digest"))
    model = await family.makes(train)
    version = await family.version(f"models:/{model}", run_id=train)
    up, down = await family.up(version), await family.down(data)
    assert up.edges <= down.edges
    assert {edge for edge in down.edges if edge.upstream in up.nodes and edge.downstream in up.nodes} == up.edges


async def test_the_lineage_of_a_version_outlives_its_runs(family: Family) -> None:
    pipeline = await family.pipeline({"load": [], "train": ["load"]})
    load, train = await family.tracked(pipeline, "load"), await family.tracked(pipeline, "train")
    digest = unique("digest")
    data = await family.reads(load, "digits", digest)
    model = await family.makes(train)
    version = await family.version(f"models:/{model}", run_id=train)
    before, told = await family.up(version), await family.provenance(version)
    await family.purge(load, train)
    after, kept = await family.up(version), await family.provenance(version)
    assert before.edges <= after.edges
    assert version in (await family.down(data)).nodes
    assert [run.run_id for run in kept.runs] == [run.run_id for run in told.runs]
    assert all(run.purged_at is not None for run in kept.runs)
    assert (kept.runs[0].params, kept.runs[0].metrics) == (told.runs[0].params, told.runs[0].metrics)
    assert kept.data == told.data
    found = await family.lineage.versions_of_dataset(digest)
    assert found.of_kind(Kind.MODEL_VERSION) == [version]


async def test_runs_from_which_no_version_came_leave_nothing(family: Family) -> None:
    run_id = await family.run()
    await family.reads(run_id, "digits", unique("digest"))
    await family.makes(run_id)
    await family.purge(run_id)
    assert await family.world.count("lineage_run") == 0
    assert await family.world.count("lineage_edge") == 0


async def test_a_record_that_is_kept_stays_as_it_is_when_the_purge_begins_again(family: Family) -> None:
    run_id = await family.run()
    version = await family.version(run_id=run_id)
    await LineageKeeper(family.world.records).keep_runs([run_id])
    await family.world.runs.log(run_id, {"later": "1"}, {})
    await family.purge(run_id)
    assert (await family.provenance(version)).runs[0].params == {"rate": "0.1"}


async def test_the_lineage_outlives_the_experiment_and_its_logged_models(family: Family) -> None:
    run_id = await family.run()
    data = await family.reads(run_id, "digits", unique("digest"))
    model = await family.makes(run_id)
    # The files of the version are its own, so that the experiment can go.
    version = await family.version(f"models:/{model}")
    await family.world.experiments.set_deleted(family.experiment, True)
    await family.world.lifecycle.purger.purge(Scope(timedelta(0), None, (family.experiment,)))
    assert await family.world.count(f"experiment WHERE experiment_id = {family.experiment}") == 0
    assert data in (await family.up(version)).nodes
    assert version in (await family.down(data)).nodes


async def test_what_nobody_knows_is_not_found(family: Family) -> None:
    with pytest.raises(NotFound):
        await family.up(parse_node("model-version:nobody/1"))
    with pytest.raises(NotFound):
        await family.lineage.versions_of_dataset(unique("digest"))
    alone = node(Kind.RUN, "nobody")
    assert (await family.up(alone)).nodes == {alone: 0}


async def test_a_run_that_nobody_knows_is_named_and_no_more(family: Family) -> None:
    version = await family.version(run_id="gone")
    found = await family.provenance(version)
    assert (found.run, found.runs) == (None, [])
    assert node(Kind.RUN, "gone") in found.graph.nodes
