"""Datasets and logged models in Postgres: what holds when runs move and experiments go."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.tables import dataset, experiment, run
from mlplat.errors import InvalidInput, NotFound
from mlplat.tracking.datasets import DatasetStore, move_links
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.inputs import Dataset, DatasetInput, ModelOutput
from mlplat.tracking.logged_model import LoggedModelStatus, ModelMetric, NewModel
from mlplat.tracking.logged_models import LoggedModelStore
from mlplat.tracking.runs import RunStore

STARTED = datetime(2026, 1, 1, tzinfo=UTC)


def _input(name: str, **fields: str) -> DatasetInput:
    return DatasetInput(Dataset(name, "1", "local", "here", **fields), {"mlflow.data.context": "train"})


class Stores:
    """All stores of tracking on one database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.experiments = ExperimentStore(engine, "mlflow-artifacts:")
        self.runs = RunStore(engine)
        self.datasets = DatasetStore(engine)
        self.models = LoggedModelStore(engine)

    async def experiment(self) -> int:
        """A new experiment."""
        return await self.experiments.create(uuid.uuid4().hex, None, {})

    async def run(self, experiment_id: int) -> str:
        """A new run."""
        return (await self.runs.create(uuid.uuid4().hex, experiment_id, None, "", STARTED, {})).run_id

    async def model(self, experiment_id: int, run_id: str | None = None) -> str:
        """A new logged model."""
        new = NewModel(experiment_id, source_run_id=run_id)
        return (await self.models.create(f"m-{uuid.uuid4().hex}", new)).model_id

    async def move(self, run_id: str, experiment_id: int) -> None:
        """Moves a run as its mover does."""
        async with self.engine.begin() as connection:
            await connection.execute(update(run).where(run.c.run_id == run_id).values(experiment_id=experiment_id))
            await move_links(connection, [run_id], experiment_id)

    async def purge(self, experiment_id: int) -> None:
        """Removes an experiment for good."""
        async with self.engine.begin() as connection:
            await connection.execute(delete(run).where(run.c.experiment_id == experiment_id))
            await connection.execute(delete(experiment).where(experiment.c.experiment_id == experiment_id))

    async def dataset_count(self, experiment_id: int) -> int:
        """How many datasets an experiment has."""
        query = select(func.count()).select_from(dataset).where(dataset.c.experiment_id == experiment_id)
        async with self.engine.connect() as connection:
            return int((await connection.execute(query)).scalar_one())


@pytest.fixture
def stores(engine: AsyncEngine) -> Stores:
    """Stores on the test's own database."""
    return Stores(engine)


async def test_links_survive_the_experiment_that_their_run_left(stores: Stores) -> None:
    old, new = await stores.experiment(), await stores.experiment()
    moved, stays = await stores.run(old), await stores.run(old)
    teacher, student = await stores.model(new), await stores.model(old, moved)
    for run_id in (moved, stays):
        await stores.datasets.log_inputs(run_id, [_input("b", schema="s"), _input("a")], [teacher])
    await stores.datasets.log_outputs(moved, [ModelOutput(student, 3)])
    before = (await stores.runs.get(moved)).links
    await stores.move(moved, new)
    assert (await stores.runs.get(moved)).links == before
    assert (await stores.models.get(student)).experiment_id == new
    assert (await stores.runs.get(stays)).links.datasets == before.datasets
    await stores.purge(old)
    assert (await stores.runs.get(moved)).links == before
    assert [summary.name for summary in await stores.datasets.summaries([new])] == ["a", "b"]


async def test_a_dataset_that_the_new_experiment_knows_is_shared(stores: Stores) -> None:
    old, new = await stores.experiment(), await stores.experiment()
    moved, there = await stores.run(old), await stores.run(new)
    await stores.datasets.log_inputs(moved, [_input("d", schema="old")], [])
    await stores.datasets.log_inputs(there, [_input("d", schema="new")], [])
    for _repeat in range(2):
        await stores.move(moved, new)
    assert await stores.dataset_count(new) == 1
    [found] = (await stores.runs.get(moved)).links.datasets
    assert found.dataset.schema == "new"


async def test_a_model_outlives_its_run_but_not_its_experiment(stores: Stores) -> None:
    number = await stores.experiment()
    run_id = await stores.run(number)
    model_id = await stores.model(number, run_id)
    await stores.models.log_metrics([ModelMetric(model_id, run_id, "m", 1.0, 1, 0)])
    async with stores.engine.begin() as connection:
        await connection.execute(delete(run).where(run.c.run_id == run_id))
    found = await stores.models.get(model_id)
    assert (found.source_run_id, found.metrics) == (run_id, ())
    await stores.purge(number)
    with pytest.raises(NotFound, match="not found"):
        await stores.models.get(model_id, allow_deleted=True)


async def test_creating_again_under_one_id_gives_the_model_that_is_there(stores: Stores) -> None:
    number = await stores.experiment()
    first = await stores.models.create("m-1", NewModel(number, "a", params={"p": "1"}))
    await stores.models.finalize("m-1", LoggedModelStatus.READY)
    again = await stores.models.create("m-1", NewModel(number, "b", params={"p": "2"}))
    assert (again.name, again.params, again.status) == (first.name, {"p": "1"}, LoggedModelStatus.READY)
    with pytest.raises(InvalidInput, match="for finalization"):
        await stores.models.finalize("m-1", LoggedModelStatus.PENDING)
