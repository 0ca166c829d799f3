"""Who may move a model's versions where, and what they have to be for it. Pure.

A policy has a rule for each stage and alias that is protected. A rule asks for approvals, membership of a role, gates
that metrics have to pass, a model card, or a stage to come from. What has no rule is free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlplat.errors import InvalidInput
from mlplat.registry.history import Subject
from mlplat.registry.model import MAX_ALIAS_LENGTH, Stage, check_alias

MAX_ROLES = 50
MAX_MEMBERS = 500
MAX_GATES = 20
MAX_ALIASES = 100
MAX_APPROVALS = 20
WEEK_H = 168.0
_Text = Annotated[str, Field(min_length=1, max_length=200)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Gate(_Document):
    """What the last value of a metric of the version's run has to be."""

    metric: Annotated[str, Field(min_length=1, max_length=250)]
    at_least: float | None = None
    at_most: float | None = None
    not_worse_than: Annotated[str, Field(max_length=MAX_ALIAS_LENGTH + 1)] | None = Field(
        default=None, description="An alias such as `@champion`: the value is compared with that of its version."
    )
    tolerance: float = Field(default=0.0, ge=0, description="How much worse than that version's it may be.")
    lower_is_better: bool = False
    same_data: bool = Field(
        default=False, description="Only versions of runs with the same datasets, by digest, can be compared."
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.at_least is None and self.at_most is None and self.not_worse_than is None:
            raise ValueError("a gate needs at_least, at_most or not_worse_than")
        if self.not_worse_than is None and (self.tolerance or self.lower_is_better or self.same_data):
            raise ValueError("tolerance, lower_is_better and same_data go with not_worse_than")
        return self

    @property
    def compared_alias(self) -> str | None:
        """The alias whose version is compared with."""
        return None if self.not_worse_than is None else self.not_worse_than.removeprefix("@")


class Rule(_Document):
    """What a move to a stage or of an alias needs."""

    approvals: int = Field(default=0, ge=0, le=MAX_APPROVALS, description="Of so many others than who asks for it.")
    role: _Text | None = Field(
        default=None, description="Who approves; without approvals, who may make the move. Also who may undo it."
    )
    from_stages: list[Stage] | None = Field(default=None, alias="from", description="Stages that a version comes from.")
    gates: list[Gate] = Field(default_factory=list, max_length=MAX_GATES)
    card: bool = Field(default=False, description="The version needs a model card, which is its description.")
    expires_h: float = Field(default=WEEK_H, gt=0, le=8_760, description="Hours for which a request stays open.")

    @model_validator(mode="after")
    def _has_approvers(self) -> Self:
        if self.approvals and self.role is None:
            raise ValueError("approvals need a role, whose members give them")
        return self


FREE = Rule()


class Policy(_Document):
    """The rules of a model; the empty one leaves everything free."""

    roles: dict[_Text, Annotated[list[_Text], Field(min_length=1, max_length=MAX_MEMBERS)]] = Field(
        default_factory=dict, max_length=MAX_ROLES, description="The user names that each role has."
    )
    stages: dict[Stage, Rule] = Field(default_factory=dict)
    aliases: dict[str, Rule] = Field(default_factory=dict, max_length=MAX_ALIASES)
    managed_by: _Text | None = Field(
        default=None, description="The role that may change the policy, and rename or delete the model."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        rules = [(f"stages.{stage}", rule) for stage, rule in self.stages.items()]
        rules += [(f"aliases.{alias}", rule) for alias, rule in self.aliases.items()]
        for where, rule in rules:
            if rule.role is None:
                continue
            if rule.role not in self.roles:
                yield f"{where}: there is no role {rule.role!r} in roles"
            elif rule.approvals > len(set(self.roles[rule.role])):
                yield f"{where}: the role {rule.role!r} has fewer than {rule.approvals} members"
            if self.managed_by is None:
                yield f"managed_by: is missing; without it everybody could change what {where} asks for"
        if self.managed_by is not None and self.managed_by not in self.roles:
            yield f"managed_by: there is no role {self.managed_by!r} in roles"
        for alias, rule in self.aliases.items():
            check_alias(alias)
            if rule.from_stages is not None:
                yield f"aliases.{alias}: only stages have a stage to come from"

    @property
    def is_free(self) -> bool:
        """Whether nothing is protected."""
        return not self.stages and not self.aliases and self.managed_by is None

    def rule(self, subject: Subject, target: str) -> Rule:
        """What a move to a stage, or of an alias, needs."""
        if subject is Subject.STAGE:
            return self.stages.get(Stage(target), FREE)
        return self.aliases.get(target, FREE)

    def has_role(self, user: str, role: str) -> bool:
        """Whether the user is a member of the role."""
        return bool(user) and user in self.roles.get(role, ())


NO_POLICY = Policy()


def policy_from_json(value: Mapping[str, Any]) -> Policy:
    """The policy that a JSON or YAML document has.

    Raises:
        InvalidInput: a line for each problem: where it is, and what.
    """
    try:
        return Policy.model_validate(value)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'policy'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise InvalidInput("\n".join(["the policy was refused:", *lines[:20]])) from error


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """The policy without what is as by default."""
    return policy.model_dump(mode="json", by_alias=True, exclude_defaults=True)


@dataclass(frozen=True)
class Candidate:
    """A version as rules see it.

    Args:
        run_id: the run that it comes from, whose metrics count.
        data: the datasets of that run, as names and digests; None: not known.
        card: its description.
    """

    version: int
    run_id: str | None
    data: tuple[str, ...] | None
    card: str


#: The last values of metrics by run and key.
Measured = Mapping[str, Mapping[str, float]]
#: The versions that aliases point at; those without one are left out.
Compared = Mapping[str, Candidate]


def runs_to_measure(rule: Rule, candidate: Candidate, compared: Compared) -> set[str]:
    """The runs whose metrics the rule's gates look at."""
    if not rule.gates:
        return set()
    found = [candidate, *(compared[alias] for gate in rule.gates if (alias := gate.compared_alias or "") in compared)]
    return {version.run_id for version in found if version.run_id is not None}


def unmet(rule: Rule, candidate: Candidate, compared: Compared, measured: Measured) -> list[str]:
    """What the candidate lacks, for people; empty if it passes the gates and has the card."""
    problems = [problem for gate in rule.gates for problem in _fails(gate, candidate, compared, measured)]
    if rule.card and not candidate.card.strip():
        problems.append("it has no model card: describe the version")
    return problems


def _fails(gate: Gate, candidate: Candidate, compared: Compared, measured: Measured) -> Iterator[str]:
    if candidate.run_id is None:
        yield f"{gate.metric}: the version names no run that was measured"
        return
    value = measured.get(candidate.run_id, {}).get(gate.metric)
    if value is None:
        yield f"{gate.metric}: run {candidate.run_id} has no such metric"
        return
    # Written so that NaN passes nothing.
    if gate.at_least is not None and not value >= gate.at_least:
        yield f"{gate.metric} is {value:g}, and has to be at least {gate.at_least:g}"
    if gate.at_most is not None and not value <= gate.at_most:
        yield f"{gate.metric} is {value:g}, and has to be at most {gate.at_most:g}"
    other = compared.get(gate.compared_alias or "")
    if other is not None and other.version != candidate.version:
        yield from _is_worse(gate, candidate, value, other, measured)


def _is_worse(gate: Gate, candidate: Candidate, value: float, other: Candidate, measured: Measured) -> Iterator[str]:
    named = f"version {other.version} (@{gate.compared_alias})"
    theirs = None if other.run_id is None else measured.get(other.run_id, {}).get(gate.metric)
    if theirs is None:
        yield f"{gate.metric}: {named} has no such metric to compare with"
        return
    if gate.same_data and (candidate.data is None or candidate.data != other.data):
        yield f"{gate.metric}: cannot be compared, since {named} is not known to come from the same datasets"
    bound = theirs + gate.tolerance if gate.lower_is_better else theirs - gate.tolerance
    if not (value <= bound if gate.lower_is_better else value >= bound):
        limit = "at most" if gate.lower_is_better else "at least"
        yield f"{gate.metric} is {value:g}, and has to be {limit} {bound:g} beside {theirs:g} of {named}"
