"""Pipelines as Python: ``@step`` marks functions, ``@pipeline`` a function that connects them.

Outside of a pipeline a step is the plain function it was. Inside, calling it adds a step to the
definition and returns a placeholder for its output, which other steps take as an argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.loader import build_spec
from mlplat.pipelines.spec import PipelineSpec, Resources, Retry
from mlplat.sdk.shipping import StoreBlob, uses_of

P = ParamSpec("P")
R = TypeVar("R")
_PARAMETER_TYPES = {int: "int", float: "float", str: "str", bool: "bool"}


@dataclass(frozen=True)
class Placeholder:
    """A value that will exist when the pipeline runs: a parameter, a step's output, or a part of one."""

    expression: str

    def __getitem__(self, key: str | int) -> Placeholder:
        return Placeholder(f"{self.expression}[{key}]" if isinstance(key, int) else f'{self.expression}."{key}"')

    def __iter__(self) -> Any:
        raise InvalidPipeline(
            f"{self.expression} has no value while the pipeline is defined, so it cannot be looped over; "
            "use step.map(...) to run a step once per element"
        )

    def __bool__(self) -> bool:
        raise InvalidPipeline(f"{self.expression} has no value while the pipeline is defined, so it cannot be tested")

    def __str__(self) -> str:
        """In an f-string, the expression as it stands in a definition."""
        return self.template

    @property
    def template(self) -> str:
        """The expression as it stands in a definition."""
        return f"${{{{ {self.expression} }}}}"


ITEM = Placeholder("item")


@dataclass
class _Builder:
    store_blob: StoreBlob
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, definition: StepFunction[Any, Any], arguments: Mapping[str, Any], foreach: Any) -> Placeholder:
        name = base = definition.name
        count = 1
        while name in self.steps:
            count += 1
            name = f"{base}_{count}"
        entry: dict[str, Any] = {
            "uses": uses_of(definition.function, self.store_blob),
            "description": (inspect.getdoc(definition.function) or "").partition("\n")[0],
            "with": {key: _as_template(value) for key, value in arguments.items()},
            "retry": definition.retry.model_dump(),
            "resources": definition.resources.model_dump(),
            "fresh_process": definition.fresh_process,
        }
        if foreach is not None:
            entry["foreach"] = _as_template(foreach)
        self.steps[name] = entry
        return Placeholder(f"steps.{name}.output")


_building: ContextVar[_Builder | None] = ContextVar("mlplat_building", default=None)


class StepFunction(Generic[P, R]):
    """A function that can be a step."""

    def __init__(
        self, function: Callable[P, R], name: str, retry: Retry, resources: Resources, fresh_process: bool
    ) -> None:
        self.function = function
        self.name = name
        self.retry = retry
        self.resources = resources
        self.fresh_process = fresh_process
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the function, or adds the step when a pipeline is being defined."""
        builder = _building.get()
        if builder is None:
            return self.function(*args, **kwargs)
        return cast("R", builder.add(self, self._named(args, kwargs), None))

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, which is how a definition holds them."""
        signature = inspect.signature(self.function)
        named = dict(signature.bind(*args, **kwargs).arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL and parameter.name in named:
                raise InvalidPipeline(
                    f"step {self.name!r}: pass *{parameter.name} by name; a definition has names only"
                )
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(parameter.name, {})
        return named

    def map(self, items: Any, **arguments: Any) -> Any:
        """Adds the step once per element of ``items``; its first parameter takes the element.

        The output is the list of all outputs, in the order of the items.
        """
        builder = _building.get()
        first = next(iter(inspect.signature(self.function).parameters))
        if builder is None:
            return [self.function(item, **arguments) for item in items]
        return builder.add(self, {first: ITEM, **arguments}, items)


@overload
def step(function: Callable[P, R], /) -> StepFunction[P, R]: ...


@overload
def step(
    *,
    name: str | None = None,
    retries: int = 0,
    retry: Retry | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    memory_mb: int | None = None,
    fresh_process: bool = False,
) -> Callable[[Callable[P, R]], StepFunction[P, R]]: ...


def step(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    retries: int = 0,
    retry: Retry | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    memory_mb: int | None = None,
    fresh_process: bool = False,
) -> Any:
    """Marks a function as a step.

    Args:
        name: the step's name; by default the function's.
        retries: further attempts after a failure; for backoff and jitter pass ``retry`` instead.
        retry: the whole retry policy.
        cpus, gpus, memory_mb: what an attempt reserves.
        fresh_process: give each attempt a process of its own; use it for sweeps and for what eats memory.
    """
    policy = retry or Retry(max_attempts=retries + 1)

    def mark(inner: Callable[P, R]) -> StepFunction[P, R]:
        resources = Resources(cpus=cpus, gpus=gpus, memory_mb=memory_mb)
        return StepFunction(inner, name or inner.__name__, policy, resources, fresh_process)

    return mark if function is None else mark(function)


class Pipeline:
    """A pipeline defined by a Python function. Its parameters are the function's."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = name
        self.__doc__ = function.__doc__

    def build(self, store_blob: StoreBlob) -> PipelineSpec:
        """The definition.

        Raises:
            InvalidPipeline: the function connects its steps wrongly.
        """
        builder = _Builder(store_blob)
        token = _building.set(builder)
        try:
            self.function(**{name: Placeholder(f"params.{name}") for name in self._parameters()})
        finally:
            _building.reset(token)
        document = {
            "name": self.name,
            "description": (inspect.getdoc(self.function) or "").partition("\n")[0],
            "parameters": self._parameters(),
            "steps": builder.steps,
        }
        return build_spec(document, source=self.name)

    def _parameters(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        hints = inspect.signature(self.function, eval_str=True).parameters
        for name, parameter in hints.items():
            kind = _PARAMETER_TYPES.get(parameter.annotation)
            if kind is None:
                raise InvalidPipeline(
                    f"{self.name}: the parameter {name!r} needs a type: int, float, str or bool, not "
                    f"{parameter.annotation!r}"
                )
            found[name] = {"type": kind}
            if parameter.default is not inspect.Parameter.empty:
                found[name]["default"] = parameter.default
        return found


@overload
def pipeline(function: Callable[..., Any], /) -> Pipeline: ...


@overload
def pipeline(*, name: str) -> Callable[[Callable[..., Any]], Pipeline]: ...


def pipeline(function: Callable[..., Any] | None = None, /, *, name: str | None = None) -> Any:
    """Marks a function as a pipeline; ``name`` is by default the function's, with dashes."""

    def mark(inner: Callable[..., Any]) -> Pipeline:
        return Pipeline(inner, name or inner.__name__.replace("_", "-"))

    return mark if function is None else mark(function)


def _as_template(value: Any) -> Any:
    if isinstance(value, Placeholder):
        return value.template
    if isinstance(value, Mapping):
        return {key: _as_template(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_template(inner) for inner in value]
    return value
