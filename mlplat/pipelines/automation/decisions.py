"""What a look at due schedules, and at new events, leads to. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from mlplat.errors import InvalidInput
from mlplat.pipelines.automation.firings import Firing, FiringState
from mlplat.pipelines.automation.schedules import Schedule, due
from mlplat.pipelines.automation.templates import render_params, scope_of
from mlplat.pipelines.automation.triggers import Event, Trigger, decide, too_many
from mlplat.pipelines.spec import PipelineSpec

#: The definition with a digest. Raises InvalidInput when it cannot be read any more.
SpecOf = Callable[[str], PipelineSpec]


def fire_times(schedule: Schedule, now: datetime, spec_of: SpecOf) -> tuple[list[Firing], datetime | None]:
    """What a schedule whose time has come asks for, and the fire time that it waits for next."""
    assert schedule.next_at is not None, "only schedules that wait for something are due"
    source = f"schedule:{schedule.name}"
    try:
        found = due(schedule.timing, schedule.next_at, now)
        spec = spec_of(schedule.digest)
    except InvalidInput as error:  # an earlier version took the definition, or another system knew the time zone
        return [_failed(source, schedule.next_at, str(error))], None
    firings = []
    if found.missed is not None:
        first, last = found.missed
        reason = f"missed: the fire times from {_text(first)} to {_text(last)} ({schedule.timing.catch_up})"
        event_id = f"missed:{_text(last)}"
        firings.append(Firing(source, event_id, last, state=FiringState.SKIPPED, reason=reason))
    firings += [_firing(schedule, source, moment, spec) for moment in found.fire]
    return firings, found.next_at


def decide_all(
    triggers: Sequence[Trigger],
    events: Sequence[Event],
    lineages: Mapping[str, list[str]],
    recent: Mapping[str, int],
    spec_of: SpecOf,
) -> list[Firing]:
    """What triggers make of events.

    Args:
        lineages: the triggers that led to the pipeline runs which made the events.
        recent: how often each source has fired within the last hour.
    """
    fired = Counter(recent)
    firings: list[Firing] = []
    for event in events:
        lineage = lineages.get(event.run_id or "", [])
        for trigger in triggers:
            firing = _decide(trigger, event, spec_of, lineage)
            if firing is None:
                continue
            if firing.state is FiringState.PENDING:
                fired[trigger.source] += 1
                if fired[trigger.source] > trigger.max_per_hour:
                    firing = too_many(firing, trigger)
            firings.append(firing)
    return firings


def _decide(trigger: Trigger, event: Event, spec_of: SpecOf, lineage: Sequence[str]) -> Firing | None:
    try:
        return decide(trigger, event, spec_of(trigger.digest), lineage)
    except InvalidInput as error:  # an earlier version took the definition
        return Firing(trigger.source, event.event_id, event.at, state=FiringState.FAILED, reason=str(error))


def _firing(schedule: Schedule, source: str, moment: datetime, spec: PipelineSpec) -> Firing:
    scope = scope_of(schedule.name, moment.astimezone(schedule.timing.parse().zone))
    try:
        params = render_params(spec, schedule.params, scope)
    except InvalidInput as error:
        return _failed(source, moment, str(error))
    return Firing(source, _text(moment), moment, schedule.digest, dict(params), schedule.created_by)


def _failed(source: str, moment: datetime, reason: str) -> Firing:
    return Firing(source, _text(moment), moment, state=FiringState.FAILED, reason=reason)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
