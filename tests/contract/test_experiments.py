"""Experiments in Postgres."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.model import ViewType, to_ms
from mlplat.tracking.runs import RunStore

NOW = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def store(engine: AsyncEngine) -> ExperimentStore:
    return ExperimentStore(engine, "mlflow-artifacts:/")


async def _new(store: ExperimentStore, name: str, **tags: str) -> int:
    return await store.create(name, None, tags)


async def test_the_default_experiment_is_number_zero_and_made_once(store: ExperimentStore) -> None:
    await asyncio.gather(*(store.ensure_default() for _ in range(4)))
    await store.ensure_default()
    default = await store.get(0)
    assert (default.name, default.artifact_location, default.deleted) == ("Default", "mlflow-artifacts:/0", False)
    assert len((await store.search(view=ViewType.ALL))[0]) == 1


async def test_the_default_experiment_stays_deleted(store: ExperimentStore) -> None:
    await store.ensure_default()
    await store.set_deleted(0, True)
    await store.ensure_default()
    assert (await store.get(0)).deleted


async def test_a_new_experiment_is_read_as_it_was_written(store: ExperimentStore) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    number = await _new(store, "Ünïcode 'name'", team="a", empty="")
    found = await store.get(number)
    assert number > 0
    assert (found.experiment_id, found.name, found.deleted) == (number, "Ünïcode 'name'", False)
    assert found.tags == {"team": "a", "empty": ""}
    assert before < found.created_at <= found.updated_at
    assert await store.get_by_name("Ünïcode 'name'") == found


async def test_an_experiment_keeps_artifacts_under_the_root_or_where_it_was_told(store: ExperimentStore) -> None:
    chosen = await store.create("chosen", "s3://bucket/there", {})
    given = await store.create("given", "", {})
    assert (await store.get(chosen)).artifact_location == "s3://bucket/there"
    assert (await store.get(given)).artifact_location == f"mlflow-artifacts:/{given}"


async def test_unknown_experiments_are_not_found(store: ExperimentStore) -> None:
    with pytest.raises(NotFound, match="No Experiment with id=99 exists"):
        await store.get(99)
    with pytest.raises(NotFound, match="Could not find experiment with name 'nobody'"):
        await store.get_by_name("nobody")
    for call in (
        store.rename(99, "x"),
        store.set_deleted(99, True),
        store.set_deleted(99, False),
        store.set_tag(99, "a", "b"),
        store.delete_tag(99, "a"),
    ):
        with pytest.raises(NotFound):
            await call


async def test_names_are_unique_deleted_ones_included(store: ExperimentStore) -> None:
    number = await _new(store, "taken")
    other = await _new(store, "other")
    for _state in ("active", "deleted"):
        with pytest.raises(AlreadyExists, match=r"Experiment\(name=taken\) already exists"):
            await _new(store, "taken")
        with pytest.raises(AlreadyExists):
            await store.rename(other, "taken")
        if not (await store.get(number)).deleted:
            await store.set_deleted(number, True)
    assert (await store.get(other)).name == "other"


async def test_of_concurrent_creators_of_one_name_one_wins(store: ExperimentStore) -> None:
    answers = await asyncio.gather(*(_new(store, "race") for _ in range(6)), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["AlreadyExists"] * 5 + ["int"]


@pytest.mark.parametrize("name", ["", "   ", "x" * 501])
async def test_malformed_names_are_refused(store: ExperimentStore, name: str) -> None:
    number = await _new(store, "fine")
    with pytest.raises(InvalidInput):
        await _new(store, name)
    with pytest.raises(InvalidInput):
        await store.rename(number, name)


async def test_a_malformed_tag_creates_nothing(store: ExperimentStore) -> None:
    with pytest.raises(InvalidInput):
        await store.create("half", None, {"../up": "x"})
    with pytest.raises(NotFound):
        await store.get_by_name("half")


async def test_renaming_changes_the_name_and_the_time(store: ExperimentStore) -> None:
    number = await _new(store, "old", kept="yes")
    before = await store.get(number)
    await store.rename(number, "new")
    after = await store.get_by_name("new")
    assert (after.experiment_id, after.tags, after.created_at) == (number, {"kept": "yes"}, before.created_at)
    assert after.updated_at > before.updated_at
    assert await _new(store, "old") != number


async def test_a_deleted_experiment_is_readable_and_refuses_changes(store: ExperimentStore) -> None:
    number = await _new(store, "gone", a="1")
    await store.set_deleted(number, True)
    assert (await store.get(number)).deleted
    assert (await store.get_by_name("gone")).tags == {"a": "1"}
    for call in (store.rename(number, "x"), store.set_tag(number, "a", "2"), store.delete_tag(number, "a")):
        with pytest.raises(InvalidInput, match="must be in the 'active' state"):
            await call
    with pytest.raises(NotFound):
        await store.set_deleted(number, True)
    await store.set_deleted(number, False)
    with pytest.raises(NotFound):
        await store.set_deleted(number, False)
    assert (await store.get(number)).tags == {"a": "1"}


async def test_deleting_and_restoring_take_the_runs_along(store: ExperimentStore, engine: AsyncEngine) -> None:
    runs = RunStore(engine)
    number, other = await _new(store, "one"), await _new(store, "two")
    for run_id, experiment in (("a", number), ("b", number), ("c", other)):
        await runs.create(run_id, experiment, None, "", NOW, {})
    await store.set_deleted(number, True)
    assert [(await runs.get(run_id)).deleted for run_id in "abc"] == [True, True, False]
    with pytest.raises(InvalidInput):
        await runs.create("d", number, None, "", NOW, {})
    await store.set_deleted(number, False)
    assert [(await runs.get(run_id)).deleted for run_id in "abc"] == [False, False, False]


async def test_no_active_run_slips_into_an_experiment_that_is_being_deleted(
    store: ExperimentStore, engine: AsyncEngine
) -> None:
    runs = RunStore(engine)
    number = await _new(store, "race")
    creations = [runs.create(f"r{index}", number, None, "", NOW, {}) for index in range(12)]
    answers = await asyncio.gather(
        *creations[:6], store.set_deleted(number, True), *creations[6:], return_exceptions=True
    )
    assert all(answer is None or not isinstance(answer, Exception | None) or isinstance(answer, InvalidInput)
               for answer in answers)  # fmt: skip
    for index in range(12):
        try:
            assert (await runs.get(f"r{index}")).deleted
        except NotFound:
            continue


async def test_tags_are_set_replaced_and_removed(store: ExperimentStore) -> None:
    number = await _new(store, "tagged")
    await store.set_tag(number, "a", "1")
    await store.set_tag(number, "a", "2")
    await store.set_tag(number, "long", "x" * 9_000)
    assert (await store.get(number)).tags == {"a": "2", "long": "x" * 8_000}
    await store.delete_tag(number, "a")
    with pytest.raises(NotFound, match="No tag with name: a"):
        await store.delete_tag(number, "a")
    with pytest.raises(InvalidInput):
        await store.set_tag(number, "a//b", "1")


async def test_search_shows_the_newest_first_by_view_and_page(store: ExperimentStore) -> None:
    numbers = [await _new(store, f"e{index}", index=str(index)) for index in range(5)]
    await store.set_deleted(numbers[1], True)

    async def ids(view: ViewType) -> list[int]:
        return [found.experiment_id for found in (await store.search(view=view))[0]]

    newest_first = numbers[::-1]
    assert await ids(ViewType.ALL) == newest_first
    assert await ids(ViewType.DELETED_ONLY) == [numbers[1]]
    assert await ids(ViewType.ACTIVE_ONLY) == [number for number in newest_first if number != numbers[1]]
    tagged = {found.experiment_id: found.tags for found in (await store.search(view=ViewType.ALL))[0]}
    assert tagged == {number: {"index": str(index)} for index, number in enumerate(numbers)}


@pytest.mark.parametrize(
    ("filter_text", "expected"),
    [
        ("", "abc"),
        ("name = 'a one'", "a"),
        ("attributes.name != 'a one'", "bc"),
        ("name LIKE '% one'", "ab"),
        ("name ILIKE 'A%'", "a"),
        ("experiment.name IN ('a one', 'c two')", "ac"),
        ("tags.team = 'red'", "ac"),
        ("tag.team != 'red'", "b"),
        ("tags.`team` IS NULL", ""),
        ("tags.extra IS NOT NULL", "c"),
        ("tags.long LIKE 'x%'", "b"),
        ("tags.team = 'red' AND NOT name = 'a one'", "c"),
        ("name = 'b one' OR tags.extra = '1'", "bc"),
        ("creation_time > 0", "abc"),
        ("last_update_time < 1000", ""),
    ],
)
async def test_experiments_are_found_by_filter(store: ExperimentStore, filter_text: str, expected: str) -> None:
    await _new(store, "a one", team="red")
    await _new(store, "b one", team="blue", long="x" * 5_000)
    await _new(store, "c two", team="red", extra="1")
    found, _token = await store.search(filter_text)
    assert "".join(sorted(experiment.name[0] for experiment in found)) == expected


async def test_experiments_are_found_by_number_and_by_the_time_that_callers_see(store: ExperimentStore) -> None:
    number = await _new(store, "one")
    await _new(store, "two")
    created = to_ms((await store.get(number)).created_at)
    for text in (f"experiment_id = '{number}'", f"experiment_id IN ('{number}')", f"creation_time = {created}"):
        assert number in [found.experiment_id for found in (await store.search(text))[0]]


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        ([], "dcba"),
        (["name"], "abcd"),
        (["name DESC"], "dcba"),
        (["experiment_id"], "abcd"),
        (["creation_time ASC"], "abcd"),
        (["tags.team"], "dbca"),  # equal and missing ones: newest first
        (["tags.team DESC", "name"], "bdac"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 4])
async def test_pages_of_experiments_keep_the_order(
    store: ExperimentStore, orders: list[str], expected: str, size: int
) -> None:
    tags: dict[str, dict[str, str]] = {"a": {}, "b": {"team": "x"}, "c": {}, "d": {"team": "x"}}
    for name, its in tags.items():
        await _new(store, name, **its)
    seen, token = "", None
    for _page in range(5):
        found, token = await store.search(order_texts=orders, limit=size, page_token=token)
        seen += "".join(experiment.name for experiment in found)
        if token is None:
            break
    assert seen == expected


@pytest.mark.parametrize("filter_text", ["metrics.a > 1", "params.a = 'x'", "status = 'x'", "name > 'a'", "tags.a = 1"])
async def test_what_experiments_do_not_have_is_refused(store: ExperimentStore, filter_text: str) -> None:
    with pytest.raises(InvalidInput):
        await store.search(filter_text)


async def test_a_token_of_another_search_is_refused(store: ExperimentStore) -> None:
    for name in "abc":
        await _new(store, name)
    _found, token = await store.search(limit=1)
    assert token is not None
    for filter_text, orders, view in (
        ("name = 'a'", [], ViewType.ACTIVE_ONLY),
        ("", ["name"], ViewType.ACTIVE_ONLY),
        ("", [], ViewType.ALL),
    ):
        with pytest.raises(InvalidInput, match="Invalid page token"):
            await store.search(filter_text, orders, view, 1, token)
    found, _token = await store.search(limit=1, page_token=token)
    assert [experiment.name for experiment in found] == ["b"]
