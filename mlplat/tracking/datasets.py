"""Datasets in Postgres, and what goes into runs and comes out of them.

Contract: a dataset is identified by experiment, name and digest; whoever logs it first decides its
source, schema and profile. A run has one link to a dataset or model, however often it is logged; later
tags of such a link are added, and change none. One call is one transaction, and repeating it is harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import BigInteger, literal, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from mlplat.db.tables import dataset, logged_model, run_input, run_model
from mlplat.tracking.inputs import (
    DATASET_CONTEXT_TAG,
    INPUT,
    OUTPUT,
    DatasetInput,
    ModelOutput,
    check_count,
    unique_inputs,
)
from mlplat.tracking.logged_models import require_models
from mlplat.tracking.runs import require_active

MAX_SUMMARIES = 1_000


@dataclass(frozen=True)
class DatasetSummary:
    """A dataset as it was used: ``context`` is None when no use says what for."""

    experiment_id: int
    name: str
    digest: str
    context: str | None


class DatasetStore:
    """All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def log_inputs(self, run_id: str, inputs: Sequence[DatasetInput], model_ids: Sequence[str]) -> None:
        """Links datasets and logged models to the run that read them.

        Raises:
            NotFound: no such run or model.
            InvalidInput: the run is deleted, or a dataset is malformed.
        """
        unique = unique_inputs(inputs)
        check_count("models", len(model_ids))
        async with self._engine.begin() as connection:
            ref = await require_active(connection, run_id)
            if unique:
                await _link_datasets(connection, run_id, ref.experiment_id, unique)
            await _link_models(connection, run_id, INPUT, [ModelOutput(model_id, 0) for model_id in model_ids])

    async def log_outputs(self, run_id: str, outputs: Sequence[ModelOutput]) -> None:
        """Links logged models to the run that made them; a model that is linked already takes the new step.

        Raises:
            NotFound: no such run or model.
            InvalidInput: the run is deleted.
        """
        check_count("models", len(outputs))
        async with self._engine.begin() as connection:
            await require_active(connection, run_id)
            await _link_models(connection, run_id, OUTPUT, outputs)

    async def summaries(self, experiment_ids: Sequence[int]) -> list[DatasetSummary]:
        """The datasets that runs of the experiments' read, at most ``MAX_SUMMARIES``, by name."""
        context = run_input.c.tags[DATASET_CONTEXT_TAG].astext.label("context")
        columns = dataset.c.experiment_id, dataset.c.name, dataset.c.digest, context
        query = (
            select(*columns)
            .join(run_input, run_input.c.dataset_id == dataset.c.dataset_id)
            .where(dataset.c.experiment_id.in_(experiment_ids))
            .distinct()
            .order_by(*columns)
            .limit(MAX_SUMMARIES)
        )
        async with self._engine.connect() as connection:
            return [DatasetSummary(*row) for row in (await connection.execute(query)).all()]


async def move_links(connection: AsyncConnection, run_ids: Sequence[str], experiment_id: int) -> None:
    """Takes the datasets and models of runs along that move to another experiment, inside of that transaction.

    A dataset that other runs use too is there twice afterwards; one that the experiment knows is shared.
    """
    old, new = dataset.alias("old"), dataset.alias("new")
    linked = run_input.c.run_id.in_(run_ids)
    copied = ("name", "digest", "source_type", "source", "schema", "profile")
    copies = (
        select(literal(experiment_id, BigInteger), *(old.c[name] for name in copied))
        .join(run_input, run_input.c.dataset_id == old.c.dataset_id)
        .where(linked, old.c.experiment_id != experiment_id)
        .order_by(old.c.name, old.c.digest, old.c.dataset_id)
    )
    await connection.execute(upsert(dataset).from_select(["experiment_id", *copied], copies).on_conflict_do_nothing())
    same = [old.c.name == new.c.name, old.c.digest == new.c.digest, new.c.experiment_id == experiment_id]
    await connection.execute(
        update(run_input)
        .where(linked, run_input.c.dataset_id == old.c.dataset_id, old.c.experiment_id != experiment_id, *same)
        .values(dataset_id=new.c.dataset_id)
    )
    mine = logged_model.c.source_run_id.in_(run_ids)
    await connection.execute(update(logged_model).where(mine).values(experiment_id=experiment_id))


async def _link_datasets(
    connection: AsyncConnection, run_id: str, experiment_id: int, inputs: Sequence[DatasetInput]
) -> None:
    # In one order, whoever comes: two requests that insert the same datasets could wait for one another.
    ordered = sorted((one.dataset for one in inputs), key=lambda found: (found.name, found.digest))
    rows = [
        {"experiment_id": experiment_id, "name": found.name, "digest": found.digest, "source": found.source,
         "source_type": found.source_type, "schema": found.schema, "profile": found.profile}
        for found in ordered
    ]  # fmt: skip
    await connection.execute(upsert(dataset).values(rows).on_conflict_do_nothing())
    names = [(found.name, found.digest) for found in ordered]
    query = select(dataset.c.name, dataset.c.digest, dataset.c.dataset_id).where(
        dataset.c.experiment_id == experiment_id, tuple_(dataset.c.name, dataset.c.digest).in_(names)
    )
    ids = {(row.name, row.digest): row.dataset_id for row in (await connection.execute(query)).all()}
    links = [
        {"run_id": run_id, "dataset_id": ids[one.dataset.name, one.dataset.digest], "tags": one.tags} for one in inputs
    ]
    linking = upsert(run_input).values(links)
    added = linking.excluded.tags.op("||")(run_input.c.tags)
    same = ["run_id", "dataset_id"]
    await connection.execute(linking.on_conflict_do_update(index_elements=same, set_={"tags": added}))


async def _link_models(
    connection: AsyncConnection, run_id: str, direction: str, outputs: Sequence[ModelOutput]
) -> None:
    steps = {output.model_id: output.step for output in outputs}
    if not steps:
        return
    await require_models(connection, list(steps))
    rows = [
        {"run_id": run_id, "direction": direction, "model_id": model_id, "step": step}
        for model_id, step in steps.items()
    ]
    statement = upsert(run_model).values(rows)
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=["run_id", "direction", "model_id"], set_={"step": statement.excluded.step}
        )
    )
