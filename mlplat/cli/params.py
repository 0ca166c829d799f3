"""Values of a pipeline's parameters from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlplat.errors import InvalidInput
from mlplat.pipelines.spec import PipelineSpec

_TRUE, _FALSE = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


def parse_params(spec: PipelineSpec, texts: Sequence[str], kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``key=value`` texts as values of the pipeline's parameter types, on top of those in ``kept``.

    Raises:
        InvalidInput: no ``=``, an unknown key, or a value of the wrong type.
    """
    values: dict[str, Any] = dict(kept or {})
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"-p {text}: expected key=value")
        parameter = spec.parameters.get(name)
        values[name] = value if parameter is None else _parse(name, parameter.type, value)
    spec.resolve_params(values)
    return values


def _parse(name: str, kind: str, text: str) -> Any:
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
        if kind == "bool":
            if text.lower() not in _TRUE | _FALSE:
                raise ValueError
            return text.lower() in _TRUE
    except ValueError as error:
        raise InvalidInput(f"parameters.{name}: expected {kind}, got {text!r}") from error
    return text
