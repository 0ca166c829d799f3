"""The model registry: its single writer and its readers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.tables import registry_event
from mlplat.errors import AlreadyExists, Fenced, InvalidInput, NotFound
from mlplat.registry.model import (
    Command,
    CreateModel,
    CreateVersion,
    DeleteAlias,
    DeleteModel,
    DeleteVersion,
    RenameModel,
    SetAlias,
    SetModelTag,
    SetVersionTag,
    UpdateModel,
    UpdateVersion,
)
from mlplat.registry.search import search_models
from mlplat.registry.semver import EVERY
from mlplat.registry.service import RegistryService
from mlplat.registry.store import RegistryStore
from tests.registry import registry_service


@dataclass(frozen=True)
class Registry:
    """A writer and a reader of one database."""

    engine: AsyncEngine
    service: RegistryService
    store: RegistryStore

    async def do(self, command: Command, request_id: str | None = None) -> dict[str, Any]:
        """Executes a command under a request id of its own."""
        [answer] = await self.service.execute(request_id or uuid.uuid4().hex, [command])
        return answer

    async def version(self, name: str, source: str = "s3://b/m", **options: Any) -> int:
        """Adds a version and returns its number."""
        return int((await self.do(CreateVersion(name, source, source, **options)))["version"])

    async def events(self) -> list[tuple[str, str]]:
        """Kind and name of every event, in order."""
        query = select(registry_event.c.kind, registry_event.c.name).order_by(registry_event.c.event_id)
        async with self.engine.connect() as connection:
            return [(row.kind, row.name) for row in await connection.execute(query)]


async def _service(engine: AsyncEngine) -> RegistryService:
    service = registry_service(engine)
    await service.start()
    return service


@pytest.fixture
async def registry(engine: AsyncEngine) -> AsyncIterator[Registry]:
    service = await _service(engine)
    yield Registry(engine, service, RegistryStore(engine))
    await service.stop()


@pytest.fixture
async def model(registry: Registry) -> str:
    await registry.do(CreateModel("model", "about it", {"team": "red"}))
    return "model"


async def test_a_new_model_is_read_as_it_was_written(registry: Registry) -> None:
    assert await registry.do(CreateModel("Modèle 'x' %_", "about", {"a": "1", "long": "x" * 9_000})) == {}
    found = await registry.store.get_model("Modèle 'x' %_")
    assert (found.name, found.description, found.aliases, found.latest) == ("Modèle 'x' %_", "about", {}, [])
    assert found.tags == {"a": "1", "long": "x" * 8_000}
    assert found.created_at <= found.updated_at


async def test_model_names_are_unique(registry: Registry, model: str) -> None:
    with pytest.raises(AlreadyExists, match=r"Registered Model \(name=model\) already exists"):
        await registry.do(CreateModel(model, "other", {"team": "blue"}))
    found = await registry.store.get_model(model)
    assert (found.description, found.tags) == ("about it", {"team": "red"})


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "x" * 251])
async def test_malformed_model_names_are_refused(registry: Registry, model: str, name: str) -> None:
    for command in (CreateModel(name), RenameModel(model, name)):
        with pytest.raises(InvalidInput):
            await registry.do(command)
    assert [found.name for found in (await search_models(registry.store, "", [], 10)).models] == [model]


async def test_a_malformed_tag_creates_no_model(registry: Registry) -> None:
    with pytest.raises(InvalidInput):
        await registry.do(CreateModel("m", "", {"../x": "1"}))
    with pytest.raises(NotFound):
        await registry.store.get_model("m")
    assert await registry.events() == []


async def test_commands_on_what_is_not_there_are_not_found(registry: Registry, model: str) -> None:
    for command in (
        UpdateModel("nobody", "x"),
        RenameModel("nobody", "x"),
        DeleteModel("nobody"),
        SetModelTag("nobody", "a", "1"),
        SetModelTag("nobody", "a", None),
        CreateVersion("nobody", "s3://b", "s3://b"),
        DeleteAlias("nobody", "a"),
    ):
        with pytest.raises(NotFound, match="Registered Model with name=nobody not found"):
            await registry.do(command)
    for on_version in (
        UpdateVersion(model, 7, "x"),
        DeleteVersion(model, 7),
        SetVersionTag(model, 7, "a", "1"),
        SetVersionTag(model, 7, "a", None),
        SetAlias(model, "champion", 7),
    ):
        with pytest.raises(NotFound, match=r"Model Version \(name=model, version=7\) not found"):
            await registry.do(on_version)
    with pytest.raises(NotFound):
        await registry.store.get_version(model, 1)
    with pytest.raises(NotFound):
        await registry.store.get_by_alias("nobody", "champion")


async def test_a_description_and_tags_change_in_place(registry: Registry, model: str) -> None:
    before = await registry.store.get_model(model)
    await registry.do(SetModelTag(model, "team", "blue"))
    await registry.do(SetModelTag(model, "stage", "beta"))
    await registry.do(SetModelTag(model, "stage", None))
    await registry.do(SetModelTag(model, "stage", None))
    tagged = await registry.store.get_model(model)
    assert (tagged.tags, tagged.updated_at) == ({"team": "blue"}, before.updated_at)
    await registry.do(UpdateModel(model, "new"))
    described = await registry.store.get_model(model)
    assert described.description == "new"
    assert described.updated_at > before.updated_at
    with pytest.raises(InvalidInput):
        await registry.do(SetModelTag(model, "/abs", "x"))


async def test_versions_count_from_one_in_each_model(registry: Registry, model: str) -> None:
    await registry.do(CreateModel("other"))
    assert [await registry.version(model) for _ in range(3)] == [1, 2, 3]
    assert await registry.version("other") == 1


async def test_a_version_is_read_as_it_was_written(registry: Registry, model: str) -> None:
    before = await registry.store.get_model(model)
    answer = await registry.do(
        CreateVersion(
            model, "runs:/r/m", "mlflow-artifacts:/1/r/artifacts/m", "r", "http://x", "first", "ann", {"a": "1"}
        )
    )
    found = await registry.store.get_version(model, answer["version"])
    assert (found.name, found.version, found.source, found.artifact_uri, found.run_id) == (
        model, 1, "runs:/r/m", "mlflow-artifacts:/1/r/artifacts/m", "r",
    )  # fmt: skip
    assert (found.run_link, found.description, found.user_id, found.tags, found.aliases) == (
        "http://x", "first", "ann", {"a": "1"}, [],
    )  # fmt: skip
    after = await registry.store.get_model(model)
    assert after.latest == [found]
    assert after.updated_at > before.updated_at


async def test_numbers_are_never_used_again(registry: Registry, model: str) -> None:
    assert [await registry.version(model) for _ in range(2)] == [1, 2]
    await registry.do(DeleteVersion(model, 2))
    assert await registry.version(model) == 3
    for number in (1, 3):
        await registry.do(DeleteVersion(model, number))
    assert (await registry.store.get_model(model)).latest == []
    assert await registry.version(model) == 4
    with pytest.raises(NotFound):
        await registry.store.get_version(model, 2)


async def test_a_version_may_ask_for_a_later_number(registry: Registry, model: str) -> None:
    assert await registry.version(model, version=3) == 3
    assert await registry.version(model) == 4
    for number in (1, 4):
        with pytest.raises(AlreadyExists, match="a later one"):
            await registry.version(model, version=number)
    await registry.do(DeleteVersion(model, 4))
    with pytest.raises(AlreadyExists):
        await registry.version(model, version=4)
    with pytest.raises(NotFound):
        await registry.version("nobody", version=4)
    assert await registry.version(model) == 5


async def test_a_version_without_a_source_is_refused_and_takes_no_number(registry: Registry, model: str) -> None:
    with pytest.raises(InvalidInput, match="source"):
        await registry.version(model, "")
    with pytest.raises(InvalidInput):
        await registry.version(model, tags={"a//b": "x"})
    assert await registry.version(model) == 1


async def test_concurrent_creations_get_the_numbers_one_to_n(registry: Registry, model: str) -> None:
    numbers = await asyncio.gather(*(registry.version(model) for _ in range(25)))
    assert sorted(numbers) == list(range(1, 26))
    assert len(await registry.store.list_versions(model, EVERY, 100)) == 25


async def test_versions_change_in_place(registry: Registry, model: str) -> None:
    await registry.version(model)
    await registry.version(model)
    await registry.do(UpdateVersion(model, 1, "better"))
    await registry.do(SetVersionTag(model, 1, "a", "1"))
    await registry.do(SetVersionTag(model, 1, "a", "2"))
    await registry.do(SetVersionTag(model, 1, "b", "x"))
    await registry.do(SetVersionTag(model, 1, "b", None))
    found = await registry.store.get_version(model, 1)
    assert (found.description, found.tags) == ("better", {"a": "2"})
    assert found.updated_at > found.created_at
    untouched = await registry.store.get_version(model, 2)
    assert (untouched.description, untouched.tags) == ("", {})


async def test_an_alias_points_at_one_version_and_moves(registry: Registry, model: str) -> None:
    await registry.version(model)
    await registry.version(model)
    await registry.do(SetAlias(model, "champion", 1))
    await registry.do(SetAlias(model, "Champion", 2))
    assert (await registry.store.get_by_alias(model, "champion")).version == 1
    await registry.do(SetAlias(model, "champion", 2))
    moved = await registry.store.get_by_alias(model, "champion")
    assert (moved.version, moved.aliases) == (2, ["Champion", "champion"])
    assert (await registry.store.get_model(model)).aliases == {"Champion": 2, "champion": 2}
    await registry.do(DeleteAlias(model, "champion"))
    await registry.do(DeleteAlias(model, "champion"))
    with pytest.raises(InvalidInput, match="Registered model alias champion not found"):
        await registry.store.get_by_alias(model, "champion")


async def test_aliases_of_different_models_are_independent(registry: Registry, model: str) -> None:
    await registry.do(CreateModel("other"))
    for name in (model, "other"):
        await registry.version(name)
        await registry.version(name)
    await registry.do(SetAlias(model, "champion", 1))
    await registry.do(SetAlias("other", "champion", 2))
    assert (await registry.store.get_by_alias(model, "champion")).version == 1
    assert (await registry.store.get_by_alias("other", "champion")).version == 2


@pytest.mark.parametrize("alias", ["", "latest", "LaTeSt", "v1", "V27", "a b", "a/b", "ä", "x" * 256, "a\n"])
async def test_reserved_and_malformed_aliases_cannot_be_set(registry: Registry, model: str, alias: str) -> None:
    await registry.version(model)
    with pytest.raises(InvalidInput):
        await registry.do(SetAlias(model, alias, 1))
    assert (await registry.store.get_model(model)).aliases == {}


async def test_the_alias_latest_reads_the_highest_version(registry: Registry, model: str) -> None:
    with pytest.raises(InvalidInput):
        await registry.store.get_by_alias(model, "latest")
    for _ in range(3):
        await registry.version(model)
    await registry.do(DeleteVersion(model, 3))
    assert (await registry.store.get_by_alias(model, "LATEST")).version == 2


async def test_deleting_a_version_drops_its_aliases_and_tags(registry: Registry, model: str) -> None:
    for _ in range(2):
        await registry.version(model, tags={"a": "1"})
    await registry.do(SetAlias(model, "old", 1))
    await registry.do(SetAlias(model, "new", 2))
    await registry.do(DeleteVersion(model, 1))
    assert (await registry.store.get_model(model)).aliases == {"new": 2}
    assert (await registry.store.get_version(model, 2)).tags == {"a": "1"}


async def test_renaming_carries_versions_tags_and_aliases(registry: Registry, model: str) -> None:
    await registry.version(model, tags={"a": "1"})
    await registry.version(model)
    await registry.do(SetAlias(model, "champion", 1))
    await registry.do(RenameModel(model, "renamed"))
    with pytest.raises(NotFound):
        await registry.store.get_model(model)
    found = await registry.store.get_model("renamed")
    assert (found.description, found.tags, found.aliases) == ("about it", {"team": "red"}, {"champion": 1})
    first = await registry.store.get_by_alias("renamed", "champion")
    assert (first.name, first.version, first.tags) == ("renamed", 1, {"a": "1"})
    assert await registry.version("renamed") == 3
    await registry.do(CreateModel(model))
    assert await registry.version(model) == 1


async def test_renaming_to_a_taken_name_changes_nothing(registry: Registry, model: str) -> None:
    await registry.do(CreateModel("other"))
    with pytest.raises(AlreadyExists):
        await registry.do(RenameModel(model, "other"))
    assert (await registry.store.get_model(model)).description == "about it"


async def test_deleting_a_model_deletes_everything_under_it(registry: Registry, model: str) -> None:
    await registry.version(model, tags={"a": "1"}, run_id="r")
    await registry.do(SetAlias(model, "champion", 1))
    await registry.do(DeleteModel(model))
    with pytest.raises(NotFound):
        await registry.store.get_model(model)
    assert await registry.store.list_versions(model, EVERY, 10) == []
    await registry.do(CreateModel(model))
    found = await registry.store.get_model(model)
    assert (found.tags, found.aliases, found.latest) == ({}, {}, [])


async def test_a_repeated_request_acts_once_and_gives_the_first_answer(registry: Registry, model: str) -> None:
    command = CreateVersion(model, "s3://b/m", "s3://b/m")
    answers = [await registry.do(command, "request-1") for _ in range(3)]
    answers += await asyncio.gather(*(registry.do(command, "request-1") for _ in range(5)))
    assert answers == [{"version": 1, "semantic_version": "1.0.0"}] * 8
    assert await registry.version(model) == 2
    created = CreateModel("once")
    assert [await registry.do(created, "request-2") for _ in range(2)] == [{}, {}]
    assert (await registry.events()).count(("CreateModel", "once")) == 1


async def test_a_repeat_reaches_a_new_coordinator_too(registry: Registry, model: str) -> None:
    command = CreateVersion(model, "s3://b/m", "s3://b/m")
    first = await registry.do(command, "request-1")
    other = await _service(registry.engine)
    assert await other.execute("request-1", [command]) == [first]
    assert len(await registry.store.list_versions(model, EVERY, 10)) == 1
    await other.stop()


async def test_a_request_that_failed_may_succeed_later(registry: Registry) -> None:
    with pytest.raises(NotFound):
        await registry.do(CreateVersion("late", "s3://b", "s3://b"), "request-1")
    await registry.do(CreateModel("late"))
    answer = await registry.do(CreateVersion("late", "s3://b", "s3://b"), "request-1")
    assert answer == {"version": 1, "semantic_version": "1.0.0"}


async def test_every_change_is_in_the_event_log_and_nothing_else_is(registry: Registry) -> None:
    commands: list[Command] = [
        CreateModel("m", "d", {"a": "1"}),
        CreateVersion("m", "s3://b", "s3://b", tags={"b": "2"}),
        UpdateModel("m", "e"),
        SetModelTag("m", "a", None),
        UpdateVersion("m", 1, "f"),
        SetVersionTag("m", 1, "c", "3"),
        SetAlias("m", "champion", 1),
        DeleteAlias("m", "champion"),
        RenameModel("m", "n"),
        DeleteVersion("n", 1),
        DeleteModel("n"),
    ]
    for number, command in enumerate(commands):
        await registry.do(command, f"request-{number}")
    with pytest.raises(NotFound):
        await registry.do(DeleteModel("n"), "refused")
    async with registry.engine.connect() as connection:
        rows = (await connection.execute(select(registry_event).order_by(registry_event.c.event_id))).all()
    assert [(row.request_id, row.kind, row.name, row.command) for row in rows] == [
        (f"request-{number}", type(command).__name__, command.name, asdict(command))
        for number, command in enumerate(commands)
    ]
    assert [row.answer for row in rows if row.kind == "CreateVersion"] == [{"version": 1, "semantic_version": "1.0.0"}]
    assert {row.epoch for row in rows} == {1}
    assert [row.created_at for row in rows] == sorted(row.created_at for row in rows)


async def test_a_coordinator_that_was_replaced_changes_nothing(registry: Registry, model: str) -> None:
    await registry.version(model)
    successor = await _service(registry.engine)
    before = await registry.store.get_model(model), await registry.events()
    for command in (CreateModel("new"), CreateVersion(model, "s3://b", "s3://b"), DeleteModel(model)):
        with pytest.raises(Fenced):
            await registry.do(command)
    assert (await registry.store.get_model(model), await registry.events()) == before
    [answer] = await successor.execute("next", [CreateVersion(model, "s3://b", "s3://b")])
    assert answer["version"] == 2
    await successor.stop()


async def test_commands_that_race_a_take_over_are_fenced_or_kept(registry: Registry, model: str) -> None:
    racing = [asyncio.create_task(registry.version(model)) for _ in range(30)]
    await racing[2]
    successor = await _service(registry.engine)
    answers = await asyncio.gather(*racing, return_exceptions=True)
    kept = [answer for answer in answers if isinstance(answer, int)]
    assert all(isinstance(answer, int | Fenced) for answer in answers)
    found = await registry.store.list_versions(model, EVERY, 100)
    assert sorted(version.version for version in found) == sorted(kept) == list(range(1, len(kept) + 1))
    await successor.stop()
