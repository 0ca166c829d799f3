"""Typed parameters of a pipeline."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from mlplat.errors import InvalidPipeline

MAX_NUMBER = sys.float_info.max
ParameterValue = int | float | str | bool
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


class Strict(BaseModel):
    """A part of a definition: unknown fields are refused, and it never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Parameter(Strict):
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


def resolve_params(
    pipeline: str, parameters: Mapping[str, Parameter], given: Mapping[str, object]
) -> dict[str, ParameterValue]:
    """All parameters with their values.

    Raises:
        InvalidPipeline: an unknown parameter, a missing one, or a value that does not fit.
    """
    problems = [
        f"parameters.{name}: unknown; {pipeline!r} has {', '.join(sorted(parameters)) or 'no parameters'}"
        for name in given
        if name not in parameters
    ]
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
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
