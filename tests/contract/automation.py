"""A leader for tests of schedules and triggers: a clock that stands still, and runs that nobody drives."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import BindParameter, DateTime, bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.lease import LeaseKeeper
from mlplat.db.tables import pipeline_run
from mlplat.pipelines.automation.firings import Recorded
from mlplat.pipelines.automation.schedules import Timing
from mlplat.pipelines.automation.service import Automation
from mlplat.pipelines.automation.store import AutomationStore, NewSchedule, NewTrigger
from mlplat.pipelines.automation.triggers import Filter, Kind, PipelineFilter, RegistryFilter, WebhookFilter
from mlplat.pipelines.automation.webhooks import Auth
from mlplat.pipelines.loader import build_spec
from mlplat.pipelines.model import Submission
from mlplat.pipelines.parsing import ParsedSpec, parse_json
from mlplat.pipelines.submissions import NewRun, SubmissionStore

KINDS: dict[type[WebhookFilter], Kind] = {
    RegistryFilter: Kind.REGISTRY,
    PipelineFilter: Kind.PIPELINE,
    WebhookFilter: Kind.WEBHOOK,
}


def definition(name: str = "report", **fields: Any) -> ParsedSpec:
    """A checked definition with the parameters ``about`` (str) and ``size`` (int)."""
    parameters = {"about": {"type": "str", "default": ""}, "size": {"type": "int", "default": 0}}
    document = {"name": name, "parameters": parameters, "steps": {"a": {"uses": "os:getcwd"}}, **fields}
    return parse_json(msgspec.json.encode(build_spec(document).to_json()))


@dataclass
class Clock:
    """Time that goes on when it is told to."""

    now: datetime = datetime(2031, 1, 6, 9, 0, tzinfo=UTC)  # a Monday

    @property
    def sql(self) -> BindParameter[datetime]:
        """The time as SQL."""
        return bindparam("clock", callable_=lambda: self.now, type_=DateTime(timezone=True))

    def forward(self, **units: float) -> None:
        """Some time passes."""
        self.now += timedelta(**units)


class Leader:
    """A scheduler's lease, its writes of runs, and its automation. A later one takes the lease from an earlier one."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self.lease = LeaseKeeper(engine, "scheduler", "the same actor", 600)
        self.submissions: list[Submission] = []
        self.before: Callable[[Submission], Awaitable[None]] | None = None
        self.after: Callable[[Submission], Awaitable[None]] | None = None
        self._engine = engine
        self._clock = clock

    async def start(self) -> Leader:
        """Takes the lease."""
        await self.lease.start()
        self._runs = SubmissionStore(self._engine, self.lease)
        self.automation = Automation(self._engine, self.lease, self.submit, self._clock.sql)
        return self

    async def submit(self, submission: Submission) -> str:
        """Stores the run as the scheduler does; ``before`` and ``after`` are called around the commit."""
        self.submissions.append(submission)
        if self.before is not None:
            await self.before(submission)
        parsed = parse_json(submission.spec)
        spec = parsed.spec
        new = NewRun(
            secrets.token_hex(6), spec.digest, spec.name, parsed.raw, dict(spec.resolve_params(submission.params)),
            submission.idempotency_key, submission.submitted_by, submission.source, 0, None, None, None, None, None,
        )  # fmt: skip
        run_id, _is_new = await self._runs.add(new)
        if self.after is not None:
            await self.after(submission)
        return run_id

    async def look(self) -> float:
        """One look, and the end of what it began."""
        delay = await self.automation.look()
        await self.automation.settle()
        return delay

    async def die(self) -> None:
        """Stops at once; its lease is not given back."""
        await self.automation.stop()
        await self._runs.close()


@dataclass
class Scene:
    """An empty database with a clock, a store, and leaders one after another."""

    engine: AsyncEngine
    clock: Clock = field(default_factory=Clock)
    leaders: list[Leader] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = AutomationStore(self.engine, self.clock.sql)

    async def leader(self) -> Leader:
        """A new leader; those before are over, whether they know it or not."""
        self.leaders.append(await Leader(self.engine, self.clock).start())
        return self.leaders[-1]

    async def close(self) -> None:
        """Ends all leaders."""
        for leader in self.leaders:
            await leader.die()
            await leader.lease.stop()

    async def schedule(self, name: str = "s", cron: str = "0 * * * *", **fields: Any) -> None:
        """A schedule; ``fields`` are of its timing, or ``params``, ``parsed``, ``paused``."""
        rest = {key: fields.pop(key) for key in ("paused", "created_by") if key in fields}
        params, parsed = fields.pop("params", {}), fields.pop("parsed", definition())
        await self.store.put_schedule(NewSchedule(name, parsed, params, Timing(cron, **fields), **rest))

    async def trigger(self, filter_: Filter, name: str = "t", **fields: Any) -> None:
        """A trigger; webhooks get the secret ``0123456789abcdef``."""
        kind = KINDS[type(filter_)]
        if kind is Kind.WEBHOOK:
            fields = {"auth": Auth.BEARER, "secret": "0123456789abcdef"} | fields
        params, parsed = fields.pop("params", {}), fields.pop("parsed", definition())
        await self.store.put_trigger(NewTrigger(name, parsed, params, filter_, kind, **fields))

    async def runs(self) -> list[Any]:
        """All pipeline runs, in the order of their keys."""
        query = select(pipeline_run).order_by(pipeline_run.c.idempotency_key, pipeline_run.c.run_id)
        async with self.engine.connect() as connection:
            return list((await connection.execute(query)).all())

    async def keys(self) -> list[str | None]:
        """The idempotency keys of all pipeline runs, in order."""
        return [row.idempotency_key for row in await self.runs()]

    async def firings(self, source: str) -> list[Recorded]:
        """What was decided, oldest first."""
        return (await self.store.find_firings(source, 1_000, None))[::-1]

    async def execute(self, statement: str, **values: Any) -> Any:
        """One statement in a transaction of its own; its rows if it has some."""
        async with self.engine.begin() as connection:
            result = await connection.execute(text(statement), values)
            return result.all() if result.returns_rows else None
