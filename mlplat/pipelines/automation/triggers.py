"""Triggers: which events start a pipeline, and with which parameters.

No trigger fires for what it has led to itself: a run carries the names of the triggers that it goes back to, and an
event that such a run makes is skipped by them. What cannot be traced back is bounded by ``max_per_hour``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field

from mlplat.db.snapshots import Snapshot
from mlplat.errors import InvalidInput
from mlplat.pipelines.automation.firings import Firing, FiringState
from mlplat.pipelines.automation.templates import check_expression, check_template, render_params, scope_of
from mlplat.pipelines.expressions import find_expressions, render
from mlplat.pipelines.parameters import Strict
from mlplat.pipelines.spec import PipelineSpec

#: Commands of the registry, by the name that its events have here.
REGISTRY_EVENTS = {
    "CreateModel": "model_created",
    "UpdateModel": "model_updated",
    "RenameModel": "model_renamed",
    "DeleteModel": "model_deleted",
    "SetModelTag": "model_tag_set",
    "CreateVersion": "version_created",
    "UpdateVersion": "version_updated",
    "DeleteVersion": "version_deleted",
    "SetVersionTag": "version_tag_set",
    "SetAlias": "alias_set",
    "DeleteAlias": "alias_deleted",
    "RollBackAlias": "alias_set",
    "SetStage": "stage_set",
    "ReportTampering": "version_tampered",
    "SetPolicy": "policy_set",
    "RequestMove": "move_requested",
    "Decide": "move_decided",
    "WithdrawMove": "move_withdrawn",
}
RegistryEvent = Literal[
    "model_created", "model_updated", "model_renamed", "model_deleted", "model_tag_set", "version_created",
    "version_updated", "version_deleted", "version_tag_set", "alias_set", "alias_deleted", "stage_set",
    "version_tampered", "policy_set", "move_requested", "move_decided", "move_withdrawn",
]  # fmt: skip
EndState = Literal["SUCCEEDED", "FAILED", "CANCELLED"]
#: A name, or a pattern with ``*``, ``?`` and ``[…]``.
Pattern = Annotated[str, Field(min_length=1, max_length=250)]


class Kind(StrEnum):
    """What a trigger waits for."""

    REGISTRY = "registry"
    PIPELINE = "pipeline"
    WEBHOOK = "webhook"


class WebhookFilter(Strict):
    """Requests to the trigger's address."""

    #: An expression over ``trigger``; the event counts when it gives something.
    when: str | None = Field(default=None, max_length=2_000)

    def accepts(self, _event: Mapping[str, Any]) -> bool:
        """Whether the event is meant, before ``when`` is asked."""
        return True


class RegistryFilter(WebhookFilter):
    """Changes of the registry."""

    events: list[RegistryEvent] = Field(default=["version_created"], min_length=1)
    model: Pattern = "*"
    #: Of events that have one.
    alias: Pattern = "*"

    def accepts(self, event: Mapping[str, Any]) -> bool:
        """Whether the event is meant, before ``when`` is asked."""
        return (
            event["kind"] in self.events
            and fnmatchcase(event["model"], self.model)
            and ("alias" not in event or fnmatchcase(event["alias"], self.alias))
        )


class PipelineFilter(WebhookFilter):
    """Ends of pipeline runs. Runs of sub-pipelines are none of their own."""

    pipelines: list[Pattern] = Field(min_length=1, max_length=100)
    states: list[EndState] = Field(default=["SUCCEEDED"], min_length=1)

    def accepts(self, event: Mapping[str, Any]) -> bool:
        """Whether the event is meant, before ``when`` is asked."""
        return event["state"] in self.states and self.names(event["pipeline"])

    def names(self, pipeline: str) -> bool:
        """Whether runs of that pipeline are meant."""
        return any(fnmatchcase(pipeline, pattern) for pattern in self.pipelines)


Filter = WebhookFilter | RegistryFilter | PipelineFilter
FILTERS: Mapping[Kind, type[WebhookFilter]] = {
    Kind.REGISTRY: RegistryFilter,
    Kind.PIPELINE: PipelineFilter,
    Kind.WEBHOOK: WebhookFilter,
}


@dataclass(frozen=True)
class Trigger:
    """A pipeline that runs when something happens.

    ``since`` are the transactions that were over before the trigger was there, or was resumed. ``auth`` is how requests
    to a webhook prove where they come from, ``bearer`` or ``signature``.
    """

    name: str
    kind: Kind
    pipeline: str
    digest: str
    params: dict[str, Any]
    filter: Filter
    max_per_hour: int
    paused: bool
    since: Snapshot
    auth: str | None
    last_at: datetime | None
    last_run_id: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime

    @property
    def source(self) -> str:
        """What its firings and runs are marked with."""
        return f"trigger:{self.name}"


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Args:
        body: what ``trigger.event`` reads.
        transaction: the one that made it; None: it came by itself.
        run_id: the pipeline run that made it, if that is known.
    """

    event_id: str
    at: datetime
    body: dict[str, Any]
    transaction: int | None = None
    run_id: str | None = None


def check_trigger(spec: PipelineSpec, kind: Kind, filter_: Filter, params: Mapping[str, Any]) -> None:
    """Checks what can be known before the first event.

    Raises:
        InvalidInput: one problem a line.
    """
    if isinstance(filter_, PipelineFilter) and filter_.names(spec.name):
        raise InvalidInput(f"filter.pipelines: matches {spec.name!r}, which the trigger runs: it would start itself")
    if filter_.when is not None:
        expressions = [expression for _path, expression in find_expressions(filter_.when)]
        if not expressions:
            raise InvalidInput("filter.when: expected an expression, as in ${{ trigger.event.kind == 'x' }}")
        for expression in expressions:
            check_expression(expression)
    check_template(spec, params)


def decide(trigger: Trigger, event: Event, spec: PipelineSpec, lineage: Sequence[str]) -> Firing | None:
    """What the trigger makes of an event; None if it is not meant.

    Args:
        lineage: the triggers that led to the event.
    """
    if not _is_meant(trigger, event):
        return None
    scope = scope_of(trigger.name, event.at, event.body)
    try:
        if trigger.filter.when is not None and not render(trigger.filter.when, scope):
            return None
        if trigger.name in lineage:
            path = " → ".join([*lineage[lineage.index(trigger.name) :], trigger.name])
            return _without_run(trigger, event, FiringState.SKIPPED, f"it has led to this event itself: {path}")
        params = render_params(spec, trigger.params, scope)
    except InvalidInput as error:
        return _without_run(trigger, event, FiringState.FAILED, str(error))
    except RecursionError:
        return _without_run(trigger, event, FiringState.FAILED, "the event is nested too deeply")
    return Firing(
        trigger.source, event.event_id, event.at, trigger.digest, dict(params), trigger.created_by,
        [*lineage, trigger.name],
    )  # fmt: skip


def _is_meant(trigger: Trigger, event: Event) -> bool:
    is_old = event.transaction is not None and trigger.since.sees(event.transaction)
    return not trigger.paused and not is_old and trigger.filter.accepts(event.body)


def too_many(firing: Firing, trigger: Trigger) -> Firing:
    """The firing as it is recorded when the trigger has fired too often."""
    reason = f"more than {trigger.max_per_hour} firings in an hour (max_per_hour)"
    return Firing(firing.source, firing.event_id, firing.event_at, state=FiringState.SKIPPED, reason=reason)


def _without_run(trigger: Trigger, event: Event, state: FiringState, reason: str) -> Firing:
    return Firing(trigger.source, event.event_id, event.at, state=state, reason=reason)
