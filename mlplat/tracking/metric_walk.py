"""Metric tests of a search whose order is in Postgres.

Postgres walks the rows in order, and the metric store says which of them pass. Where so few do that a page needs many
more, it is asked for all runs that pass instead: it answers with one text of ids, which Postgres takes as a set.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from mlplat.metrics import ranking
from mlplat.metrics.queries import Statement
from mlplat.metrics.ranking import MetricTest
from mlplat.tracking.fields import Entity
from mlplat.tracking.paging import SortValue
from mlplat.tracking.search import AllOf, Comparison, Predicate, comparisons, conjuncts


class MetricReader(Protocol):
    """Reads of the metric store that see every acknowledged point."""

    async def query(self, statement: Statement) -> pa.Table:
        """The statement's rows."""
        ...


class Walked(Protocol):
    """A row that a walk has come by."""

    @property
    def run_id(self) -> str:
        """The run whose metrics count."""
        ...

    @property
    def values(self) -> list[SortValue]:
        """Its place in the order."""
        ...


R = TypeVar("R", bound=Walked)
R_co = TypeVar("R_co", bound=Walked, covariant=True)


class Rows(Protocol[R_co]):
    """Rows of Postgres in their order."""

    async def __call__(self, cursor: list[SortValue] | None, limit: int, passing: str | None = None) -> Sequence[R_co]:
        """The first ones after a cursor; ``passing``: only of these runs, joined as metric comparisons have them."""
        ...


async def ask(reader: MetricReader, statement: Statement) -> dict[str, Any]:
    """A statement's only row."""
    [row] = (await reader.query(statement)).to_pylist()
    return dict(row)


def is_metric(part: object) -> bool:
    """Whether it is a comparison of a metric."""
    return isinstance(part, Comparison) and part.field.entity is Entity.METRIC


def metric_test(part: object) -> MetricTest:
    """For the metric store."""
    assert isinstance(part, Comparison)
    value: Any = part.value
    return MetricTest(part.field.key, part.field.aggregate, part.comparator, value)


def split_tests(predicate: Predicate) -> tuple[list[MetricTest], AllOf]:
    """The metric tests that must hold together, and the rest."""
    parts = conjuncts(predicate)
    tests = [metric_test(part) for part in parts if is_metric(part)]
    return tests, AllOf(tuple(part for part in parts if not is_metric(part)))


async def runs_of_comparisons(
    reader: MetricReader, experiment_ids: Sequence[int] | None, predicate: Predicate
) -> dict[Comparison, str]:
    """The runs, in these experiments or in all, that pass each metric comparison of a tree."""
    wanted = list({found for found in comparisons(predicate) if is_metric(found)})
    statements = [ranking.matching(experiment_ids, [metric_test(found)]) for found in wanted]
    answers = await asyncio.gather(*(ask(reader, statement) for statement in statements))
    return {found: answer["run_ids"] for found, answer in zip(wanted, answers, strict=True)}


async def walk(
    reader: MetricReader,
    rows: Rows[R],
    experiment_ids: Sequence[int] | None,
    tests: Sequence[MetricTest],
    cursor: list[SortValue] | None,
    limit: int,
    max_tested: int,
) -> list[R]:
    """The first rows after the cursor whose runs pass all the tests.

    Up to ``max_tested`` runs at a time are tested by name.
    """
    hits: list[R] = []
    seen, size = 0, 2 * limit
    while size <= max_tested:
        walked = await rows(cursor, size)
        hits += await _passing(reader, walked, tests)
        if len(hits) >= limit or len(walked) < size:
            return hits[:limit]
        cursor, seen = walked[-1].values, seen + size
        size = max(seen // 4, math.ceil(1.25 * seen * (limit - len(hits)) / max(len(hits), 1)))
    passing = (await ask(reader, ranking.matching(experiment_ids, tests)))["run_ids"]
    return hits + list(await rows(cursor, limit - len(hits), passing))


async def _passing(reader: MetricReader, walked: Iterable[R], tests: Sequence[MetricTest]) -> list[R]:
    run_ids = list(dict.fromkeys(row.run_id for row in walked))
    if not run_ids:
        return []
    answer = await ask(reader, ranking.passing(run_ids, tests))
    passing = set(answer["run_ids"].split(ranking.SEPARATOR))
    return [row for row in walked if row.run_id in passing]
