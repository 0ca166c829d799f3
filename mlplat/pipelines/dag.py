"""The graph of a pipeline: who waits for whom, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from typing import Any, Protocol

from mlplat.errors import InvalidInput
from mlplat.pipelines.expressions import find_expressions, references

#: Looking for similar names among more than these takes too long.
MAX_HINTED = 500


class StepLike(Protocol):
    """What the graph needs to know of a step."""

    @property
    def needs(self) -> list[str]:
        """Steps that must succeed first."""
        ...

    @property
    def with_(self) -> dict[str, Any]:
        """Arguments, with expressions."""
        ...

    @property
    def foreach(self) -> str | list[Any] | None:
        """The fan-out, if any."""
        ...


@dataclass(frozen=True)
class Problem:
    """Something wrong, and where: the path into the definition."""

    path: tuple[str | int, ...]
    message: str


def dependencies(steps: Mapping[str, StepLike]) -> dict[str, set[str]]:
    """For each step, the steps it waits for: its ``needs`` and whatever its expressions read."""
    return {name: set(step.needs) | _read_steps(step) for name, step in steps.items()}


def check_graph(steps: Mapping[str, StepLike], parameters: Mapping[str, object]) -> list[Problem]:
    """Everything wrong with the references between steps and parameters; empty when it is sound."""
    problems: list[Problem] = []
    for name, step in steps.items():
        for index, need in enumerate(step.needs):
            if need not in steps:
                problems.append(Problem(("steps", name, "needs", index), _unknown("step", need, steps)))
        problems += _check_expressions(name, step, steps, parameters)
    if problems:
        return problems
    try:
        TopologicalSorter(dependencies(steps)).prepare()
    except CycleError as error:
        cycle = list(reversed(error.args[1]))
        problems.append(Problem(("steps", cycle[0]), f"the steps wait for one another: {' → '.join(cycle)}"))
    return problems


def _check_expressions(
    name: str, step: StepLike, steps: Mapping[str, StepLike], parameters: Mapping[str, object]
) -> list[Problem]:
    problems: list[Problem] = []
    for field_name, value in (("with", step.with_), ("foreach", step.foreach)):
        for path, expression in find_expressions(value):
            where = ("steps", name, field_name, *path)
            try:
                read = references(expression)
            except InvalidInput as error:
                problems.append(Problem(where, error.message))
                continue
            for reference in sorted(read):
                if reference[0] == "params" and reference[1] not in parameters:
                    problems.append(Problem(where, _unknown("parameter", reference[1], parameters)))
                elif reference[0] == "steps" and reference[1] not in steps:
                    problems.append(Problem(where, _unknown("step", reference[1], steps)))
                elif reference[0] == "item" and (field_name == "foreach" or step.foreach is None):
                    problems.append(Problem(where, "item exists only in the arguments of a step with foreach"))
    if isinstance(step.foreach, str) and not list(find_expressions(step.foreach)):
        problems.append(Problem(("steps", name, "foreach"), "expected a list, or an expression that gives one"))
    return problems


def _read_steps(step: StepLike) -> set[str]:
    found: set[str] = set()
    for value in (step.with_, step.foreach):
        for _path, expression in find_expressions(value):
            found |= {reference[1] for reference in references(expression) if reference[0] == "steps"}
    return found


def _unknown(kind: str, name: str, known: Mapping[str, object]) -> str:
    close = get_close_matches(name, known, n=1) if len(known) <= MAX_HINTED else []
    hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(list(known)[:20]) or 'none'}"
    return f"unknown {kind} {name!r}; {hint}"
