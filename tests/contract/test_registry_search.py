"""Search of the registry: what the reference does not go into."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import InvalidInput
from mlplat.metrics.model import Point
from mlplat.metrics.store import MetricStore
from mlplat.registry.model import CreateModel, CreateVersion, DeleteModel, RenameModel, SetAlias, SetStage, Stage
from mlplat.registry.search import search_models, search_versions
from mlplat.registry.store import RegistryStore
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.runs import RunStore
from tests.contract.chdb import stored, unique, unique_number
from tests.contract.test_registry import Registry
from tests.contract.test_run_search import Reader
from tests.registry import registry_service

START = datetime(2025, 1, 1, tzinfo=UTC)


@pytest.fixture
async def registry(engine: AsyncEngine) -> AsyncIterator[Registry]:
    service = registry_service(engine)
    await service.start()
    yield Registry(engine, service, RegistryStore(engine))
    await service.stop()


@pytest.fixture
def reader(metric_store: MetricStore) -> Reader:
    return Reader(metric_store)


async def found(
    registry: Registry, reader: Reader, filter_text: str, *orders: str, limit: int = 100
) -> list[tuple[str, int]]:
    page = await search_versions(registry.store, reader, filter_text, orders, limit)
    return [(version.name, version.version) for version in page.versions]


async def run_with(registry: Registry, metrics: MetricStore, **values: float) -> str:
    """A run of an experiment of its own with these metrics."""
    async with registry.engine.begin() as connection:
        sequence = f"ALTER SEQUENCE experiment_experiment_id_seq RESTART WITH {unique_number()}"
        await connection.exec_driver_sql(sequence)
    experiment = await ExperimentStore(registry.engine, "mlflow-artifacts:").create(unique("e"), None, {})
    run_id = unique("r")
    await RunStore(registry.engine).create(run_id, experiment, None, "", START, {})
    for key, value in values.items():
        metrics.insert(stored(experiment, run_id, [Point(key, value, 1, 0)]))
    return run_id


async def test_the_champion_by_what_its_run_measured(
    registry: Registry, reader: Reader, metric_store: MetricStore
) -> None:
    for name, accuracy in (("good", 0.95), ("bad", 0.4)):
        await registry.do(CreateModel(name))
        run_id = await run_with(registry, metric_store, **{"accuracy": accuracy, "a key/1": accuracy})
        await RunStore(registry.engine).log(run_id, {"lr": "0.01"}, {})
        for _ in range(2):  # two versions of one run
            await registry.version(name, run_id=run_id, user_id="ann", tags={"team": "red"})
        await registry.version(name)
        await registry.do(SetAlias(name, "champion", 1))
        await registry.do(SetAlias(name, "best", 1))
        await registry.do(SetStage(name, 2, Stage.PRODUCTION))
    by_name = "name ASC"
    assert await found(registry, reader, "metrics.accuracy > 0.9", by_name) == [("good", 2), ("good", 1)]
    assert await found(registry, reader, "alias = 'champion' AND metrics.accuracy > 0.9") == [("good", 1)]
    assert await found(registry, reader, "metrics.accuracy > 0.9 AND metrics.`a key/1` < 0.5") == []
    assert await found(registry, reader, "alias IN ('champion', 'best')", by_name) == [("bad", 1), ("good", 1)]
    assert await found(registry, reader, "alias != 'champion'", by_name) == [("bad", 1), ("good", 1)]
    assert await found(registry, reader, "NOT alias = 'champion' AND name = 'bad'", by_name) == [("bad", 3), ("bad", 2)]
    assert await found(registry, reader, "stage = 'production' AND params.lr = '0.01'", by_name) == [
        ("bad", 2), ("good", 2),
    ]  # fmt: skip
    assert await found(registry, reader, "author = 'ann' AND NOT metrics.accuracy > 0.9", by_name) == [
        ("bad", 2), ("bad", 1),
    ]  # fmt: skip
    assert await found(registry, reader, "NOT metrics.accuracy > 0.9 AND name = 'good'") == [("good", 3)]
    page = await search_models(registry.store, "alias = 'champion' AND name != 'bad'", [], 10)
    assert [(model.name, model.aliases) for model in page.models] == [("good", {"best": 1, "champion": 1})]


async def test_semantic_versions_are_found_by_range_and_sorted_by_number(registry: Registry, reader: Reader) -> None:
    await registry.do(CreateModel("m"))
    for semantic in ("1.2.0", "1.10.0", "1.9.3", "2.0.0"):
        await registry.version("m", semantic_version=semantic)
    for filter_text, versions in (
        ("semantic_version = '^1.2'", [2, 3, 1]), ("semantic_version = '1.2.0'", [1]),
        ("semantic_version != '^1.2'", [4]), ("semantic_version IN ('1.2.0', '2.x')", [4, 1]),
        ("semantic_version >= '1.9.3'", [4, 2, 3]), ("semantic_version < '1.9.3'", [1]),
        ("semantic_version = '>=1.9 <2'", [2, 3]), ("tags.`mlplat.semantic_version` = '1.2.0'", [1]),
    ):  # fmt: skip
        rows = await found(registry, reader, filter_text, "semantic_version DESC")
        assert [version for _name, version in rows] == versions, filter_text


async def test_the_widest_tag_fits_into_the_indexes(registry: Registry, reader: Reader) -> None:
    wide = [chr(0x20000 + 97 * number) for number in range(250)]  # four bytes each
    name, key, short = "".join(wide), "".join(reversed(wide)), "".join(wide[:64])
    await registry.do(CreateModel(name, "", {key: short}))
    for value in (short, short + "x", "".join(wide), "x" * 8_000):
        await registry.version(name, tags={key: value})
    for test, versions in (
        (f"= '{short}'", [1]), (f"= '{short}x'", [2]), (f"LIKE '{short}%'", [3, 2, 1]), (f"= '{'x' * 8_000}'", [4]),
        (f"!= '{short}'", [4, 3, 2]), (f"IN ('{short}', '{short}x')", [2, 1]),
    ):  # fmt: skip
        assert await found(registry, reader, f"tags.`{key}` {test}") == [(name, number) for number in versions], test
    assert len((await search_models(registry.store, f"tags.`{key}` = '{short}'", [], 10)).models) == 1


async def test_what_is_renamed_or_deleted_is_found_as_it_is_now(registry: Registry, reader: Reader) -> None:
    await registry.do(CreateModel("old", "", {"t": "1"}))
    await registry.do(CreateVersion("old", "s", "s", tags={"t": "1"}))
    await registry.do(SetAlias("old", "a", 1))
    await registry.do(RenameModel("old", "new"))
    for filter_text in ("tags.t = '1'", "alias = 'a'", "name = 'new'"):
        assert await found(registry, reader, filter_text) == [("new", 1)]
        assert [model.name for model in (await search_models(registry.store, filter_text, [], 9)).models] == ["new"]
    await registry.do(DeleteModel("new"))
    assert await found(registry, reader, "") == []
    assert (await search_models(registry.store, "", [], 9)).models == []


async def test_pages_stay_where_they_are_while_versions_come_and_change(registry: Registry, reader: Reader) -> None:
    await registry.do(CreateModel("m"))
    for _ in range(6):
        await registry.version("m")
    page = await search_versions(registry.store, reader, "", (), 2)
    await registry.version("m")
    await registry.do(SetStage("m", 3, Stage.STAGING))  # the newest by now
    rest = await search_versions(registry.store, reader, "", (), 10, page.next_token)
    assert [version.version for version in page.versions + rest.versions] == [6, 5, 4, 2, 1]
    with pytest.raises(InvalidInput, match="another filter"):
        await search_versions(registry.store, reader, "name = 'm'", (), 2, page.next_token)


async def test_a_page_is_found_by_the_index_of_its_order(registry: Registry) -> None:
    """Else each page would sort all versions."""
    query = (
        "EXPLAIN SELECT name, version FROM model_version WHERE updated_at <= now() "
        "ORDER BY updated_at DESC, name, version DESC LIMIT 10"
    )
    async with registry.engine.begin() as connection:
        await connection.execute(text("SET LOCAL enable_seqscan = off"))
        plan = "\n".join((await connection.execute(text(query))).scalars())
    assert "Index Only Scan using ix_model_version_newest" in plan, plan
