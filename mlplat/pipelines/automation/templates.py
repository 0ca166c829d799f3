"""Parameters of runs that start by themselves: values with ``${{ trigger.… }}`` in them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from mlplat.errors import InvalidInput, InvalidPipeline
from mlplat.pipelines.expressions import find_expressions, render, root_paths
from mlplat.pipelines.parameters import ParameterValue, resolve_params
from mlplat.pipelines.spec import PipelineSpec

FIELDS = ("name", "time", "date", "timestamp", "event")
MAX_BYTES = 64 * 1024


def scope_of(name: str, moment: datetime, event: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What expressions read: ``trigger.name``, ``time`` (ISO 8601 with offset), ``date``, ``timestamp`` (seconds since
    1970) and ``event``. ``moment`` is in the time zone of whoever wrote the expressions."""
    fields = {
        "name": name,
        "time": moment.isoformat(),
        "date": moment.date().isoformat(),
        "timestamp": int(moment.timestamp()),
        "event": event,
    }
    return {"trigger": fields}


def check_template(spec: PipelineSpec, params: Mapping[str, Any]) -> None:
    """Checks what can be known before the event: names, plain values, and that expressions can be evaluated.

    Raises:
        InvalidInput: one problem a line.
    """
    try:
        if len(msgspec.json.encode(params)) > MAX_BYTES:
            raise InvalidInput(f"params: larger than {MAX_BYTES} bytes")
        paths = [(path, expression) for path, expression in find_expressions(params)]
    except RecursionError as error:
        raise InvalidInput("params: nested too deeply") from error
    problems = []
    for path, expression in paths:
        try:
            check_expression(expression)
        except InvalidInput as error:
            problems.append(f"params.{'.'.join(map(str, path))}: {error}")
    open_ones = {str(path[0]) for path, _expression in paths} & spec.parameters.keys()
    known = {name: parameter for name, parameter in spec.parameters.items() if name not in open_ones}
    try:
        resolve_params(spec.name, known, {name: value for name, value in params.items() if name not in open_ones})
    except InvalidPipeline as error:
        problems.append(str(error))
    if problems:
        raise InvalidInput("\n".join(problems))


def check_expression(expression: str) -> None:
    """Checks an expression that reads ``trigger``.

    Raises:
        InvalidInput: it is none, or reads something that does not exist.
    """
    for path in root_paths(expression):
        if path[:1] != ("trigger",) or len(path) < 2 or path[1] not in FIELDS:
            raise InvalidInput(
                f"{expression!r} refers to {'.'.join(path) or 'nothing'}: here expressions read "
                f"{', '.join(f'trigger.{field}' for field in FIELDS)}"
            )


def render_params(spec: PipelineSpec, params: Mapping[str, Any], scope: Mapping[str, Any]) -> dict[str, ParameterValue]:
    """The values of all parameters. Where an expression gives nothing, the default holds.

    Raises:
        InvalidInput: an expression fails, or a value does not fit.
    """
    rendered = {name: render(value, scope) for name, value in params.items()}
    return spec.resolve_params({name: value for name, value in rendered.items() if value is not None})
