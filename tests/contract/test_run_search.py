"""Run search over real Postgres and real chDB."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import InvalidInput
from mlplat.metrics.model import Point
from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.model import RunStatus, ViewType, to_ms
from mlplat.tracking.run_search import FoundRun, search_runs
from mlplat.tracking.runs import RunStore
from tests.contract.chdb import stored, unique, unique_number
from tests.contract.databases import own_database

START = datetime(2025, 1, 1, tzinfo=UTC)
START_MS = to_ms(START)
HOUR_MS = 3_600_000
HOSTILE = "'; DROP TABLE run; --"


@dataclass(frozen=True)
class Reader:
    """Reads of the metric store."""

    store: MetricStore

    async def query(self, statement: Statement) -> pa.Table:
        """The statement's rows."""
        return await asyncio.to_thread(self.store.query, statement)


@dataclass(frozen=True)
class Dataset:
    """Some runs, by short names."""

    runs: RunStore
    reader: Reader
    experiment: int
    other_experiment: int
    ids: dict[str, str]

    async def find(
        self,
        filter_text: str = "",
        *orders: str,
        view: ViewType = ViewType.ACTIVE_ONLY,
        limit: int = 100,
        offset: int = 0,
        experiments: Sequence[int] | None = None,
    ) -> list[FoundRun]:
        """The found runs."""
        inside = [self.experiment] if experiments is None else experiments
        return await search_runs(self.runs, self.reader, inside, filter_text, orders, view, limit, offset)

    async def names(self, filter_text: str = "", *orders: str, view: ViewType = ViewType.ACTIVE_ONLY) -> list[str]:
        """Short names of the found runs, in their order."""
        by_id = {run_id: name for name, run_id in self.ids.items()}
        return [by_id[found.run.run_id] for found in await self.find(filter_text, *orders, view=view)]


@dataclass(frozen=True)
class Spec:
    """One run of the dataset, ``hours`` after the start."""

    short: str
    name: str
    hours: int
    status: RunStatus
    user: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    ended: bool = False


SPECS = (
    Spec("a", "alpha", 0, RunStatus.FINISHED, "ann", {"lr": "0.1", "model": "cnn"}, {"team": "red"},
         {"acc": 0.5, "loss": 1.0}, True),
    Spec("b", "Beta", 1, RunStatus.RUNNING, "ann", {"lr": "0.2"}, {"team": "blue"}, {"acc": 0.9, "loss": math.nan}),
    Spec("c", "ga%m_ma", 2, RunStatus.FAILED, "bob", {"model": "CNN"}, {}, {"acc": math.nan}, True),
    Spec("d", "delta", 3, RunStatus.FINISHED, "bob", {}, {"team": "red", "odd key.with/chars:x": "1"},
         {"acc": math.inf, "val acc/top-5": 3.0}, True),
    Spec("e", "epsilon", 4, RunStatus.KILLED, "", {"empty": ""}, {"note": "O\"Neil"}, {}),
    Spec("f", HOSTILE, 5, RunStatus.RUNNING, HOSTILE, {"lr": HOSTILE}, {"team": "a\\b"}, {"acc": -math.inf}),
)  # fmt: skip


@pytest.fixture(scope="module")
async def dataset(template_url: str, state_dir: Path, metric_store: MetricStore) -> AsyncIterator[Dataset]:
    """Six active runs, one deleted, one in another experiment."""
    async with own_database(template_url, state_dir) as engine:
        yield await _build(engine, metric_store)


async def _build(engine: AsyncEngine, metric_store: MetricStore) -> Dataset:
    experiments, runs = ExperimentStore(engine, "mlflow-artifacts:"), RunStore(engine)
    # The numbers are shared with the other tests' chDB, so they must be unusual.
    async with engine.begin() as connection:
        start = unique_number()
        await connection.exec_driver_sql(f"ALTER SEQUENCE experiment_experiment_id_seq RESTART WITH {start}")
    inside, outside = await experiments.create("one", None, {}), await experiments.create("two", None, {})
    ids: dict[str, str] = {}
    extra = Spec("x", "deleted", 6, RunStatus.RUNNING, "", {}, {"team": "red"}, {"acc": 0.7})
    other = Spec("o", "other", 7, RunStatus.RUNNING, "", {}, {"team": "red"}, {"acc": 0.99})
    for spec in (*SPECS, extra, other):
        experiment = outside if spec is other else inside
        run_id = ids[spec.short] = unique(spec.short)
        started = START + timedelta(hours=spec.hours)
        await runs.create(run_id, experiment, spec.name, spec.user, started, spec.tags)
        await runs.log(run_id, spec.params, {})
        ended = started + timedelta(minutes=1) if spec.ended else None
        await runs.update(run_id, spec.status, ended, None)
        points = [Point(key, value, 1, 2) for key, value in spec.metrics.items()]
        points += [Point(key, 0.55, 1, 1) for key in spec.metrics]  # an earlier value, which must not count
        if points:
            metric_store.insert(stored(experiment, run_id, points))
    await runs.set_deleted(ids["x"], True)
    return Dataset(runs, Reader(metric_store), inside, outside, ids)


