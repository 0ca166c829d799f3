"""Run search over real Postgres and a real metric store."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.tables import run
from mlplat.errors import InvalidInput
from mlplat.metrics.model import Point
from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.model import RunStatus, ViewType, to_ms
from mlplat.tracking.run_search import RunPage, search_runs
from mlplat.tracking.runs import RunStore
from tests.contract.chdb import stored, unique, unique_number
from tests.databases import Databases

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
        token: str | None = None,
        experiments: Sequence[int] | None = None,
    ) -> RunPage:
        """A page of the found runs."""
        inside = [self.experiment] if experiments is None else experiments
        return await search_runs(self.runs, self.reader, inside, filter_text, orders, view, limit, token)

    async def ids_by_page(self, filter_text: str, orders: Sequence[str], size: int, limit: int = 1000) -> list[str]:
        """Ids of the found runs, page after page."""
        seen: list[str] = []
        token: str | None = None
        for _ in range(limit):
            page = await self.find(filter_text, *orders, limit=size, token=token)
            assert len(page.runs) == size or page.next_token is None
            seen += [found.run.run_id for found in page.runs]
            if (token := page.next_token) is None:
                return seen
        raise AssertionError("the pages never end")

    async def names(self, filter_text: str = "", *orders: str, view: ViewType = ViewType.ACTIVE_ONLY) -> list[str]:
        """Short names of the found runs, in their order."""
        by_id = {run_id: name for name, run_id in self.ids.items()}
        return [by_id[found.run.run_id] for found in (await self.find(filter_text, *orders, view=view)).runs]


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
async def dataset(databases: Databases, metric_store: MetricStore) -> AsyncIterator[Dataset]:
    """Six active runs, one deleted, one in another experiment."""
    async with databases.open(pool_size=12) as engine:
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
        ("params.lr > 0.1", "b"),
        ("params.lr >= 0.1", "ab"),
        ("params.lr = 1e-1", "a"),
        ("params.lr != 0.1", "b"),
        ("params.lr IN (0.1, 0.2, 7)", "ab"),
        ("params.lr NOT IN (0.1, 7)", "b"),
        ("params.empty != 1", ""),
        ("NOT params.lr > 0.1", "acdef"),
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
        ("metrics.acc IN (0.5, 0.9)", "ab"),
        ("metrics.acc NOT IN (0.5, 0.9)", "cdf"),
        ("min(metrics.acc) < 0.55", "af"),
        ("max(metrics.acc) = 0.55", "acf"),
        ("max(metrics.`val acc/top-5`) >= 3", "d"),
        ("last(metrics.acc) = 0.5", "a"),
        ("min(metrics.acc) = 0.55", "bcd"),
        ("duration = 60", "acd"),
        ("attributes.duration > 60.5", ""),
        ("end_time IS NULL", "bef"),
        ("duration IS NOT NULL", "acd"),
        (f"start_time IN ({START_MS}, {START_MS + HOUR_MS})", "ab"),
        ("run_name IN ('alpha', 'Beta')", "ab"),
        ("status NOT IN ('FINISHED', 'RUNNING')", "ce"),
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
        "tags.team = 0.1",
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
        (["max(metrics.acc) DESC"], "dbfcae"),
        (["min(metrics.acc)", "metrics.loss"], "fabdce"),
        (["duration", "start_time"], "acdbef"),
    ],
)
async def test_runs_come_in_the_order_asked_for(dataset: Dataset, orders: list[str], expected: str) -> None:
    assert "".join(await dataset.names("", *orders)) == expected


@pytest.mark.parametrize(
    "order", ["nonsense.x", "attributes.length", "metrics", "start_time SIDEWAYS", "", "dataset.name"]
)
async def test_what_is_not_an_order_is_refused(dataset: Dataset, order: str) -> None:
    with pytest.raises(InvalidInput):
        await dataset.find("", order)


@pytest.mark.parametrize(
    "orders",
    [[], ["metrics.acc"], ["metrics.acc DESC"], ["params.lr DESC"], ["end_time", "metrics.loss"], ["metrics.nobody"],
     ["metrics.loss", "tags.team DESC"], ["max(metrics.acc) DESC", "status"], ["duration DESC"],
     ["status", "run_name"]],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 2, 3, 6])
async def test_pages_show_every_run_once_in_the_order_of_one_page(
    dataset: Dataset, orders: list[str], size: int
) -> None:
    whole = [found.run.run_id for found in (await dataset.find("", *orders)).runs]
    assert len(whole) == 6
    assert await dataset.ids_by_page("", orders, size) == whole


async def test_views_select_by_deletion(dataset: Dataset) -> None:
    assert await dataset.names(view=ViewType.DELETED_ONLY) == ["x"]
    assert await dataset.names(view=ViewType.ALL) == list("xfedcba")
    assert await dataset.names("metrics.acc > 0.6", "metrics.acc", view=ViewType.ALL) == list("xbd")
    assert await dataset.names("tags.team = 'red'", view=ViewType.DELETED_ONLY) == ["x"]


async def test_only_the_named_experiments_are_searched(dataset: Dataset) -> None:
    async def ids(experiments: list[int]) -> set[str]:
        found = await dataset.find("metrics.acc > 0.8 AND metrics.acc < 1", experiments=experiments)
        return {each.run.run_id for each in found.runs}

    assert await ids([]) == set()
    assert await ids([unique_number()]) == set()
    assert await ids([dataset.experiment]) == {dataset.ids["b"]}
    assert await ids([dataset.other_experiment]) == {dataset.ids["o"]}
    assert await ids([dataset.experiment, dataset.other_experiment]) == {dataset.ids["b"], dataset.ids["o"]}


async def test_a_malformed_filter_is_refused_even_when_nothing_is_searched(dataset: Dataset) -> None:
    with pytest.raises(InvalidInput):
        await dataset.find("nonsense", experiments=[])


async def test_found_runs_have_their_params_tags_and_last_metrics(dataset: Dataset) -> None:
    [found] = (await dataset.find("run_name = 'alpha'")).runs
    assert (found.run.params, found.run.tags["team"]) == ({"lr": "0.1", "model": "cnn"}, "red")
    assert [(point.key, point.value, point.step, point.timestamp) for point in found.metrics] == [
        ("acc", 0.5, 2, 1),
        ("loss", 1.0, 2, 1),
    ]
    [empty] = (await dataset.find("run_name = 'epsilon'")).runs
    assert empty.metrics == []
    [nan] = (await dataset.find("run_name = 'ga%m_ma'")).runs
    assert math.isnan(nan.metrics[0].value)


@pytest.fixture
async def own(databases: Databases, metric_store: MetricStore) -> AsyncIterator[Dataset]:
    """A dataset that a test may change."""
    async with databases.open(pool_size=12) as engine:
        yield await _build(engine, metric_store)


@pytest.mark.parametrize("orders", [[], ["metrics.acc DESC"], ["params.lr"]])
async def test_pages_do_not_move_while_runs_arrive(own: Dataset, orders: list[str]) -> None:
    whole = [found.run.run_id for found in (await own.find("", *orders)).runs]
    seen: list[str] = []
    token: str | None = None
    for number in range(len(whole)):
        page = await own.find("", *orders, limit=1, token=token)
        seen += [found.run.run_id for found in page.runs]
        token = page.next_token
        # First in each of the orders.
        run_id = unique("new")
        await own.runs.create(run_id, own.experiment, "new", "", START + timedelta(days=1 + number), {})
        await own.runs.log(run_id, {"lr": ""}, {})
        own.reader.store.insert(stored(own.experiment, run_id, [Point("acc", math.inf, 1, 1)]))
        if token is None:
            break
    assert seen[: len(whole)] == whole


async def test_a_token_belongs_to_its_search(dataset: Dataset) -> None:
    token = (await dataset.find("status != 'x'", "metrics.acc", limit=1)).next_token
    assert token is not None
    assert (await dataset.find("status != 'x'", "metrics.acc", limit=2, token=token)).runs  # another size is fine
    for search in (
        dataset.find("status != 'y'", "metrics.acc", token=token),
        dataset.find("status != 'x'", "metrics.acc DESC", token=token),
        dataset.find("status != 'x'", token=token),
        dataset.find("status != 'x'", "metrics.acc", token=token, view=ViewType.ALL),
        dataset.find("status != 'x'", "metrics.acc", token=token, experiments=[dataset.other_experiment]),
        dataset.find("status != 'x'", "metrics.acc", token=token[:-4]),
    ):
        with pytest.raises(InvalidInput, match="Invalid page token"):
            await search


async def test_a_run_that_moved_or_was_deleted_is_found_where_it_is(own: Dataset) -> None:
    run_id = own.ids["b"]
    async with own.runs._engine.begin() as connection:
        move = update(run).where(run.c.run_id == run_id).values(experiment_id=own.other_experiment)
        await connection.execute(move)
    for search in (("metrics.acc > 0.8 AND metrics.acc < 1",), ("", "metrics.acc"), ("metrics.acc > 0.8", "status")):
        assert run_id not in [found.run.run_id for found in (await own.find(*search)).runs]
    await own.runs.set_deleted(own.ids["a"], True)
    assert await own.names("metrics.acc = 0.5") == []
    assert "a" not in await own.names("", "metrics.acc")


async def test_runs_are_found_by_their_datasets(own: Dataset) -> None:
    async with own.runs._engine.begin() as connection:
        for statement in (
            # The same columns that the tables of datasets have, for a schema without them.
            "CREATE TABLE IF NOT EXISTS dataset (dataset_id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, "
            "experiment_id bigint, name text, digest text, source_type text, source text)",
            "CREATE TABLE IF NOT EXISTS run_input (run_id text, dataset_id bigint, tags jsonb)",
        ):
            await connection.exec_driver_sql(statement)
        for short, name, context in (("a", "mnist", "train"), ("a", "cifar", "eval"), ("b", "mnist", "eval")):
            row = await connection.execute(
                text(
                    "INSERT INTO dataset (experiment_id, name, digest, source_type, source) "
                    "VALUES (:experiment, :name, :digest, 'code', '{}') RETURNING dataset_id"
                ),
                {"experiment": own.experiment, "name": name, "digest": f"{name}-{short}"},
            )
            await connection.execute(
                text(
                    "INSERT INTO run_input (run_id, dataset_id, tags) "
                    "VALUES (:run, :dataset, jsonb_build_object('mlflow.data.context', CAST(:context AS text)))"
                ),
                {"run": own.ids[short], "dataset": row.scalar_one(), "context": context},
            )
    for filter_text, expected in (
        ("dataset.name = 'mnist'", "ab"),
        ("datasets.name != 'mnist'", "a"),
        ("dataset.digest LIKE 'cifar%'", "a"),
        ("dataset.context = 'eval'", "ab"),
        ("dataset.context IN ('train')", "a"),
        ("dataset.name IS NULL", "cdef"),
        ("dataset.name = 'mnist' AND metrics.acc > 0.8", "b"),
    ):
        assert "".join(sorted(await own.names(filter_text))) == expected, filter_text
        assert "".join(sorted(await own.names(filter_text, "metrics.acc"))) == expected, filter_text


ATTACKS = [
    "' OR '1'='1", "'; DROP TABLE run_tag; --", "\" OR 1=1 --", "') UNION SELECT 1 --", "1; SELECT pg_sleep(9)",
    "a\\' OR 1=1", "a\x1fb", "` OR `1`=`1", "$$; DROP TABLE run; $$", "{p1:String}", "%(key_1)s", "') FORMAT Null --",
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
async def test_an_attack_is_refused_or_finds_nothing(dataset: Dataset, attack: str) -> None:
    for filter_text in (
        attack,
        f"tags.team = '{attack}'",
        f'params.lr = "{attack}"',
        f"metrics.`{attack}` > 0",
        f"max(metrics.`{attack}`) IN (1, 2)",
        f"tags.`{attack}` IS NOT NULL",
        f"run_id IN ('{attack}')",
        f"metrics.acc > {attack}",
    ):
        with suppress(InvalidInput):
            assert (await dataset.find(filter_text)).runs == []
    for order in (attack, f"metrics.`{attack}`", f"tags.`{attack}` DESC", f"params.{attack}", f"start_time {attack}"):
        with suppress(InvalidInput):
            assert len((await dataset.find("", order)).runs) == 6
    for token in (attack, base64.urlsafe_b64encode(attack.encode()).decode()):
        with pytest.raises(InvalidInput, match="Invalid page token"):
            await dataset.find(token=token)
    assert len((await dataset.find()).runs) == 6
