"""Policies: what is refused as one, and what gates say."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.registry.history import Subject
from mlplat.registry.model import Stage
from mlplat.registry.policy import (
    FREE,
    NO_POLICY,
    Candidate,
    Gate,
    Rule,
    policy_from_json,
    policy_to_json,
    runs_to_measure,
    unmet,
)

LEADS = {"roles": {"leads": ["ann", "bob"]}, "managed_by": "leads"}
NEW = Candidate(2, "new", ("digits 1f",), "a card")
OLD = Candidate(1, "old", ("digits 1f",), "a card")


def test_a_policy_is_read_as_it_was_written() -> None:
    document = {
        **LEADS,
        "stages": {
            "Production": {
                "approvals": 2,
                "role": "leads",
                "from": ["Staging"],
                "gates": [{"metric": "accuracy", "at_least": 0.95, "not_worse_than": "@champion", "tolerance": 0.01}],
                "card": True,
                "expires_h": 24.0,
            }
        },
        "aliases": {"champion": {"role": "leads"}},
    }
    policy = policy_from_json(document)
    assert policy_to_json(policy) == document
    assert policy.rule(Subject.STAGE, "Production").from_stages == [Stage.STAGING]
    assert policy.rule(Subject.ALIAS, "champion").role == "leads"
    assert policy.rule(Subject.ALIAS, "free") == FREE
    assert policy.has_role("ann", "leads")
    assert not policy.has_role("zoe", "leads")
    assert not policy.has_role("", "leads")
    assert not policy.is_free


def test_the_empty_policy_leaves_everything_free() -> None:
    assert policy_from_json({}) == NO_POLICY
    assert NO_POLICY.is_free
    assert policy_to_json(NO_POLICY) == {}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"stagse": {}}, "stagse"),
        ({"stages": {"Prod": {}}}, "stages"),
        ({**LEADS, "stages": {"Staging": {"approvals": 1}}}, "approvals need a role"),
        ({**LEADS, "stages": {"Staging": {"approvals": 3, "role": "leads"}}}, "fewer than 3 members"),
        ({**LEADS, "stages": {"Staging": {"approvals": -1, "role": "leads"}}}, "stages.Staging.approvals"),
        ({**LEADS, "stages": {"Staging": {"role": "nobody"}}}, "there is no role 'nobody'"),
        ({"roles": {"leads": ["ann"]}, "stages": {"Staging": {"role": "leads"}}}, "managed_by: is missing"),
        ({"managed_by": "nobody"}, "managed_by: there is no role 'nobody'"),
        ({"roles": {"leads": []}}, "roles.leads"),
        ({"aliases": {"a/b": {}}}, "Invalid alias name"),
        ({"aliases": {"latest": {}}}, "reserved"),
        ({"aliases": {"a": {"from": ["Staging"]}}}, "only stages have a stage to come from"),
        ({"stages": {"Staging": {"gates": [{"metric": "a"}]}}}, "at_least, at_most or not_worse_than"),
        ({"stages": {"Staging": {"gates": [{"metric": "a", "at_least": 1, "same_data": True}]}}}, "not_worse_than"),
        ({"stages": {"Staging": {"gates": [{"metric": "a", "at_least": math.nan}]}}}, "finite number"),
        ({"stages": {"Staging": {"expires_h": 0}}}, "expires_h"),
    ],
)
def test_what_is_no_policy_is_refused_with_where_and_why(document: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        policy_from_json(document)
    assert problem in refused.value.message


def _unmet(gate: Gate, new: float | None, old: float | None = None, **versions: Candidate) -> list[str]:
    measured = {"new": {} if new is None else {"a": new}, "old": {} if old is None else {"a": old}}
    return unmet(Rule(gates=[gate]), versions.get("candidate", NEW), {"champion": versions.get("other", OLD)}, measured)


@pytest.mark.parametrize(
    ("gate", "value", "passes"),
    [
        (Gate(metric="a", at_least=0.9), 0.9, True),
        (Gate(metric="a", at_least=0.9), 0.89, False),
        (Gate(metric="a", at_most=0.9), 0.9, True),
        (Gate(metric="a", at_most=0.9), 0.91, False),
        (Gate(metric="a", at_least=0.1, at_most=0.9), 0.95, False),
        (Gate(metric="a", at_least=0.9), math.nan, False),
        (Gate(metric="a", at_most=0.9), math.nan, False),
        (Gate(metric="a", at_least=0.9), None, False),
        (Gate(metric="a", at_least=0.9), math.inf, True),
    ],
)
def test_gates_bound_the_last_value(gate: Gate, value: float | None, passes: bool) -> None:
    assert (_unmet(gate, value) == []) is passes


@given(new=st.floats(), old=st.floats(), tolerance=st.floats(0, 10), lower=st.booleans())
def test_a_version_may_be_worse_by_the_tolerance_and_no_more(
    new: float, old: float, tolerance: float, lower: bool
) -> None:
    gate = Gate(metric="a", not_worse_than="@champion", tolerance=tolerance, lower_is_better=lower)
    better = new <= old + tolerance if lower else new >= old - tolerance
    assert (_unmet(gate, new, old) == []) is better


def test_versions_of_other_data_cannot_be_compared() -> None:
    gate = Gate(metric="a", not_worse_than="champion", same_data=True)
    assert _unmet(gate, 0.9, 0.9) == []
    for data in (None, ("digits 2e",)):
        [problem] = _unmet(gate, 0.9, 0.9, other=Candidate(1, "old", data, ""))
        assert "not known to come from the same datasets" in problem
    unknown = Candidate(2, "new", None, "")
    assert _unmet(gate, 0.9, 0.9, candidate=unknown, other=Candidate(1, "old", None, "")) != []


def test_the_first_champion_and_the_champion_itself_have_nothing_to_be_compared_with() -> None:
    gate = Gate(metric="a", not_worse_than="champion")
    assert unmet(Rule(gates=[gate]), NEW, {}, {"new": {"a": 0.1}}) == []
    assert _unmet(gate, 0.1, 0.9, other=NEW) == []


def test_a_champion_without_the_metric_is_said_to_have_none() -> None:
    [problem] = _unmet(Gate(metric="a", not_worse_than="champion"), 0.9, None)
    assert "version 1 (@champion) has no such metric" in problem


def test_a_version_that_names_no_run_passes_no_gate() -> None:
    [problem] = _unmet(Gate(metric="a", at_least=0.0), 1.0, candidate=Candidate(2, None, None, ""))
    assert "names no run" in problem


def test_a_model_card_is_more_than_blanks() -> None:
    assert unmet(Rule(card=True), NEW, {}, {}) == []
    for card in ("", " \n"):
        assert unmet(Rule(card=True), Candidate(1, None, None, card), {}, {}) == [
            "it has no model card: describe the version"
        ]


def test_only_runs_that_gates_look_at_are_measured() -> None:
    compared = {"champion": OLD, "other": Candidate(3, None, None, "")}
    assert runs_to_measure(Rule(card=True), NEW, compared) == set()
    assert runs_to_measure(Rule(gates=[Gate(metric="a", at_least=1)]), NEW, compared) == {"new"}
    gates = [Gate(metric="a", not_worse_than=f"@{alias}") for alias in ("champion", "other", "nobody")]
    assert runs_to_measure(Rule(gates=gates), NEW, compared) == {"new", "old"}