@pytest.mark.parametrize(
    ("filter_text", "expected"),
    [
        ("", "abcdef"),
        # params
        ("params.lr = '0.1'", "a"),
        ("params.lr != '0.1'", "bf"),
        ('parameter.lr = "0.2"', "b"),
        ("param.model LIKE 'c%'", "a"),
        ("param.model ILIKE 'c%'", "ac"),
        ("params.model IS NULL", "bdef"),
        ("params.model IS NOT NULL", "ac"),
        ("params.lr IN ('0.1', '0.2')", "ab"),
        ("params.lr NOT IN ('0.1', '0.2')", "f"),
        ("params.empty = ''", "e"),
        ("params.nobody = 'x'", ""),
        # tags
        ("tags.team = 'red'", "ad"),
        ("tag.team != 'red'", "bf"),
        ("tags.team LIKE '%e%'", "abd"),
        ("tags.`odd key.with/chars:x` = '1'", "d"),
        ('tags."odd key.with/chars:x" = "1"', "d"),
        ("tags.mlflow.runName = 'alpha'", "a"),
        ("tags.note = 'O\"Neil'", "e"),
        ("tags.team IS NULL", "ce"),
        # attributes
        ("run_name = 'alpha'", "a"),
        ("attributes.run_name ILIKE 'BETA'", "b"),
        ("attr.`run name` LIKE 'ga\\%m\\_ma'", "c"),
        ("run_name LIKE '%a'", "abcd"),
        ("status = 'FINISHED'", "ad"),
        ("run.status != 'FINISHED'", "bcef"),
        ("status IN ('FAILED', 'KILLED')", "ce"),
        ("user_id = 'ann'", "ab"),
        ("user_id = ''", "e"),
        (f"start_time > {START_MS + HOUR_MS}", "cdef"),
        (f"created <= {START_MS + HOUR_MS}", "ab"),
        (f"start_time = {START_MS}", "a"),
        (f"attributes.end_time >= {START_MS + 2 * HOUR_MS}", "cd"),
        (f"end_time < {START_MS + 2 * HOUR_MS}", "a"),
        ("artifact_uri LIKE 'mlflow-artifacts:/%/artifacts'", "abcdef"),
        # metrics: the last value counts, NaN matches only !=
        ("metrics.acc = 0.5", "a"),
        ("metrics.acc != 0.5", "bcdf"),
        ("metrics.acc > 0.5", "bd"),
        ("metric.acc >= 5e-1", "abd"),
        ("metrics.acc < 0.9", "af"),
        ("metrics.acc <= -1e300", "f"),
        ("metrics.acc = 0.55", ""),
        ("metrics.`val acc/top-5` = 3", "d"),
        ("metrics.loss != 7", "ab"),
        ("metrics.nobody > 0", ""),
        # several at once
        ("metrics.acc > 0.1 AND params.lr != 'x' and tags.team = 'red'", "a"),
        ("metrics.acc > 0.1 AND metrics.loss > 0.1", "a"),
        ("metrics.acc > 0.1 AND metrics.acc < 0.6", "a"),
        ("params.lr = '0.1' OR metrics.acc > 1", "ad"),
        ("NOT metrics.acc > 0.1", "cef"),
        ("NOT (tags.team = 'red' OR status = 'RUNNING')", "ce"),
        ("(status = 'FINISHED' OR status = 'FAILED') AND NOT tags.team = 'red'", "c"),
    ],
)
async def test_a_filter_finds_the_runs_it_describes(dataset: Dataset, filter_text: str, expected: str) -> None:
    assert "".join(sorted(await dataset.names(filter_text))) == expected


async def test_run_ids_are_found_by_equality_and_in_lists(dataset: Dataset) -> None:
    ids = dataset.ids
    assert await dataset.names(f"run_id = '{ids['a']}'") == ["a"]
    assert await dataset.names(f"attributes.run_id IN ('{ids['a']}', '{ids['c']}', 'nobody')") == ["c", "a"]
    assert await dataset.names(f"run_id IN ('{ids['o']}')") == []  # it is in another experiment


@pytest.mark.parametrize(
    "value",
    [HOSTILE.replace("'", ""), "%' OR 1=1 --", "{a0:Int64}", "%(x)s :p $1 ?", "\\", "\u2028🧪", "1) OR (1=1"],
)
@pytest.mark.parametrize("template", ['params.lr = "{}"', 'tags.team != "{}"', 'run_name = "{}"', 'user_id IN ("{}")'])
async def test_hostile_values_are_data(dataset: Dataset, template: str, value: str) -> None:
    expected = "abdf" if "!=" in template else ""
    assert "".join(sorted(await dataset.names(template.replace("{}", value)))) == expected
    assert len(await dataset.names()) == 6


async def test_a_hostile_value_that_was_logged_is_found_by_itself(dataset: Dataset) -> None:
    for field in ("params.lr", "run_name", "user_id"):
        assert await dataset.names(f'{field} = "{HOSTILE}"') == ["f"]
    assert await dataset.names("tags.team = 'a\\b'") == ["f"]
    assert await dataset.names('metrics.`acc") OR 1=1 --` > 0') == []


