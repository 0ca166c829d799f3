"""Where the fields of each searchable kind live in Postgres."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Column, ColumnElement, Table, Text, cast, func
from sqlalchemy.types import DOUBLE_PRECISION

from mlplat.db.tables import experiment, experiment_tag, run, run_param, run_tag
from mlplat.tracking.fields import Entity
from mlplat.tracking.paging import Kind


@dataclass(frozen=True)
class Term:
    """One key of an order: missing values come last in both directions."""

    value: ColumnElement[Any]
    ascending: bool
    kind: Kind
    nullable: bool = False

    @property
    def clause(self) -> ColumnElement[Any]:
        """The ORDER BY term."""
        directed = self.value.asc() if self.ascending else self.value.desc()
        return directed.nulls_last() if self.nullable else directed


@dataclass(frozen=True)
class Tables:
    """Where the fields of one searchable kind live.

    Args:
        identity: the columns that name a row, which ``pairs`` have too.
        attributes: what a filter compares, by attribute.
        pairs: the tables ``(…identity, key, value)`` of params and tags.
        ties: what decides between equals, down to one row.
        ordered: what an order uses, where that is not what a filter compares.
        nullable: attributes that may be missing.
        run: the column that names the run whose metrics, params and datasets count; None: the row is a run itself.
        many: attributes of which a row may have any number, in tables that have the identity's columns.
    """

    identity: tuple[Column[Any], ...]
    attributes: Mapping[str, ColumnElement[Any]]
    pairs: Mapping[Entity, Table]
    ties: tuple[Term, ...]
    ordered: Mapping[str, Sequence[ColumnElement[Any]]] = field(default_factory=dict)
    nullable: frozenset[str] = frozenset()
    run: Column[Any] | None = None
    many: Mapping[str, Column[Any]] = field(default_factory=dict)

    def owner(self, entity: Entity) -> tuple[Column[Any], ...]:
        """The columns that tell whose an entry (a param, a tag, a dataset, one of many) is."""
        if self.run is None or entity in {Entity.TAG, Entity.ATTRIBUTE}:
            return self.identity
        return (self.run,)


RUNS = Tables(
    identity=(run.c.run_id,),
    attributes={
        "run_id": run.c.run_id,
        "run_name": run.c.name,
        "status": run.c.status,
        "user_id": run.c.user_id,
        "artifact_uri": run.c.artifact_uri,
        "start_time": run.c.started_at,
        "end_time": run.c.ended_at,
        "duration": cast(func.extract("epoch", run.c.ended_at - run.c.started_at), DOUBLE_PRECISION),
    },
    pairs={Entity.PARAM: run_param, Entity.TAG: run_tag},
    ties=(Term(run.c.started_at, False, Kind.TIME), Term(run.c.run_id, True, Kind.TEXT)),
    nullable=frozenset({"end_time", "duration"}),
)

EXPERIMENTS = Tables(
    identity=(experiment.c.experiment_id,),
    attributes={
        "name": experiment.c.name,
        "experiment_id": cast(experiment.c.experiment_id, Text),
        # Callers see milliseconds.
        "creation_time": func.date_trunc("milliseconds", experiment.c.created_at),
        "last_update_time": func.date_trunc("milliseconds", experiment.c.updated_at),
    },
    pairs={Entity.TAG: experiment_tag},
    ties=(
        Term(experiment.c.created_at, False, Kind.TIME),
        Term(experiment.c.experiment_id, False, Kind.NUMBER),
    ),
    ordered={
        "experiment_id": (experiment.c.experiment_id,),
        "creation_time": (experiment.c.created_at,),
        "last_update_time": (experiment.c.updated_at,),
    },
)
