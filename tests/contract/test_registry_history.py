"""Aliases and stages of the registry: compare-and-set, several at once, and what the history says of them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import Conflict, InvalidInput, NotFound, PlatformError
from mlplat.registry.history import Subject
from mlplat.registry.history_store import RegistryHistory
from mlplat.registry.model import (
    ABSENT,
    Command,
    CreateModel,
    CreateVersion,
    DeleteAlias,
    DeleteModel,
    DeleteVersion,
    Origin,
    RenameModel,
    RollBackAlias,
    SetAlias,
    SetStage,
    Stage,
)
from mlplat.registry.semver import EVERY
from mlplat.registry.service import RegistryService
from mlplat.registry.store import RegistryStore
from tests.registry import registry_service


@dataclass(frozen=True)
class Registry:
    """A writer and the readers of one database."""

    engine: AsyncEngine
    service: RegistryService
    store: RegistryStore
    history: RegistryHistory

    async def do(self, *commands: Command, request_id: str | None = None, **origin: str) -> list[dict[str, Any]]:
        """One request of these commands."""
        return await self.service.execute(request_id or uuid.uuid4().hex, commands, Origin(**origin))

    async def model(self, versions: int, name: str = "m") -> str:
        """A model with so many versions."""
        await self.do(CreateModel(name))
        for _ in range(versions):
            await self.do(CreateVersion(name, "s3://b/m", "s3://b/m"))
        return name

    async def aliases(self, name: str = "m") -> dict[str, int]:
        """Its aliases."""
        return (await self.store.get_model(name)).aliases

    async def stages(self, name: str = "m") -> dict[int, str]:
        """The stages of its versions."""
        return {found.version: found.stage for found in await self.store.list_versions(name, EVERY, 1_000)}

    async def told(self, name: str = "m", subject: Subject | None = None) -> list[tuple[str, str | None, str | None]]:
        """Key, before and after of each change, oldest first."""
        found = await self.history.changes(name, subject, None, 1_000)
        return [(item.change.key, item.change.before, item.change.after) for item in reversed(found)]

    async def now(self) -> datetime:
        """The database's clock, by which events are stamped."""
        async with self.engine.connect() as connection:
            found: datetime = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
        return found


@pytest.fixture
async def registry(engine: AsyncEngine) -> AsyncIterator[Registry]:
    service = registry_service(engine)
    await service.start()
    yield Registry(engine, service, RegistryStore(engine), RegistryHistory(engine))
    await service.stop()


async def test_an_alias_moves_only_from_where_it_is_expected(registry: Registry) -> None:
    await registry.model(3)
    await registry.do(SetAlias("m", "champion", 1, ABSENT))
    with pytest.raises(Conflict, match="alias champion points at version 1; expected was that it is not set"):
        await registry.do(SetAlias("m", "champion", 2, ABSENT))
    with pytest.raises(Conflict, match="points at version 1; expected was that it points at version 3"):
        await registry.do(DeleteAlias("m", "champion", 3))
    await registry.do(SetAlias("m", "champion", 2, 1))
    assert await registry.aliases() == {"champion": 2}
    await registry.do(DeleteAlias("m", "champion", 2))
    with pytest.raises(Conflict, match="is not set; expected was that it points at version 2"):
        await registry.do(SetAlias("m", "champion", 3, 2))
    assert await registry.aliases() == {}
    assert await registry.told(subject=Subject.ALIAS) == [
        ("champion", None, "1"), ("champion", "1", "2"), ("champion", "2", None)
    ]  # fmt: skip


async def test_of_many_who_expect_the_same_one_wins(registry: Registry) -> None:
    await registry.model(9)
    await registry.do(SetAlias("m", "champion", 1))
    moves = (registry.do(SetAlias("m", "champion", version, 1)) for version in range(2, 10))
    answers = await asyncio.gather(*moves, return_exceptions=True)
    assert sum(isinstance(answer, Conflict) for answer in answers) == 7
    assert len(await registry.told(subject=Subject.ALIAS)) == 2


async def test_several_moves_are_one(registry: Registry) -> None:
    await registry.model(2)
    await registry.do(SetAlias("m", "champion", 1))
    swap = [SetAlias("m", "previous", 1, ABSENT), SetAlias("m", "champion", 2, 1)]
    await registry.do(*swap, request_id="swap")
    assert await registry.do(*swap, request_id="swap") == [{}, {}]  # a repeat does nothing
    assert await registry.aliases() == {"champion": 2, "previous": 1}
    with pytest.raises(InvalidInput, match="was used for another request"):
        await registry.do(*swap[:1], request_id="swap")
    with pytest.raises(Conflict):
        await registry.do(SetAlias("m", "previous", 2), DeleteAlias("m", "champion", 1))
    assert await registry.aliases() == {"champion": 2, "previous": 1}  # nothing of it
    assert len(await registry.told(subject=Subject.ALIAS)) == 3


