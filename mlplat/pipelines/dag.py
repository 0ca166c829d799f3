"""The graph of a pipeline: who waits for whom, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import Any

from mlplat.errors import InvalidInput
from mlplat.pipelines.expressions import find_expressions, is_expression, references
from mlplat.pipelines.spec import MAX_DEPTH, PipelineSpec, Step

#: Looking for similar names among more than these takes too long.
MAX_HINTED = 500
#: Looking for more problems than these takes too long.
MAX_FOUND = 1_000
#: Fields of a step that may hold expressions, and whether these are evaluated once per item of a fan-out.
EXPRESSION_FIELDS = {"with": True, "command": True, "foreach": False, "when": False}

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """Something wrong, and where: the path into the definition."""

    path: Path
    message: str


def dependencies(spec: PipelineSpec) -> dict[str, set[str]]:
    """For each step, the steps it waits for: its ``needs`` and whatever its expressions read.

    A finally step waits for all steps anyhow; here are only the other finally steps that it waits for.
    """
    found = {name: set(step.needs) | _read_steps(step) for name, step in spec.steps.items()}
    for name, step in spec.finally_.items():
        found[name] = (set(step.needs) | _read_steps(step)) & spec.finally_.keys()
    return found


def check_graph(spec: PipelineSpec) -> list[Problem]:
    """What is wrong with the references between steps and parameters, up to ``MAX_FOUND``; empty when it is sound."""
    return list(islice(_check_pipeline(spec, (), 0), MAX_FOUND))


def _check_pipeline(spec: PipelineSpec, prefix: Path, depth: int) -> Iterator[Problem]:
    if depth > MAX_DEPTH:
        yield Problem(prefix, f"sub-pipelines are nested more than {MAX_DEPTH} deep")
        return
    sound = True
    for problem in _check_references(spec, prefix):
        sound = False
        yield problem
    if sound:
        yield from _check_cycles(spec, prefix)
    for section, steps in (("steps", spec.steps), ("finally", spec.finally_)):
        for name, step in steps.items():
            if step.pipeline is not None:
                where = (*prefix, section, name)
                yield from _check_sub_parameters(step, step.pipeline, where)
                yield from _check_pipeline(step.pipeline, (*where, "pipeline"), depth + 1)


def _check_references(spec: PipelineSpec, prefix: Path) -> Iterator[Problem]:
    for section, steps, readable in (
        ("steps", spec.steps, spec.steps),
        ("finally", spec.finally_, spec.all_steps),
    ):
        for name, step in steps.items():
            where = (*prefix, section, name)
            for index, need in enumerate(step.needs):
                if need not in steps:
                    yield Problem((*where, "needs", index), _unknown("step", need, steps))
            scope = _Scope(spec.parameters, readable, section == "finally")
            for field, per_item in EXPRESSION_FIELDS.items():
                has_item = per_item and step.foreach is not None
                yield from scope.check(expression_field(step, field), (*where, field), has_item)
            if isinstance(step.foreach, str) and not is_expression(step.foreach):
                yield Problem((*where, "foreach"), "expected a list, or an expression that gives one")
            if step.when is not None and not is_expression(step.when):
                yield Problem((*where, "when"), "expected one expression: ${{ … }}")
    whole = _Scope(spec.parameters, spec.steps, False)
    yield from whole.check(spec.outputs, (*prefix, "outputs"), False)
    if spec.concurrency is not None:
        none = _Scope(spec.parameters, {}, False)
        yield from none.check(spec.concurrency.key, (*prefix, "concurrency", "key"), False)


@dataclass(frozen=True)
class _Scope:
    """What expressions in one place may read."""

    parameters: Mapping[str, object]
    steps: Mapping[str, object]
    has_run_state: bool

    def check(self, value: object, where: Path, has_item: bool) -> Iterator[Problem]:
        for path, expression in find_expressions(value):
            try:
                read = references(expression)
            except InvalidInput as error:
                yield Problem((*where, *path), error.message)
                continue
            for reference in sorted(read):
                problem = self._problem(reference, has_item)
                if problem is not None:
                    yield Problem((*where, *path), problem)

    def _problem(self, reference: tuple[str, ...], has_item: bool) -> str | None:
        match reference:
            case ("params", name, *_) if name not in self.parameters:
                return _unknown("parameter", name, self.parameters)
            case ("steps", name, *_) if name not in self.steps:
                return _unknown("step", name, self.steps)
            case ("item", *_) if not has_item:
                return "item exists only in the arguments of a step with foreach"
            case ("run", "state", *_) if not self.has_run_state:
                return "run.state is known only to finally steps"
        return None


def _check_cycles(spec: PipelineSpec, prefix: Path) -> Iterator[Problem]:
    waits = dependencies(spec)
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        cycle = list(reversed(error.args[1]))
        section = "steps" if cycle[0] in spec.steps else "finally"
        yield Problem((*prefix, section, cycle[0]), f"the steps wait for one another: {' → '.join(cycle)}")


def _check_sub_parameters(step: Step, inner: PipelineSpec, where: Path) -> Iterator[Problem]:
    for name in step.with_:
        if name not in inner.parameters:
            yield Problem((*where, "with", name), _unknown("parameter", name, inner.parameters))
    for name, parameter in inner.parameters.items():
        if parameter.default is None and name not in step.with_:
            yield Problem((*where, "with"), f"the sub-pipeline's parameter {name!r} is required, and has no value")


def expression_field(step: Step, field: str) -> Any:
    """The value of one of ``EXPRESSION_FIELDS``."""
    return step.with_ if field == "with" else getattr(step, field)


def _read_steps(step: Step) -> set[str]:
    found: set[str] = set()
    for field in EXPRESSION_FIELDS:
        for _path, expression in find_expressions(expression_field(step, field)):
            found |= {reference[1] for reference in references(expression) if reference[0] == "steps"}
    return found


def _unknown(kind: str, name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, known, n=1) if len(known) <= MAX_HINTED else []
    hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(list(known)[:20]) or 'none'}"
    return f"unknown {kind} {name!r}; {hint}"
