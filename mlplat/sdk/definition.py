"""Pipelines as Python: ``@pipeline`` marks a function that calls steps, and becomes a definition."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack, get_args, get_origin, overload

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.loader import build_spec
from mlplat.pipelines.locations import Mark
from mlplat.pipelines.spec import Concurrency, Env, PipelineSpec
from mlplat.sdk.building import Builder, building, finally_
from mlplat.sdk.local_run import LocalOptions, LocalRun, LocalShipper, run_locally
from mlplat.sdk.placeholders import ITEM, Placeholder, as_template, expression, this_run
from mlplat.sdk.shipping import Shipper, StoreBlob, ship
from mlplat.sdk.steps import StepBase, approval, command, notebook, step

__all__ = [
    "ITEM",
    "Param",
    "Pipeline",
    "Placeholder",
    "approval",
    "command",
    "expression",
    "finally_",
    "notebook",
    "pipeline",
    "step",
    "this_run",
]

_PARAMETER_TYPES = {int: "int", float: "float", str: "str", bool: "bool"}
#: The output of a pipeline whose function returns something else than a dictionary.
SINGLE_OUTPUT = "output"


@dataclass(frozen=True)
class Param:
    """Bounds and a description of a parameter: ``trials: Annotated[int, Param(min=2, max=64)] = 8``."""

    min: float | None = None
    max: float | None = None
    choices: Sequence[int | float | str | bool] | None = None
    description: str = ""


class PipelineOptions(TypedDict, total=False):
    """What can be said of a pipeline; a definition has the same words. ``name`` is by default the function's."""

    name: str
    description: str
    timeout_s: float
    priority: int
    concurrency: Concurrency
    env: Env