async def test_who_when_and_why_stay_in_the_history(registry: Registry) -> None:
    await registry.model(2)
    before = await registry.now()
    await registry.do(SetAlias("m", "champion", 1), request_id="r1", user_id="ann", reason="better on the holdout")
    await registry.do(SetAlias("m", "champion", 1), user_id="bob")  # changes nothing
    [found] = await registry.history.changes("m", Subject.ALIAS, "champion", 10)
    assert (found.user_id, found.reason, found.request_id) == ("ann", "better on the holdout", "r1")
    assert before <= found.at <= await registry.now()


async def test_history_comes_in_pages(registry: Registry) -> None:
    await registry.model(2)
    for number in range(10):
        await registry.do(SetAlias("m", "a", 1 + number % 2))
    whole = await registry.history.changes("m", Subject.ALIAS, None, 100)
    assert len(whole) == 10
    pages, before = [], None
    while page := await registry.history.changes("m", Subject.ALIAS, None, 3, before):
        pages += page
        before = page[-1].change_id
    assert pages == whole


async def test_stages_move_and_others_make_way(registry: Registry) -> None:
    await registry.model(3)
    await registry.do(SetStage("m", 1, Stage.PRODUCTION))
    await registry.do(SetStage("m", 2, Stage.PRODUCTION))
    await registry.do(SetStage("m", 3, Stage.PRODUCTION, archive_others=True))
    assert await registry.stages() == {1: "Archived", 2: "Archived", 3: "Production"}
    model = await registry.store.get_model("m")
    assert [(found.version, found.stage) for found in model.latest] == [(3, "Production"), (2, "Archived")]
    for stage in (Stage.NONE, Stage.ARCHIVED):
        with pytest.raises(InvalidInput, match=f"because '{stage}' is not an Active stage"):
            await registry.do(SetStage("m", 3, stage, archive_others=True))
    with pytest.raises(NotFound):
        await registry.do(SetStage("m", 9, Stage.STAGING))
    assert await registry.told(subject=Subject.STAGE) == [
        ("1", None, "None"), ("2", None, "None"), ("3", None, "None"),
        ("1", "None", "Production"), ("2", "None", "Production"),
        ("3", "None", "Production"), ("1", "Production", "Archived"), ("2", "Production", "Archived"),
    ]  # fmt: skip


async def test_what_was_production_last_tuesday(registry: Registry) -> None:
    await registry.model(2)
    await registry.do(SetAlias("m", "champion", 1), SetStage("m", 1, Stage.PRODUCTION))
    tuesday = await registry.now()
    await registry.do(SetAlias("m", "champion", 2), SetStage("m", 2, Stage.PRODUCTION, archive_others=True))
    await registry.do(DeleteVersion("m", 1))
    found = await registry.history.at("m", tuesday)
    assert (found.aliases, found.stages) == ({"champion": 1}, {1: "Production", 2: "None"})
    found = await registry.history.at("m", await registry.now())
    assert (found.aliases, found.stages) == ({"champion": 2}, {2: "Production"})
    with pytest.raises(NotFound):
        await registry.history.at("m", tuesday - timedelta(days=365))


async def test_a_name_is_followed_through_renames_and_deletions(registry: Registry) -> None:
    await registry.model(1)
    await registry.do(SetAlias("m", "a", 1))
    as_m = await registry.now()
    await registry.do(RenameModel("m", "n"))
    as_n = await registry.now()
    await registry.model(1, "m")  # another one of the old name
    await registry.do(DeleteModel("n"))
    assert (await registry.history.at("m", as_m)).aliases == {"a": 1}
    assert (await registry.history.at("n", as_n)).aliases == {"a": 1}
    with pytest.raises(NotFound):
        await registry.history.at("m", as_n)
    with pytest.raises(NotFound):
        await registry.history.at("n", await registry.now())
    assert (await registry.history.at("m", await registry.now())).aliases == {}
    # The history of a deleted model stays, and is not that of another.
    assert await registry.told("n", Subject.MODEL) == [("name", None, "m"), ("name", "m", "n"), ("name", "n", None)]
    assert await registry.told("m", Subject.ALIAS) == []
    with pytest.raises(NotFound):
        await registry.told("never")


