"""Which results of an earlier run still hold under another definition, other parameters, or from another step on."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import Any

from mlplat.errors import InvalidInput
from mlplat.pipelines.dag import EXPRESSION_FIELDS, dependencies, expression_field
from mlplat.pipelines.expressions import find_expressions, references
from mlplat.pipelines.model import WHOLE_STEP, Node, RunSnapshot, State, StepRun
from mlplat.pipelines.spec import PipelineSpec, Step

#: What does not change a step's result; the environment does, and may be that of the pipeline.
_IRRELEVANT = {
    "description", "retry", "timeout_s", "resources", "max_parallel", "durable", "fresh_process", "needs", "cache",
    "checkpoint", "env",
}  # fmt: skip


def check_resume(earlier: RunSnapshot, spec: PipelineSpec, from_step: str | None) -> None:
    """Whether a new run may start from the earlier one.

    Raises:
        InvalidInput: the earlier run is not over, is of another pipeline, or there is no step ``from_step``.
    """
    if not earlier.run.state.is_final:
        raise InvalidInput(f"run {earlier.run.run_id} is {earlier.run.state}; cancel it, or wait for its end")
    if earlier.run.name != spec.name:
        raise InvalidInput(f"run {earlier.run.run_id} is one of {earlier.run.name!r}, not of {spec.name!r}")
    if from_step is not None and from_step not in spec.steps:
        raise InvalidInput(f"{spec.name!r} has no step {from_step!r}; it has {', '.join(spec.steps)}")


def reusable(
    earlier: RunSnapshot, spec: PipelineSpec, params: Mapping[str, Any], from_step: str | None
) -> dict[Node, StepRun]:
    """Rows of the earlier run that a new one may start from.

    A step's result holds when the step itself, the parameters that it reads and the results that it needs are
    the same. Of a fan-out that did not succeed as a whole, the items that did are kept when everything
    else holds. Approvals are asked for again, and finally steps run again.
    """
    before = PipelineSpec.model_validate(earlier.spec)
    rows = {row.node: row for row in earlier.step_runs}
    needs = dependencies(spec)
    kept: dict[Node, StepRun] = {}
    whole: set[str] = set()
    for name in TopologicalSorter({name: needs[name] for name in spec.steps}).static_order():
        step, row = spec.steps[name], rows.get((name, WHOLE_STEP))
        if (
            name == from_step
            or row is None
            or step.approval is not None
            or not needs[name] <= whole
            or not _is_same(step, before.steps.get(name), params, earlier.run.params)
            or (step.pipeline is None and spec.env_of(step) != before.env_of(before.steps[name]))
        ):
            continue
        if row.is_satisfied:
            whole.add(name)
            kept |= {node: found for node, found in rows.items() if node[0] == name}
        elif row.items is not None:
            kept |= _finished_items(row, rows)
    return kept


def _is_same(step: Step, earlier: Step | None, params: Mapping[str, Any], earlier_params: Mapping[str, Any]) -> bool:
    if earlier is None:
        return False
    fields = step.model_dump(by_alias=True, exclude=_IRRELEVANT)
    if fields != earlier.model_dump(by_alias=True, exclude=_IRRELEVANT):
        return False
    return all(params.get(name) == earlier_params.get(name) for name in _read_params(step))


def _read_params(step: Step) -> set[str]:
    return {
        reference[1]
        for field in EXPRESSION_FIELDS
        for _path, expression in find_expressions(expression_field(step, field))
        for reference in references(expression)
        if reference[0] == "params"
    }


def _finished_items(row: StepRun, rows: Mapping[Node, StepRun]) -> dict[Node, StepRun]:
    """The fan-out as it stands, with the items that did not succeed open again."""
    items = [rows[row.step, index] for index in range(row.items or 0)]
    if not any(item.state is State.SUCCEEDED for item in items):
        return {}
    opened = [item if item.state is State.SUCCEEDED else StepRun(item.step, item.item, State.PENDING) for item in items]
    whole = StepRun(row.step, WHOLE_STEP, State.RUNNING, row.items, queued_at=row.queued_at, started_at=row.started_at)
    return {whole.node: whole, **{item.node: item for item in opened}}
