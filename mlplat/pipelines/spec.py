"""The one form that YAML and Python definitions compile to."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from mlplat.errors import InvalidPipeline

MAX_STEPS = 10_000
MAX_NUMBER = sys.float_info.max

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_\-]{0,62}$")]
#: Step and parameter names are identifiers, because expressions use them unquoted.
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
ParameterValue = int | float | str | bool
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Parameter(_Strict):
    """A typed parameter; without a default it must be given at submit."""

    type: Literal["int", "float", "str", "bool"]
    default: ParameterValue | None = None
    min: float | None = None
    max: float | None = None
    choices: list[ParameterValue] | None = None
    description: str = ""

    @model_validator(mode="after")
    def _default_fits(self) -> Parameter:
        if self.default is not None:
            problem = self.problem_with(self.default)
            if problem:
                raise ValueError(f"the default {self.default!r} does not fit: {problem}")
        return self

    def problem_with(self, value: object) -> str | None:
        """Why ``value`` does not fit this parameter, or None."""
        if not isinstance(value, _TYPES[self.type]) or (isinstance(value, bool) and self.type != "bool"):
            return f"expected {self.type}, got {type(value).__name__} {value!r:.100}"
        problem = self._number_problem(value) if isinstance(value, int | float) else None
        if isinstance(value, str) and "\x00" in value:
            problem = "may not contain NUL characters"
        if problem is None and self.choices is not None and value not in self.choices:
            problem = f"must be one of {self.choices}, got {value!r}"
        return problem

    def _number_problem(self, value: float) -> str | None:
        if not -MAX_NUMBER <= value <= MAX_NUMBER:  # which NaN is not, either
            return "expected a finite number"
        if self.min is not None and value < self.min:
            return f"must be at least {self.min:g}, got {value!r}"
        if self.max is not None and value > self.max:
            return f"must be at most {self.max:g}, got {value!r}"
        return None


class Retry(_Strict):
    """How often a failing step is tried, and how long it waits before each further attempt."""

    max_attempts: int = Field(default=1, ge=1, le=100)
    initial_s: float = Field(default=1.0, ge=0, le=86_400)
    factor: float = Field(default=2.0, ge=1, le=10)
    cap_s: float = Field(default=60.0, ge=0, le=86_400)
    #: Fraction of the wait that is random.
    jitter: float = Field(default=0.1, ge=0, le=1)


class Resources(_Strict):
    """What an attempt reserves on its node."""

    cpus: float = Field(default=1.0, ge=0, le=4_096)
    gpus: float = Field(default=0.0, ge=0, le=1_024)
    memory_mb: int | None = Field(default=None, ge=1)


class Step(_Strict):
    """One step. ``needs`` lists what must succeed first; expressions add what they read."""

    uses: str = Field(pattern=r"^(pickle:[0-9a-f]{64}:\S+|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$")
    description: str = ""
    needs: list[Identifier] = Field(default_factory=list)
    with_: dict[Identifier, JsonValue] = Field(default_factory=dict, alias="with")
    #: An expression that gives a list, or a list: the step runs once per element, as ``item``.
    foreach: str | list[JsonValue] | None = None
    retry: Retry = Retry()
    resources: Resources = Resources()
    #: The attempt gets a worker process of its own, which ends with it and gives its memory back at once.
    fresh_process: bool = False


class PipelineSpec(_Strict):
    """A pipeline definition."""

    name: Name
    description: str = ""
    parameters: dict[Identifier, Parameter] = Field(default_factory=dict)
    steps: dict[Identifier, Step] = Field(min_length=1, max_length=MAX_STEPS)

    @model_validator(mode="after")
    def _is_json(self) -> PipelineSpec:
        json.dumps(self.to_json(), allow_nan=False)  # its ValueError is the message
        return self

    def to_json(self) -> dict[str, Any]:
        """The spec as it is stored and sent."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex: equal definitions have equal digests."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def resolve_params(self, given: Mapping[str, object]) -> dict[str, ParameterValue]:
        """All parameters with their values.

        Raises:
            InvalidPipeline: an unknown parameter, a missing one, or a value that does not fit.
        """
        problems = [
            f"parameters.{name}: unknown; {self.name!r} has {', '.join(sorted(self.parameters)) or 'no parameters'}"
            for name in given
            if name not in self.parameters
        ]
        values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if value is None:
                problems.append(f"parameters.{name}: required, and no value was given")
                continue
            problem = parameter.problem_with(value)
            if problem:
                problems.append(f"parameters.{name}: {problem}")
                continue
            values[name] = float(value) if parameter.type == "float" and isinstance(value, int) else value
        if problems:
            raise InvalidPipeline("\n".join(problems))
        return values
