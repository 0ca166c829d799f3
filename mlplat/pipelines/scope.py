"""What the expressions of a run see: its parameters, and the outputs of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlplat.errors import InvalidInput
from mlplat.pipelines.expressions import render, render_command
from mlplat.pipelines.model import WHOLE_STEP, Node, PipelineRun, State, StepRun
from mlplat.pipelines.spec import PipelineSpec, Step
from mlplat.pipelines.stored import open_for_expressions

MAX_ITEMS = 10_000


class Scopes:
    """Evaluates a run's expressions. What a step sees never changes once its needs are final."""

    def __init__(self, spec: PipelineSpec, run: PipelineRun, nodes: Mapping[Node, StepRun]) -> None:
        self._spec = spec
        self._run = run
        self._nodes = nodes
        self._opened: dict[str, Any] = {}
        self._items: dict[str, list[Any]] = {}

    def condition(self, name: str, step: Step, ending: State | None) -> bool:
        """Whether the step's ``when`` is met.

        Raises:
            InvalidInput: the expression fails on these values.
        """
        return step.when is None or bool(render(step.when, self._outer(ending)))

    def items(self, name: str, step: Step, ending: State | None) -> list[Any]:
        """The elements of the step's fan-out.

        Raises:
            InvalidInput: the expression fails, gives no list, or too long a one.
        """
        if name not in self._items:
            items = render(step.foreach, self._outer(ending))
            if not isinstance(items, list):
                raise InvalidInput(f"foreach must give a list, not {type(items).__name__}")
            if len(items) > MAX_ITEMS:
                raise InvalidInput(f"foreach gave {len(items)} items, at most {MAX_ITEMS} are allowed")
            self._items[name] = items
        return self._items[name]

    def render_for(self, template: object, row: StepRun, step: Step, ending: State | None) -> Any:
        """A template of the step, for one of its rows. A text is a shell command: values in it are quoted.

        Raises:
            InvalidInput: an expression fails on these values.
        """
        if not template:
            return template
        scope = self._outer(ending)
        if row.item != WHOLE_STEP:
            scope = {**scope, "item": self.items(row.step, step, ending)[row.item]}
        return render_command(template, scope) if isinstance(template, str) else render(template, scope)

    def outputs(self) -> dict[str, Any]:
        """The run's own outputs, rendered.

        Raises:
            InvalidInput: an expression fails on these values.
        """
        rendered: dict[str, Any] = render(dict(self._spec.outputs), self._outer(None))
        return rendered

    def _outer(self, ending: State | None) -> dict[str, Any]:
        """Everything but the item. ``ending`` is how the run's own steps ended, for its finally steps."""
        return {
            "params": self._run.params,
            "run": {"id": self._run.run_id, "pipeline": self._run.name, "state": ending or State.RUNNING},
            "steps": _Steps(self._nodes, self._opened),
        }


class _Steps(dict[str, Any]):
    """``steps`` of expressions, opened one by one when an expression asks for them.

    A ``dict`` because JMESPath looks fields up with ``get`` on whatever has it, and does more for dictionaries.
    """

    def __init__(self, nodes: Mapping[Node, StepRun], opened: dict[str, Any]) -> None:
        super().__init__()
        self._rows = nodes
        self._opened = opened

    def get(self, name: str, default: Any = None) -> Any:
        if name in self._opened:
            return self._opened[name]
        row = self._rows.get((name, WHOLE_STEP))
        if row is None:
            return default
        found = {"state": str(row.state), "output": open_for_expressions(stored_output(self._rows, row))}
        if row.state.is_final:
            self._opened[name] = found
        return found


def stored_output(nodes: Mapping[Node, StepRun], row: StepRun) -> dict[str, Any] | None:
    """The output of a step, of all its items if it is a fan-out; None while it has none."""
    if row.items is None or row.item != WHOLE_STEP:
        return row.output
    if row.state is not State.SUCCEEDED:
        return None
    return {"kind": "list", "outputs": [nodes[row.step, index].output for index in range(row.items)]}
