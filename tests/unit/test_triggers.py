"""Triggers: which events count, what they become, loops, and the secrets of webhooks."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mlplat.db.snapshots import Snapshot
from mlplat.errors import InvalidInput, PermissionDenied
from mlplat.pipelines.automation.decisions import decide_all
from mlplat.pipelines.automation.firings import Firing, FiringState
from mlplat.pipelines.automation.triggers import (
    REGISTRY_EVENTS,
    Event,
    Filter,
    Kind,
    PipelineFilter,
    RegistryEvent,
    RegistryFilter,
    Trigger,
    WebhookFilter,
    check_trigger,
    decide,
)
from mlplat.pipelines.automation.webhooks import Auth, signature, stored_secret, verify
from mlplat.pipelines.loader import build_spec
from mlplat.registry.model import Command

NOW = datetime(2026, 1, 5, 9, tzinfo=UTC)
SPEC = build_spec(
    {
        "name": "retrain",
        "parameters": {"model": {"type": "str", "default": "none"}, "version": {"type": "int", "default": 0}},
        "steps": {"a": {"uses": "os:getcwd"}},
    }
)
VERSION = {"id": 7, "kind": "version_created", "model": "digits", "version": 3, "tags": {"tier": "gold"}}
ALIAS = {"id": 8, "kind": "alias_set", "model": "digits", "alias": "champion", "version": 3}
RUN = {"run_id": "r1", "pipeline": "prepare", "state": "SUCCEEDED", "output": {"rows": 5}}


def trigger(filter_: Filter, params: dict[str, Any] | None = None, **changes: Any) -> Trigger:
    kinds = {RegistryFilter: Kind.REGISTRY, PipelineFilter: Kind.PIPELINE, WebhookFilter: Kind.WEBHOOK}
    made = Trigger(
        "t", kinds[type(filter_)], "retrain", SPEC.digest, params or {}, filter_, 10, False, Snapshot(100, frozenset()),
        None, None, None, "ann", NOW, NOW,
    )  # fmt: skip
    return replace(made, **changes)


def event(body: dict[str, Any], transaction: int | None = 200, event_id: str = "e") -> Event:
    return Event(event_id, NOW, body, transaction)


def fired(filter_: Filter, body: dict[str, Any]) -> bool:
    return decide(trigger(filter_), event(body), SPEC, []) is not None


@pytest.mark.parametrize(
    ("filter_", "expected"),
    [
        (RegistryFilter(), [True, False]),
        (RegistryFilter(events=["alias_set"]), [False, True]),
        (RegistryFilter(events=["alias_set", "version_created"]), [True, True]),
        (RegistryFilter(events=["alias_set", "version_created"], alias="champ*"), [True, True]),
        (RegistryFilter(events=["alias_set", "version_created"], alias="challenger"), [True, False]),
        (RegistryFilter(model="dig*"), [True, False]),
        (RegistryFilter(model="Digits"), [False, False]),
        (RegistryFilter(when="${{ trigger.event.tags.tier == 'gold' }}"), [True, False]),
        (RegistryFilter(when="${{ trigger.event.tags.tier == 'tin' }}"), [False, False]),
        (RegistryFilter(when="${{ trigger.event.missing }}"), [False, False]),
    ],
)
def test_which_registry_events_count(filter_: Filter, expected: list[bool]) -> None:
    assert [fired(filter_, VERSION), fired(filter_, ALIAS)] == expected


@pytest.mark.parametrize(
    ("filter_", "expected"),
    [
        (PipelineFilter(pipelines=["prepare"]), True),
        (PipelineFilter(pipelines=["other", "prep*"]), True),
        (PipelineFilter(pipelines=["prep"]), False),
        (PipelineFilter(pipelines=["*"], states=["FAILED", "CANCELLED"]), False),
        (PipelineFilter(pipelines=["*"], when="${{ trigger.event.output.rows > `4` }}"), True),
        (PipelineFilter(pipelines=["*"], when="${{ trigger.event.output.rows > `5` }}"), False),
    ],
)
def test_which_ends_of_runs_count(filter_: Filter, expected: bool) -> None:
    assert fired(filter_, RUN) is expected


def test_every_command_of_the_registry_has_an_event() -> None:
    assert {command.__name__ for command in get_args(Command)} == set(REGISTRY_EVENTS)
    assert set(get_args(RegistryEvent)) == set(REGISTRY_EVENTS.values())


def test_a_firing_has_parameters_of_the_event() -> None:
    params = {"model": "${{ trigger.event.model }}/${{ trigger.name }}", "version": "${{ trigger.event.version }}"}
    firing = decide(trigger(RegistryFilter(), params), event(VERSION), SPEC, ["before"])
    assert firing == Firing(
        "trigger:t", "e", NOW, SPEC.digest, {"model": "digits/t", "version": 3}, "ann", ["before", "t"]
    )
    assert firing.key == "trigger:t:e"


def test_where_an_expression_gives_nothing_the_default_holds() -> None:
    firing = decide(trigger(RegistryFilter(), {"version": "${{ trigger.event.nothing }}"}), event(VERSION), SPEC, [])
    assert firing is not None
    assert firing.params == {"model": "none", "version": 0}


def test_a_value_that_does_not_fit_fails_the_firing() -> None:
    firing = decide(trigger(RegistryFilter(), {"version": "${{ trigger.event.model }}"}), event(VERSION), SPEC, [])
    assert firing is not None
    assert firing.state is FiringState.FAILED
    assert "parameters.version: expected int, got str 'digits'" in firing.reason
    failed = decide(trigger(RegistryFilter(when="${{ abs(trigger.event.model) }}")), event(VERSION), SPEC, [])
    assert failed is not None
    assert failed.state is FiringState.FAILED
    assert "expression" in failed.reason


def test_an_event_that_is_nested_too_deeply_fails_the_firing() -> None:
    nested: Any = []
    for _level in range(100_000):
        nested = [nested]
    firing = decide(trigger(WebhookFilter(), {"model": "x ${{ trigger.event.a }}"}), event({"a": nested}), SPEC, [])
    assert firing is not None
    assert (firing.state, firing.reason) == (FiringState.FAILED, "the event is nested too deeply")


def test_what_was_before_the_trigger_does_not_count() -> None:
    since = Snapshot(100, frozenset({90}))
    results = [
        decide(trigger(RegistryFilter(), since=since), event(VERSION, number), SPEC, []) is not None
        for number in (89, 90, 99, 100)
    ]
    assert results == [False, True, False, True]
    assert decide(trigger(RegistryFilter(), paused=True), event(VERSION), SPEC, []) is None


def test_a_trigger_does_not_fire_for_what_it_has_led_to() -> None:
    firing = decide(trigger(PipelineFilter(pipelines=["*"])), event(RUN), SPEC, ["x", "t", "other"])
    assert firing is not None
    assert (firing.state, firing.reason) == (FiringState.SKIPPED, "it has led to this event itself: t → other → t")
    assert decide(trigger(PipelineFilter(pipelines=["*"], states=["FAILED"])), event(RUN), SPEC, ["t"]) is None


def test_events_beyond_the_hours_limit_are_skipped() -> None:
    mine = trigger(RegistryFilter(), max_per_hour=3)
    events = [event(VERSION, event_id=str(number)) for number in range(4)]
    firings = decide_all([mine], events, {}, {"trigger:t": 1}, lambda _digest: SPEC)
    assert [firing.state for firing in firings] == [FiringState.PENDING] * 2 + [FiringState.SKIPPED] * 2
    assert "more than 3 firings in an hour" in firings[-1].reason


def test_a_definition_that_cannot_be_read_fails_its_own_firings_only() -> None:
    def spec_of(digest: str) -> Any:
        if digest == "old":
            raise InvalidInput("unknown field")
        return SPEC

    triggers = [trigger(RegistryFilter(), name="bad", digest="old"), trigger(RegistryFilter())]
    firings = decide_all(triggers, [event(VERSION)], {}, {}, spec_of)
    assert [(firing.source, firing.state) for firing in firings] == [
        ("trigger:bad", FiringState.FAILED), ("trigger:t", FiringState.PENDING),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "filter_", "params", "message"),
    [
        (Kind.PIPELINE, PipelineFilter(pipelines=["retrain"]), {}, "it would start itself"),
        (Kind.PIPELINE, PipelineFilter(pipelines=["re*"]), {}, "it would start itself"),
        (Kind.WEBHOOK, WebhookFilter(when="always"), {}, "filter.when: expected an expression"),
        (Kind.WEBHOOK, WebhookFilter(when="${{ params.x }}"), {}, "refers to params.x"),
        (Kind.WEBHOOK, WebhookFilter(when="${{ a b }}"), {}, "not an expression"),
        (Kind.REGISTRY, RegistryFilter(), {"modle": "x"}, "parameters.modle: unknown"),
        (Kind.REGISTRY, RegistryFilter(), {"version": "x"}, "parameters.version: expected int"),
    ],
)
def test_a_bad_trigger_is_refused(kind: Kind, filter_: Filter, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_trigger(SPEC, kind, filter_, params)
    assert message in caught.value.message


@pytest.mark.parametrize("fields", [{"events": ["born"]}, {"events": []}, {"model": ""}, {"modle": "x"}])
def test_a_bad_filter_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RegistryFilter.model_validate(fields)


# -- webhooks --------------------------------------------------------------------------------

SECRET = "correct horse battery staple"
BODY = b'{"a": 1}'


def test_a_bearer_secret_is_kept_as_a_hash() -> None:
    stored = stored_secret(Auth.BEARER, SECRET)
    assert stored == hashlib.sha256(SECRET.encode()).digest()
    verify(Auth.BEARER, stored, {"authorization": f"Bearer {SECRET}"}, BODY)
    verify(Auth.BEARER, stored, {"authorization": f"bearer {SECRET} "}, b"another")


@pytest.mark.parametrize("name", ["x-mlplat-signature-256", "x-hub-signature-256"])
def test_a_signature_is_the_hmac_of_the_body(name: str) -> None:
    stored = stored_secret(Auth.SIGNATURE, SECRET)
    signed = f"sha256={hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()}"
    assert signature(SECRET, BODY) == signed
    verify(Auth.SIGNATURE, stored, {name: signed}, BODY)
    with pytest.raises(PermissionDenied):
        verify(Auth.SIGNATURE, stored, {name: signed}, BODY + b" ")


@pytest.mark.parametrize(
    ("auth", "headers"),
    [
        (Auth.BEARER, {}),
        (Auth.BEARER, {"authorization": ""}),
        (Auth.BEARER, {"authorization": "Bearer"}),
        (Auth.BEARER, {"authorization": f"Basic {SECRET}"}),
        (Auth.BEARER, {"authorization": f"Bearer {SECRET}x"}),
        (Auth.BEARER, {"authorization": "Bearer ünïcode"}),
        (Auth.BEARER, {"x-hub-signature-256": signature(SECRET, BODY)}),
        (Auth.SIGNATURE, {}),
        (Auth.SIGNATURE, {"authorization": f"Bearer {SECRET}"}),
        (Auth.SIGNATURE, {"x-hub-signature-256": ""}),
        (Auth.SIGNATURE, {"x-hub-signature-256": signature(SECRET + "x", BODY)}),
        (Auth.SIGNATURE, {"x-hub-signature-256": signature(SECRET, BODY).removeprefix("sha256=")}),
        (Auth.SIGNATURE, {"x-hub-signature-256": "sha256=ü"}),
    ],
)
def test_whoever_does_not_know_the_secret_is_refused(auth: Auth, headers: dict[str, str]) -> None:
    with pytest.raises(PermissionDenied):
        verify(auth, stored_secret(auth, SECRET), headers, BODY)


@pytest.mark.parametrize("secret", ["", "x" * 15, "x" * 201])
def test_a_secret_has_a_sensible_length(secret: str) -> None:
    with pytest.raises(InvalidInput, match=f"has {len(secret)} characters, expected 16 to 200"):
        stored_secret(Auth.BEARER, secret)


# -- snapshots -------------------------------------------------------------------------------

SNAPSHOTS = st.builds(
    lambda end, open_: Snapshot(end, frozenset(number for number in open_ if number < end)),
    st.integers(1, 60), st.sets(st.integers(1, 60)),
)  # fmt: skip


@given(SNAPSHOTS)
def test_a_snapshot_is_read_as_it_is_written(snapshot: Snapshot) -> None:
    assert Snapshot.parse(str(snapshot)) == snapshot


@given(SNAPSHOTS, st.integers(1, 60), st.integers(1, 60))
def test_a_part_of_a_snapshot_sees_what_the_whole_sees_up_to_there(snapshot: Snapshot, last: int, number: int) -> None:
    assert snapshot.up_to(last).sees(number) == (snapshot.sees(number) and number <= last)
    assert all(snapshot.sees(earlier) for earlier in range(1, snapshot.start))


def test_the_earlier_snapshot_sees_less() -> None:
    assert Snapshot(9, frozenset()) < Snapshot(10, frozenset())
    assert Snapshot(10, frozenset({3, 4})) < Snapshot(10, frozenset({3}))
    assert str(Snapshot.parse("10:20:10,14")) == "10:20:10,14"
    assert str(Snapshot.parse("10:10:")) == "10:10:"