@pytest.mark.parametrize(
    "filter_text",
    [
        "metrics.acc = '0.5'",
        "metrics.acc LIKE 'x'",
        "metrics.acc IS NULL",
        "params.lr = 0.1",
        "params.lr > '0.1'",
        "attributes.nonsense = 'x'",
        "nonsense.x = 'y'",
        "start_time = 'yesterday'",
        "status",
        "status = ",
        "status = 'a' status = 'b'",
        "status = 'a",
        "; DROP TABLE run",
        "NOT " * 2_000 + "status = 'a'",
        "NOT (status = 'a' AND " * 300 + "status = 'a'" + ")" * 300,
        "start_time > 1e999",
    ],
)
async def test_what_is_not_a_filter_is_refused(dataset: Dataset, filter_text: str) -> None:
    with pytest.raises(InvalidInput):
        await dataset.find(filter_text)


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        ([], "fedcba"),
        (["start_time"], "abcdef"),
        (["attributes.start_time DESC"], "fedcba"),
        (["created asc"], "abcdef"),
        # metrics: numbers, then NaN, then missing, both ways
        (["metrics.acc"], "fabdce"),
        (["metrics.acc DESC"], "dbafce"),
        (["metrics.loss"], "abfedc"),
        (["metrics.loss desc"], "abfedc"),
        (["metrics.nobody"], "fedcba"),
        (["metrics.`val acc/top-5` DESC"], "dfecba"),
        # others: missing last, both ways
        (["params.lr"], "fabedc"),
        (["params.lr DESC"], "bafedc"),
        (["tags.team"], "fbdaec"),
        (["tags.`team` DESC"], "dabfec"),
        (["end_time"], "acdfeb"),
        (["end_time DESC"], "dcafeb"),
        (["status"], "cdaefb"),
        (["user_id", "metrics.acc DESC"], "efbadc"),
        (["metrics.loss", "metrics.acc"], "abfdce"),
        (["metrics.acc", "metrics.acc DESC"], "fabdce"),
    ],
)
async def test_runs_come_in_the_order_asked_for(dataset: Dataset, orders: list[str], expected: str) -> None:
    assert "".join(await dataset.names("", *orders)) == expected


@pytest.mark.parametrize("order", ["nonsense.x", "attributes.duration", "metrics", "start_time SIDEWAYS", ""])
async def test_what_is_not_an_order_is_refused(dataset: Dataset, order: str) -> None:
    with pytest.raises(InvalidInput):
        await dataset.find("", order)


@pytest.mark.parametrize("orders", [[], ["metrics.acc"], ["params.lr DESC"]])
@pytest.mark.parametrize("size", [1, 2, 4, 6])
async def test_pages_by_offset_show_every_run_once(dataset: Dataset, orders: list[str], size: int) -> None:
    whole = [found.run.run_id for found in await dataset.find("", *orders)]
    pages: list[str] = []
    for offset in range(0, 12, size):
        pages += [found.run.run_id for found in await dataset.find("", *orders, limit=size, offset=offset)]
    assert pages == whole
    assert len(whole) == 6


async def test_views_select_by_deletion(dataset: Dataset) -> None:
    assert await dataset.names(view=ViewType.DELETED_ONLY) == ["x"]
    assert await dataset.names(view=ViewType.ALL) == list("xfedcba")
    assert await dataset.names("metrics.acc > 0.6", "metrics.acc", view=ViewType.ALL) == list("xbd")
    assert await dataset.names("tags.team = 'red'", view=ViewType.DELETED_ONLY) == ["x"]


async def test_only_the_named_experiments_are_searched(dataset: Dataset) -> None:
    async def ids(experiments: list[int]) -> set[str]:
        found = await dataset.find("metrics.acc > 0.8 AND metrics.acc < 1", experiments=experiments)
        return {run.run.run_id for run in found}

    assert await ids([]) == set()
    assert await ids([unique_number()]) == set()
    assert await ids([dataset.experiment]) == {dataset.ids["b"]}
    assert await ids([dataset.other_experiment]) == {dataset.ids["o"]}
    assert await ids([dataset.experiment, dataset.other_experiment]) == {dataset.ids["b"], dataset.ids["o"]}


async def test_a_malformed_filter_is_refused_even_when_nothing_is_searched(dataset: Dataset) -> None:
    with pytest.raises(InvalidInput):
        await dataset.find("nonsense", experiments=[])


async def test_found_runs_have_their_params_tags_and_last_metrics(dataset: Dataset) -> None:
    [found] = await dataset.find("run_name = 'alpha'")
    assert (found.run.params, found.run.tags["team"]) == ({"lr": "0.1", "model": "cnn"}, "red")
    assert [(point.key, point.value, point.step, point.timestamp) for point in found.metrics] == [
        ("acc", 0.5, 2, 1),
        ("loss", 1.0, 2, 1),
    ]
    [empty] = await dataset.find("run_name = 'epsilon'")
    assert empty.metrics == []
    [nan] = await dataset.find("run_name = 'ga%m_ma'")
    assert math.isnan(nan.metrics[0].value)
