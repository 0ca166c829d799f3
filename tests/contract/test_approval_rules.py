"""Aliases, stages and approvals against a model of their rules, in whatever order people act."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import open_engine
from mlplat.errors import PlatformError
from mlplat.registry.history import Subject
from mlplat.registry.model import (
    Command,
    CreateModel,
    CreateVersion,
    Decide,
    DeleteAlias,
    DeleteVersion,
    Origin,
    RequestMove,
    RollBackAlias,
    SetAlias,
    SetPolicy,
    SetStage,
    Stage,
    WithdrawMove,
)
from mlplat.registry.move_store import MoveStore
from mlplat.registry.semver import EVERY
from mlplat.registry.service import RegistryService
from mlplat.registry.store import RegistryStore
from tests.registry import registry_service

LEADS = ("ann", "bob", "eve")
POLICY = {
    "roles": {"leads": list(LEADS), "operators": ["kim"]},
    "managed_by": "operators",
    "stages": {
        "Production": {"approvals": 2, "role": "leads", "from": ["Staging"], "card": True},
        "Archived": {"role": "leads"},
    },
    "aliases": {"champion": {"approvals": 1, "role": "leads"}, "canary": {"role": "operators"}},
}
NEEDED = {"Production": 2, "champion": 1}
USERS = st.sampled_from([*LEADS, "kim", "zoe", ""])
VERSIONS = st.integers(1, 4)
TARGETS = st.sampled_from(["Production", "champion"])
ALIASES = st.sampled_from(["champion", "canary", "free"])


@dataclass
class Asked:
    """A request as the rules see it."""

    by: str
    target: str
    version: int
    before: object
    archive: bool
    state: str = "OPEN"
    approvals: set[str] = field(default_factory=set)


@dataclass
class Rules:
    """What may happen, in the plainest words; each method says whether it may, and does it."""

    stages: dict[int, Stage] = field(default_factory=dict)
    cards: dict[int, bool] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    was: dict[str, int | None] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)

    def set_stage(self, user: str, version: int, stage: Stage, archive: bool, approved: bool = False) -> bool:
        if version not in self.stages or not self._may_move(user, version, stage, approved):
            return False
        others = [n for n, at in self.stages.items() if at == stage and n != version]
        if archive:
            if stage not in {Stage.STAGING, Stage.PRODUCTION}:
                return False
            if not all(self._may_move(user, other, Stage.ARCHIVED, approved) for other in others):
                return False
            self.stages |= dict.fromkeys(others, Stage.ARCHIVED)
        self.stages[version] = stage
        return True

    def _may_move(self, user: str, version: int, to: Stage, approved: bool) -> bool:
        before = self.stages[version]
        if before == to:
            return True
        if to == Stage.PRODUCTION:
            return approved and before == Stage.STAGING and self.cards[version]
        protected = {before, to} & {Stage.PRODUCTION, Stage.ARCHIVED}
        return approved or not protected or user in LEADS

    def set_alias(self, user: str, alias: str, version: int, approved: bool = False) -> bool:
        if version not in self.stages:
            return False
        if self.aliases.get(alias) == version:
            return True
        if (alias == "champion" and not approved) or (alias == "canary" and user != "kim"):
            return False
        self._point(alias, version)
        return True

    def delete_alias(self, user: str, alias: str) -> bool:
        if not self._keeps(user, alias):
            return False
        if alias in self.aliases:
            self.was[alias] = self.aliases.pop(alias)
        return True

    def roll_back(self, user: str, alias: str) -> bool:
        back = self.was.get(alias)
        if not self._keeps(user, alias) or alias not in self.aliases or back is None or back not in self.stages:
            return False
        self._point(alias, back)
        return True

    def delete_version(self, version: int) -> bool:
        held = {alias for alias, found in self.aliases.items() if found == version}
        if version not in self.stages or held & {"champion", "canary"}:
            return False
        if self.stages[version] in {Stage.PRODUCTION, Stage.ARCHIVED}:
            return False
        del self.stages[version]
        for alias in held:
            self.was[alias] = self.aliases.pop(alias)
        for asked in self.asked.values():
            if asked.version == version and asked.state == "OPEN":
                asked.state = "CANCELLED"
        return True

    def request(self, user: str, target: str, version: int, archive: bool) -> Asked | None:
        if target not in NEEDED or version not in self.stages or not user:
            return None
        before: object = self.stages[version] if target == "Production" else self.aliases.get(target)
        if target == "Production":
            if not Rules(dict(self.stages), self.cards).set_stage(user, version, Stage.PRODUCTION, archive, True):
                return None
            if before == Stage.PRODUCTION and not archive:
                return None
        elif before == version or archive:
            return None
        if any((a.target, a.version, a.state) == (target, version, "OPEN") for a in self.asked.values()):
            return None
        return Asked(user, target, version, before, archive)

    def decide(self, user: str, number: int, approve: bool, reason: str) -> bool:
        asked = self.asked[number]
        if asked.state != "OPEN" or user == asked.by or user not in LEADS or user in asked.approvals:
            return False
        if not approve:
            if reason:
                asked.state = "REJECTED"
            return bool(reason)
        if len(asked.approvals) + 1 == NEEDED[asked.target] and not self._make(asked):
            return False
        asked.approvals.add(user)
        return True

    def withdraw(self, user: str, number: int) -> bool:
        asked = self.asked[number]
        if asked.state != "OPEN" or user != asked.by:
            return False
        asked.state = "WITHDRAWN"
        return True

    def _make(self, asked: Asked) -> bool:
        if asked.target == "Production":
            same = self.stages[asked.version] == asked.before
            made = same and self.set_stage(asked.by, asked.version, Stage.PRODUCTION, asked.archive, True)
        else:
            same = self.aliases.get(asked.target) == asked.before
            made = same and self.set_alias(asked.by, asked.target, asked.version, True)
        if made:
            asked.state = "APPROVED"
        return made

    def _keeps(self, user: str, alias: str) -> bool:
        return {"champion": user in LEADS, "canary": user == "kim"}.get(alias, True)

    def _point(self, alias: str, version: int) -> None:
        before = self.aliases.get(alias)
        if before != version:
            self.was[alias] = before
            self.aliases[alias] = version


class People(RuleBasedStateMachine):
    """Everybody acts; the registry and the rules must agree on what came of it."""

    runner: asyncio.Runner
    engine: AsyncEngine
    service: RegistryService

    def __init__(self) -> None:
        super().__init__()
        self.name = f"m{uuid.uuid4().hex[:8]}"
        self.expected = Rules()
        self.store, self.moves = RegistryStore(self.engine), MoveStore(self.engine)
        assert self.send("kim", CreateModel(self.name)) is not None
        for version in (1, 2, 3):
            assert self.send("", self._version(card=version > 1)) is not None
            self.expected.stages[version], self.expected.cards[version] = Stage.NONE, version > 1
        assert self.send("kim", SetPolicy(self.name, POLICY)) is not None

    def _version(self, card: bool) -> CreateVersion:
        return CreateVersion(self.name, "s3://b/m", "s3://b/m", description="a card" if card else " ")

    def send(self, user: str, command: Command, reason: str = "") -> dict[str, object] | None:
        """The answer; None if it was refused."""
        request = self.service.execute(uuid.uuid4().hex, [command], Origin(user, reason))
        try:
            [answer] = self.runner.run(request)
        except PlatformError:
            return None
        return answer

    def agree(self, allowed: bool, user: str, command: Command, reason: str = "") -> None:
        """The registry takes the command exactly if it is allowed."""
        assert (self.send(user, command, reason) is not None) == allowed, (user, command)

    @rule(user=USERS, version=VERSIONS, stage=st.sampled_from(Stage), archive=st.booleans())
    def set_stage(self, user: str, version: int, stage: Stage, archive: bool) -> None:
        allowed = self.expected.set_stage(user, version, stage, archive)
        self.agree(allowed, user, SetStage(self.name, version, stage, archive))

    @rule(user=USERS, alias=ALIASES, version=VERSIONS)
    def set_alias(self, user: str, alias: str, version: int) -> None:
        self.agree(self.expected.set_alias(user, alias, version), user, SetAlias(self.name, alias, version))

    @rule(user=USERS, alias=ALIASES)
    def delete_alias(self, user: str, alias: str) -> None:
        self.agree(self.expected.delete_alias(user, alias), user, DeleteAlias(self.name, alias))

    @rule(user=USERS, alias=ALIASES)
    def roll_back(self, user: str, alias: str) -> None:
        self.agree(self.expected.roll_back(user, alias), user, RollBackAlias(self.name, alias))

    @rule(user=USERS, version=VERSIONS)
    def delete_version(self, user: str, version: int) -> None:
        self.agree(self.expected.delete_version(version), user, DeleteVersion(self.name, version))

    @rule(user=st.sampled_from([*LEADS, "zoe", ""]))
    def change_the_policy_without_being_allowed_to(self, user: str) -> None:
        self.agree(False, user, SetPolicy(self.name, {}))

    @rule(user=USERS, version=VERSIONS, where=TARGETS, archive=st.booleans())
    def request(self, user: str, version: int, where: str, archive: bool) -> None:
        subject = Subject.STAGE if where == "Production" else Subject.ALIAS
        asked = self.expected.request(user, where, version, archive)
        answer = self.send(user, RequestMove(self.name, subject, where, version, archive), "please")
        assert (answer is not None) == (asked is not None), (user, version, where, archive)
        if asked is not None and answer is not None:
            self.expected.asked[int(str(answer["move_id"]))] = asked

    @rule(
        version=st.sampled_from([2, 3]),
        users=st.permutations(LEADS),
        where=TARGETS,
        meanwhile=st.sampled_from(["nothing", "self", "twice", "moved", "deleted"]),
    )
    def go_the_whole_way(self, version: int, users: list[str], where: str, meanwhile: str) -> None:
        """What random steps seldom reach."""
        by, first, last = users
        if where == "Production":
            self.set_stage(by, version, Stage.STAGING, archive=False)
        before = set(self.expected.asked)
        self.request(by, version, where, archive=False)
        for number in set(self.expected.asked) - before:
            if meanwhile == "self":
                self.approve(by, number)
            self.approve(first, number)
            if meanwhile == "twice":
                self.approve(first, number)
            if meanwhile == "moved" and where == "Production":
                self.set_stage(last, version, Stage.NONE, archive=False)
            if meanwhile == "deleted":
                self.delete_version(last, version)
            self.approve(last, number)

    def approve(self, user: str, number: int) -> None:
        """Says yes, if that is allowed."""
        self.agree(self.expected.decide(user, number, True, ""), user, Decide(self.name, number, True))

    @rule(versions=st.permutations([1, 2, 3]), users=st.permutations(LEADS))
    def ask_for_two_and_approve_both(self, versions: list[int], users: list[str]) -> None:
        """The second one was asked for when the alias was elsewhere."""
        before = set(self.expected.asked)
        for version in versions[:2]:
            self.request(users[0], version, "champion", archive=False)
        for number in sorted(set(self.expected.asked) - before):
            self.approve(users[1], number)

    @precondition(lambda self: self.expected.asked)
    @rule(data=st.data(), user=USERS, approve=st.booleans(), reason=st.sampled_from(["", "no"]))
    def decide(self, data: st.DataObject, user: str, approve: bool, reason: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.expected.asked)))
        allowed = self.expected.decide(user, number, approve, reason)
        self.agree(allowed, user, Decide(self.name, number, approve), reason)

    @precondition(lambda self: self.expected.asked)
    @rule(data=st.data(), user=USERS)
    def withdraw(self, data: st.DataObject, user: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.expected.asked)))
        self.agree(self.expected.withdraw(user, number), user, WithdrawMove(self.name, number))

    @precondition(lambda self: self.expected.asked)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.expected.asked)))
        self.runner.run(self._expire(number))
        if self.expected.asked[number].state == "OPEN":
            self.expected.asked[number].state = "EXPIRED"

    async def _expire(self, number: int) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(
                text("UPDATE move_request SET expires_at = clock_timestamp() WHERE move_id = :id"), {"id": number}
            )

    @invariant()
    def the_registry_is_what_the_rules_say(self) -> None:
        stages, aliases, states = self.runner.run(self._look())
        assert stages == self.expected.stages
        assert aliases == self.expected.aliases
        assert states == {number: asked.state for number, asked in self.expected.asked.items()}

    async def _look(self) -> tuple[dict[int, Stage], dict[str, int], dict[int, str]]:
        versions = await self.store.list_versions(self.name, EVERY, 100)
        moves = await self.moves.search_moves(self.name, None, 1_000)
        return (
            {version.version: version.stage for version in versions},
            (await self.store.get_model(self.name)).aliases,
            {move.move_id: move.state.value for move in moves},
        )


@contextmanager
def opened(database_url: str) -> Iterator[type[People]]:
    """People at one registry; each example has a model of its own."""
    with asyncio.Runner() as runner:
        engine = open_engine(database_url, "tests", pool_size=3)
        service = registry_service(engine)
        runner.run(service.start())
        yield type("Here", (People,), {"runner": runner, "engine": engine, "service": service})
        runner.run(service.stop())
        runner.run(engine.dispose())


def test_the_registry_keeps_to_the_rules_whatever_people_do(database_url: str) -> None:
    with opened(database_url) as machine:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
