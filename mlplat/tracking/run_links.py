"""Reads of what goes into runs and comes out of them: one statement for datasets, one for models."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, exists, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from mlplat.db.tables import dataset, run, run_input, run_model
from mlplat.tracking.inputs import INPUT, OUTPUT, Dataset, DatasetInput, ModelOutput, RunLinks

#: A column of a query of ``run``: most runs have no links, and whoever loads them need not ask for any then.
HAS_LINKS: ColumnElement[bool] = or_(
    exists().where(run_input.c.run_id == run.c.run_id), exists().where(run_model.c.run_id == run.c.run_id)
).label("has_links")


async def load_links(connection: AsyncConnection, run_ids: Sequence[str]) -> dict[str, RunLinks]:
    """The links of the runs that have any, by run id."""
    if not run_ids:
        return {}
    datasets: dict[str, list[DatasetInput]] = {}
    models: dict[tuple[str, str], list[ModelOutput]] = {}
    inputs = (
        select(run_input.c.run_id, run_input.c.tags, dataset)
        .join(dataset, dataset.c.dataset_id == run_input.c.dataset_id)
        .where(run_input.c.run_id.in_(run_ids))
        .order_by(run_input.c.position)
    )
    for row in (await connection.execute(inputs)).all():
        found = Dataset(row.name, row.digest, row.source_type, row.source, row.schema, row.profile)
        datasets.setdefault(row.run_id, []).append(DatasetInput(found, row.tags))
    links = select(run_model).where(run_model.c.run_id.in_(run_ids)).order_by(run_model.c.position)
    for row in (await connection.execute(links)).all():
        models.setdefault((row.run_id, row.direction), []).append(ModelOutput(row.model_id, row.step))
    return {
        run_id: RunLinks(
            tuple(datasets.get(run_id, ())),
            tuple(model.model_id for model in models.get((run_id, INPUT), ())),
            tuple(models.get((run_id, OUTPUT), ())),
        )
        for run_id in run_ids
    }
