"""What pydantic found wrong with a definition, as people read it: paths of the definition, and hints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from itertools import islice
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from mlplat.pipelines.dag import Path, Problem
from mlplat.pipelines.spec import PipelineSpec

#: Nobody reads more, and each takes a while to explain.
MAX_ERRORS = 1_000
_A_VALID_NAME = "letters, digits and underscores, a letter first"


def problems_of(error: ValidationError) -> list[Problem]:
    """The problems with a ``PipelineSpec``, one for each place."""
    found: dict[Path, list[str]] = {}
    for item in islice(error.errors(include_url=False, include_context=False), MAX_ERRORS):
        path, models = _follow(item["loc"])
        found.setdefault(path, []).append(_reason(item, path, models))
    # A choice of forms names the outer place too when the inner one is what is wrong with the likely form.
    outer = {path[:length] for path in found for length in range(len(path))}
    return [Problem(path, " or ".join(dict.fromkeys(found[path]))) for path in found if path not in outer]


def _follow(location: tuple[str | int, ...]) -> tuple[Path, list[type[BaseModel]]]:
    """Pydantic's location without what it adds for unions and keys, and the models whose field the last part is."""
    path: list[str | int] = []
    forms: list[Any] = [PipelineSpec]
    models: list[type[BaseModel]] = []
    parts = iter(location)
    for part in parts:
        if forms == [JsonValue]:  # what it is in, a key, what that is in, a key …
            path += list(parts)[::2]
            break
        if len(forms) > 1:  # the name of the form that did not fit
            forms = [form for form in forms if part in (getattr(form, "__name__", None), str(form))] or forms[:1]
            continue
        if part == "[key]":
            continue
        path.append(part)
        models = [form for form in forms if _is_model(form)]
        forms = list(_inside(forms[0], part)) if forms else []
    return tuple(path), models


def _inside(form: Any, part: str | int) -> Iterator[Any]:
    """The forms that a part of a value may have."""
    if _is_model(form):
        for name, field in form.model_fields.items():
            if part in (name, field.alias):
                yield from _forms(_hints(form)[name])
    elif get_origin(form) is dict:
        yield from _forms(get_args(form)[1])
    elif get_origin(form) is list:
        yield from _forms(get_args(form)[0])


@cache
def _hints(model: type[BaseModel]) -> dict[str, Any]:
    return get_type_hints(model, include_extras=True)


def _forms(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _forms(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for choice in get_args(annotation):
            if choice is not NoneType:
                yield from _forms(choice)
    else:
        yield annotation


def _is_model(form: Any) -> bool:
    return isinstance(form, type) and issubclass(form, BaseModel)


def _reason(item: ErrorDetails, path: Path, models: list[type[BaseModel]]) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        return f"unknown field{_hint(str(path[-1]), models)}"
    if kind == "missing":
        return "required, but missing"
    if kind == "string_pattern_mismatch":
        return _mismatch(item)
    if kind == "model_type" and path[-1:] == ("pipeline",):
        return "expected a definition; only a YAML file may name another file"
    if kind == "model_type":
        return "expected a mapping"
    return str(item["msg"]).removeprefix("Value error, ")


def _mismatch(item: ErrorDetails) -> str:
    where, given = item["loc"][-1], item["input"]
    if where == "uses":
        return f"expected module:function, got {given!r}"
    return f"not a valid name: {given!r} ({_A_VALID_NAME})"


def _hint(name: str, models: Iterable[type[BaseModel]]) -> str:
    known = [field.alias or own for model in models for own, field in model.model_fields.items()]
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