async def test_what_goes_with_a_version_is_told(registry: Registry) -> None:
    await registry.model(2)
    await registry.do(SetAlias("m", "b", 1), SetAlias("m", "a", 1), SetAlias("m", "c", 2))
    await registry.do(DeleteVersion("m", 1))
    assert (await registry.told())[-3:] == [("a", "1", None), ("b", "1", None), ("1", "None", None)]


async def test_a_rollback_goes_to_where_the_alias_was_before_its_last_change(registry: Registry) -> None:
    await registry.model(3)
    back = RollBackAlias("m", "a")
    with pytest.raises(InvalidInput, match="alias a not found"):
        await registry.do(back)
    await registry.do(SetAlias("m", "a", 1))
    with pytest.raises(InvalidInput, match="did not exist before"):
        await registry.do(back)
    await registry.do(SetAlias("m", "a", 2))
    assert [await registry.do(back, request_id="back") for _twice in range(2)] == [[{"version": 1, "was": 2}]] * 2
    assert await registry.aliases() == {"a": 1}
    assert await registry.do(back) == [{"version": 2, "was": 1}]
    await registry.do(SetAlias("m", "a", 3), DeleteVersion("m", 2))
    with pytest.raises(NotFound, match="version=2"):
        await registry.do(back)
    assert await registry.aliases() == {"a": 3}
    await registry.do(DeleteAlias("m", "a"))
    with pytest.raises(InvalidInput, match="alias a not found"):
        await registry.do(back)
    with pytest.raises(NotFound):
        await registry.do(RollBackAlias("nobody", "a"))


_VERSIONS = st.integers(1, 4)
_EXPECTED = st.none() | st.integers(0, 3)
_ALIASES = st.sampled_from(["a", "b"])
_COMMANDS = st.one_of(
    st.builds(SetAlias, st.just("m"), _ALIASES, _VERSIONS, _EXPECTED),
    st.builds(DeleteAlias, st.just("m"), _ALIASES, _EXPECTED),
    st.builds(SetStage, st.just("m"), _VERSIONS, st.sampled_from(Stage), st.booleans()),
    st.builds(DeleteVersion, st.just("m"), _VERSIONS),
)


class Model:
    """What the registry should do, in plain Python."""

    def __init__(self) -> None:
        self.aliases: dict[str, int] = {}
        self.stages: dict[int, str] = dict.fromkeys((1, 2, 3), "None")

    def take(self, requests: list[Command]) -> bool:
        """Whether the request is accepted; all of it or nothing."""
        aliases, stages = dict(self.aliases), dict(self.stages)
        if all(self._take(command) for command in requests):
            return True
        self.aliases, self.stages = aliases, stages
        return False

    def _take(self, command: Command) -> bool:
        match command:
            case SetAlias(_, alias, version, expected):
                if version not in self.stages or expected not in {None, self.aliases.get(alias, ABSENT)}:
                    return False
                self.aliases[alias] = version
            case DeleteAlias(_, alias, expected):
                if expected not in {None, self.aliases.get(alias, ABSENT)}:
                    return False
                self.aliases.pop(alias, None)
            case SetStage(_, version, stage, archive_others):
                if version not in self.stages or (archive_others and stage not in {"Staging", "Production"}):
                    return False
                if archive_others:
                    self.stages |= {
                        n: "Archived" for n, found in self.stages.items() if found == stage and n != version
                    }
                self.stages[version] = stage
            case DeleteVersion(_, version):
                if self.stages.pop(version, None) is None:
                    return False
                self.aliases = {alias: found for alias, found in self.aliases.items() if found != version}
        return True


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(st.lists(_COMMANDS, min_size=1, max_size=3), max_size=12))
async def test_aliases_and_stages_are_what_the_rules_say_now_and_at_every_moment(
    registry: Registry, requests: list[list[Command]]
) -> None:
    name = f"m{uuid.uuid4().hex[:8]}"
    await registry.model(3, name)
    model = Model()
    moments = [(await registry.now(), dict(model.aliases), dict(model.stages))]
    for commands in requests:
        accepted = model.take(commands)
        renamed = [type(command)(**{**vars(command), "name": name}) for command in commands]
        try:
            await registry.do(*renamed)
            assert accepted, commands
        except PlatformError:
            assert not accepted, commands
        assert await registry.aliases(name) == model.aliases
        assert await registry.stages(name) == model.stages
        moments.append((await registry.now(), dict(model.aliases), dict(model.stages)))
    for moment, aliases, stages in moments:
        found = await registry.history.at(name, moment)
        assert (found.aliases, found.stages) == (aliases, stages)
    assert (await registry.history.at(name, datetime.now(UTC) + timedelta(days=1))).aliases == model.aliases