class Pipeline(StepBase):
    """A pipeline defined by a Python function, whose parameters are the pipeline's.

    What the function returns are the pipeline's outputs: a dictionary, or one value. Called inside of another
    pipeline it is a step of that one; outside, it is the plain function, and so are its steps.
    """

    def __init__(self, function: Callable[..., Any], options: PipelineOptions) -> None:
        unknown = sorted(options.keys() - PipelineOptions.__annotations__.keys())
        if unknown:
            raise TypeError(f"a pipeline has no option {unknown[0]!r}")
        self.function = function
        self._own: PipelineOptions = options
        #: The pipeline's name. As a step of another one it is called like its function.
        self.pipeline_name = options.get("name", function.__name__.replace("_", "-"))
        super().__init__(function.__name__, {}, {})
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the function plainly, or adds the pipeline to the one that is being defined."""
        return self._call(args, kwargs)

    def build(self, store_blob: StoreBlob) -> PipelineSpec:
        """The definition; code that is not installed where steps run goes to ``store_blob``.

        Raises:
            InvalidPipeline: the function connects its steps wrongly; one problem a line.
        """
        return self._build(Shipper(store_blob), ())

    def run_local(self, options: LocalOptions | None = None, /, **params: Any) -> LocalRun:
        """Runs the pipeline in this process, without a server, by the rules that hold on one.

        Steps run one after the other, in this thread: breakpoints work. A failed run raises the error of the step
        that failed, as it was raised there, unless ``LocalOptions(raise_errors=False)``. Timeouts, packages,
        resources and caches do not apply.

        Raises:
            InvalidPipeline: the definition or a parameter is wrong.
            PipelineFailed: the run failed, and not by an exception.
        """
        with building(None), LocalShipper(options) as shipper:
            return run_locally(self._build(shipper, ()), params, shipper, options or LocalOptions())

    def _build(self, shipper: Shipper, around: tuple[object, ...]) -> PipelineSpec:
        return self._built(shipper, around)[0]

    def _built(self, shipper: Shipper, around: tuple[object, ...]) -> tuple[PipelineSpec, bool]:
        """The definition, and whether its only output is not named by its function."""
        if self.origin in around:
            raise InvalidPipeline(f"the pipeline {self.pipeline_name!r} contains itself")
        builder = Builder(shipper, (*around, self.origin))
        place = Mark(inspect.getfile(self.function), self.function.__code__.co_firstlineno)
        try:
            parameters = parameters_of(self.function)
        except InvalidPipeline as error:
            raise InvalidPipeline(f"{place}: {self.pipeline_name}: {error.message}") from error
        with building(builder):
            returned = self.function(**{name: Placeholder(f"params.{name}") for name in parameters})
        document = {
            "description": (inspect.getdoc(self.function) or "").partition("\n")[0],
            **self._own,
            "name": self.pipeline_name,
            "parameters": parameters,
            "steps": builder.steps,
            "finally": builder.finally_,
            "outputs": {name: as_template(value) for name, value in _outputs(returned).items()},
        }
        spec = build_spec(document, self.pipeline_name, {(): place, **builder.lines})
        return ship(spec, {(): Path(place.source).resolve().parent}, shipper), not isinstance(returned, Mapping)

    def _what(self, builder: Builder) -> dict[str, Any]:
        spec, single = self._built(builder.shipper, builder.around)
        if single:
            builder.single.add(self.origin)
        return {"pipeline": spec}

    def _output(self, builder: Builder, name: str, *, mapped: bool) -> Placeholder:
        whole = f"steps.{name}.output"
        if self.origin not in builder.single:
            return Placeholder(whole)
        # Unlike a projection, map() keeps what is null.
        return Placeholder(f"map(&{SINGLE_OUTPUT}, {whole})" if mapped else f"{whole}.{SINGLE_OUTPUT}")

    def _description(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def _first_parameter(self) -> str | None:
        return next(iter(inspect.signature(self.function).parameters), None)

    def _named(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        return dict(inspect.signature(self.function).bind(*args, **arguments).arguments)

    def _run_plainly(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        return self.function(*args, **arguments)


@overload
def pipeline(function: Callable[..., Any], /) -> Pipeline: ...


@overload
def pipeline(**options: Unpack[PipelineOptions]) -> Callable[[Callable[..., Any]], Pipeline]: ...


def pipeline(function: Callable[..., Any] | None = None, /, **options: Unpack[PipelineOptions]) -> Any:
    """Marks a function as a pipeline, with options or without: see ``PipelineOptions``.

    Raises:
        TypeError: there is no such option.
    """

    def mark(inner: Callable[..., Any]) -> Pipeline:
        return Pipeline(inner, options)

    return mark if function is None else mark(function)


def parameters_of(function: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """The parameters of a pipeline's function, as a definition has them.

    Raises:
        InvalidPipeline: one has no type, or another one than int, float, str, bool, or a ``Literal`` of these.
    """
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError as error:
        raise InvalidPipeline(f"the type of a parameter is not known here: {error}") from error
    return {name: _parameter(name, parameter) for name, parameter in signature.parameters.items()}


def _parameter(name: str, parameter: inspect.Parameter) -> dict[str, Any]:
    annotation, fields = parameter.annotation, {}
    if get_origin(annotation) is Annotated:
        annotation, *notes = get_args(annotation)
        for note in notes:
            if isinstance(note, Param):
                fields = {key: value for key, value in asdict(note).items() if value is not None}
    if get_origin(annotation) is Literal:
        fields.setdefault("choices", list(get_args(annotation)))
        kinds = {type(choice) for choice in get_args(annotation)}
        annotation = kinds.pop() if len(kinds) == 1 else annotation
    kind = _PARAMETER_TYPES.get(annotation) if isinstance(annotation, type) else None
    if kind is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise InvalidPipeline(
            f"the parameter {name!r} needs a type: int, float, str or bool, not {parameter.annotation!r}"
        )
    if parameter.default is not parameter.empty:
        fields["default"] = parameter.default
    return {"type": kind, **fields}


def _outputs(returned: Any) -> dict[str, Any]:
    if returned is None:
        return {}
    return dict(returned) if isinstance(returned, Mapping) else {SINGLE_OUTPUT: returned}
