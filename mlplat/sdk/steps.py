"""Steps as Python: functions, shell commands, notebooks and approvals.

A step is defined once and called where it is needed. Inside a pipeline a call adds the step to the definition and
returns a placeholder for its output, which other steps take as an argument. Outside of one a function is the
plain function it was.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import update_wrapper
from pathlib import PurePath
from typing import Any, Generic, ParamSpec, Self, TypedDict, TypeVar, Unpack, cast, overload

import jmespath

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.expressions import references
from mlplat.pipelines.spec import Cache, Checkpoint, Env, Retry
from mlplat.sdk.building import Builder, current_builder
from mlplat.sdk.placeholders import ITEM, Placeholder, as_condition, as_template, fill_item
from mlplat.sdk.plain import plain_context
from mlplat.steps.commands import run_command

P = ParamSpec("P")
R = TypeVar("R")
_RESOURCES = ("cpus", "gpus", "memory_mb", "accelerator", "custom")


class Options(TypedDict, total=False):
    """What can be said of any step, apart from its name; a definition has the same words.

    ``retries`` is short for ``retry=Retry(max_attempts=retries + 1)``. ``cpus`` to ``custom`` are what an attempt
    reserves on its node. ``when`` and ``needs`` are as in ``when(...)`` and ``after(...)``.
    """

    description: str
    retries: int
    retry: Retry
    timeout_s: float
    cpus: float
    gpus: float
    memory_mb: int
    accelerator: str
    custom: Mapping[str, float]
    env: Env
    cache: bool | Cache
    checkpoint: Checkpoint
    durable: bool
    fresh_process: bool
    when: object
    needs: Sequence[object]


class StepOptions(Options, total=False):
    """Options of a step, its name in the pipeline included."""

    name: str


_OPTIONS = Options.__annotations__.keys() | StepOptions.__annotations__.keys()


class StepBase:
    """Anything that can be a step. It never changes: ``with_options`` and the like give another one."""

    def __init__(self, name: str, fields: Mapping[str, Any], options: StepOptions) -> None:
        #: By default the function's.
        self.name = name
        #: What ``after`` finds: the same for everything that ``with_options`` made of one definition.
        self.origin: object = self
        self._fields = dict(fields)
        self._options: StepOptions = {}
        self._take(options)

    def with_options(self, **options: Unpack[StepOptions]) -> Self:
        """The same step with other options; those that are not named stay.

        Raises:
            TypeError: there is no such option.
        """
        other = object.__new__(type(self))
        other.__dict__ = {**self.__dict__, "_options": cast("StepOptions", dict(self._options))}
        other._take(options)
        return other

    def when(self, condition: object) -> Self:
        """The same step, run only if the condition holds; else it is SKIPPED, and what needs it goes on.

        Args:
            condition: a comparison such as ``score > 0.9``, an output, or the text of a JMESPath expression. Several
                must all hold.
        """
        return self.with_options(when=condition)

    def after(self, *others: object) -> Self:
        """The same step, run after others whose output it does not take: outputs, called steps, or their names."""
        return self.with_options(needs=others)

    def map(self, items: Any, /, *, max_parallel: int | None = None, **arguments: Any) -> Any:
        """Runs the step once per element, which its first parameter takes unless it is among the arguments.

        The output is the list of all outputs, in the order of the items.

        Args:
            items: a list, or a placeholder for one.
            max_parallel: how many run at once; None: all.
            arguments: the others. ``ITEM`` and its parts stand for the element.
        """
        builder = current_builder()
        first = self._first_parameter()
        if builder is not None:
            named = {**({first: ITEM} if first else {}), **arguments}
            fan_out = {"foreach": as_template(items), "max_parallel": max_parallel}
            return self._output(builder, self._add(builder, named, fan_out), mapped=True)
        results = []
        for item in items:
            named = {**({first: item} if first else {}), **{k: fill_item(v, item) for k, v in arguments.items()}}
            results.append(self._run_plainly((), named))
        return results

    def _take(self, options: StepOptions) -> None:
        for name in options:
            if name not in _OPTIONS:
                close = get_close_matches(name, _OPTIONS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"step {self.name!r} has no option {name!r}{hint}")
        if "retries" in options and "retry" in options:
            raise InvalidPipeline(f"step {self.name!r}: retries and retry say the same; give one of them")
        conditions = [as_condition(held["when"]) for held in (self._options, options) if "when" in held]
        for replaced, by in (("retry", "retries"), ("retries", "retry")):
            if by in options:
                self._options.pop(replaced, None)  # type: ignore[misc]  # two names of one option
        needs = [*self._options.get("needs", ()), *options.get("needs", ())]
        self._options.update(options)
        if needs:
            self._options["needs"] = tuple(needs)
        if conditions:
            self._options["when"] = conditions[0] if len(conditions) == 1 else conditions[0] & conditions[1]
        self.name = self._options.get("name", self.name)

    def _add(self, builder: Builder, arguments: Mapping[str, Any], more: Mapping[str, Any]) -> str:
        """Adds the step to a pipeline and returns its name there."""
        given = self._options
        resources = {key: given.get(key) for key in _RESOURCES if given.get(key) is not None}
        retries = given.get("retries")
        entry = {
            **self._what(builder),
            "description": given.get("description", self._description()) or None,
            "retry": given.get("retry") if retries is None else {"max_attempts": retries + 1},
            "resources": resources or None,
            **{key: given.get(key) for key in ("timeout_s", "env", "cache", "checkpoint", "durable", "fresh_process")},
            "when": as_condition(given["when"]).template if "when" in given else None,
            **more,
        }
        return builder.add(self.origin, self.name, entry, arguments, given.get("needs", ()))

    def _call(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        """What a call does: adds the step, or runs it when no pipeline is being defined."""
        builder = current_builder()
        if builder is not None:
            return self._output(builder, self._add(builder, self._named(args, arguments), {}), mapped=False)
        if "when" in self._options and not self._holds(self._options["when"]):
            return None
        return self._run_plainly(args, arguments)

    def _holds(self, condition: object) -> bool:
        """Outside of a pipeline conditions have values."""
        known = as_condition(condition).expression
        if references(known):
            raise InvalidPipeline(f"{self.name}: {known} can be tested only when a pipeline runs")
        return bool(jmespath.search(known, {}))

    # What the kinds of steps differ in.

    def _what(self, builder: Builder) -> dict[str, Any]:
        """The field that says what the step is."""
        return self._fields

    def _description(self) -> str:
        return ""

    def _first_parameter(self) -> str | None:
        """The parameter that takes the element of a fan-out."""
        return "item"

    def _named(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, which is how a definition holds them."""
        if args:
            raise TypeError(f"{self.name} takes arguments by name only")
        return arguments

    def _output(self, builder: Builder, name: str, *, mapped: bool) -> Placeholder:
        return Placeholder(f"steps.{name}.output")

    def _run_plainly(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        raise InvalidPipeline(f"{self.name} can only be called in a pipeline; pipeline.run_local() runs it here")


class StepFunction(StepBase, Generic[P, R]):
    """A function that can be a step. A parameter ``ctx`` gets the ``StepContext``."""

    def __init__(self, function: Callable[P, R], options: StepOptions) -> None:
        self.function = function
        super().__init__(function.__name__, {}, options)
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the function, or adds the step when a pipeline is being defined."""
        return cast("R", self._call(args, kwargs))

    def _what(self, builder: Builder) -> dict[str, Any]:
        return {"uses": builder.shipper.function(self.function)}

    def _description(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def _first_parameter(self) -> str | None:
        return next((name for name in self._signature().parameters), None)

    def _signature(self) -> inspect.Signature:
        """What a pipeline passes: everything but the context."""
        signature = inspect.signature(self.function)
        kept = [parameter for name, parameter in signature.parameters.items() if name != "ctx"]
        return signature.replace(parameters=kept)

    def _named(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        signature = self._signature()
        named = dict(signature.bind(*args, **arguments).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL and parameter.name in named:
                raise InvalidPipeline(
                    f"step {self.name!r}: pass *{parameter.name} by name; a definition has names only"
                )
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(parameter.name, {})
        return named

    def _run_plainly(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        function: Callable[..., Any] = self.function
        parameter = inspect.signature(function).parameters.get("ctx")
        if parameter is None or parameter.default is not parameter.empty or "ctx" in arguments:
            return function(*args, **arguments)
        with plain_context(self.name) as context:
            return function(*args, **arguments, ctx=context)


class CommandStep(StepBase):
    """A shell command, or a program with its arguments. Called with environment variables."""

    def __call__(self, **variables: Any) -> Any:
        """Runs the command, or adds the step when a pipeline is being defined."""
        return self._call((), variables)

    def _run_plainly(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        return run_command(self._fields["command"], arguments, self.name)


class NotebookStep(StepBase):
    """A notebook. Called with the variables that it gets."""

    def __call__(self, **variables: Any) -> Any:
        """Adds the step; its output is ``{"notebook": path}`` of the executed notebook."""
        return self._call((), variables)


class ApprovalStep(StepBase):
    """The run waits until a person decides."""

    def __call__(self) -> Any:
        """Adds the step; its output is ``{"approved": true, "by": …, "comment": …}``."""
        return self._call((), {})

    def _first_parameter(self) -> str | None:
        return None


@overload
def step(function: Callable[P, R], /) -> StepFunction[P, R]: ...


@overload
def step(**options: Unpack[StepOptions]) -> Callable[[Callable[P, R]], StepFunction[P, R]]: ...


def step(function: Callable[P, R] | None = None, /, **options: Unpack[StepOptions]) -> Any:
    """Marks a function as a step, with options or without: see ``StepOptions``.

    Raises:
        TypeError: there is no such option.
    """

    def mark(inner: Callable[P, R]) -> StepFunction[P, R]:
        return StepFunction(inner, options)

    return mark if function is None else mark(function)


def command(command: str | Sequence[str], /, *, name: str, **options: Unpack[Options]) -> CommandStep:
    """A step that runs a shell command, or a program with its arguments.

    Its output is the JSON that it writes to the file named by ``MLPLAT_OUTPUT``. Placeholders in an f-string become
    quoted words.
    """
    what = command if isinstance(command, str) else [str(part) for part in command]
    return CommandStep(name, {"command": what}, cast("StepOptions", options))


def notebook(file: str, /, *, name: str | None = None, **options: Unpack[Options]) -> NotebookStep:
    """A step that executes a notebook, a file beside the pipeline's.

    Arguments are set in a cell after the one tagged ``parameters``, or in the first. ``name`` is by default the
    file's.
    """
    chosen = name or re.sub(r"\W", "_", PurePath(file).stem)
    return NotebookStep(chosen, {"notebook": file}, cast("StepOptions", options))


def approval(
    message: str = "",
    /,
    *,
    name: str = "approval",
    approvers: Sequence[str] = (),
    not_submitter: bool = False,
    **options: Unpack[Options],
) -> ApprovalStep:
    """A step that waits for a person, who approves or rejects the run.

    Args:
        approvers: who may decide; empty: anybody.
        not_submitter: whoever submitted the run may not.
    """
    what = {"message": message, "approvers": list(approvers), "not_submitter": not_submitter}
    return ApprovalStep(name, {"approval": what}, cast("StepOptions", options))
