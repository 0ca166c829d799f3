"""What a model takes and gives, as its ``MLmodel`` file tells, and whether callers can go on with another. Pure.

The format is that of MLflow's ``ModelSignature.to_dict``: JSON texts for inputs, outputs and params.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

#: The inputs, the outputs or the params, each with its name and type; and all three, or those that are told.
Specs = Sequence[Mapping[str, Any]]
Signature = Mapping[str, Specs | None]

PARTS = ("inputs", "outputs", "params")
#: Types into which a model that takes them lets values of the other type, as MLflow's schema enforcement does.
_WIDER = {"integer": {"long", "double"}, "long": {"double"}, "float": {"double"}}


def read_signature(mlmodel: str) -> Signature | None:
    """The signature in the text of an ``MLmodel`` file; None: it has none that can be understood."""
    try:
        found = yaml.load(mlmodel, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    told = found.get("signature") if isinstance(found, dict) else None
    if not isinstance(told, dict):
        return None
    signature = {part: _specs(told.get(part)) for part in PARTS}
    return signature if any(specs is not None for specs in signature.values()) else None


def _specs(text: object) -> list[dict[str, Any]] | None:
    if not isinstance(text, str):
        return None
    try:
        specs = json.loads(text)
        storable = json.dumps(specs, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    # Postgres' JSON has neither NaN, nor half characters, nor zeros in texts.
    if b"\\u0000" in storable or not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
        return None
    return specs


def incompatibilities(before: Signature, after: Signature) -> Iterator[str]:
    """Why callers of ``before`` cannot call ``after``, for people; nothing: they can."""
    yield from _broken_inputs(before.get("inputs"), after.get("inputs"))
    yield from _broken_outputs(before.get("outputs"), after.get("outputs"))
    yield from _broken_params(before.get("params") or (), after.get("params") or ())


def _broken_inputs(before: Specs | None, after: Specs | None) -> Iterator[str]:
    if before is None or after is None:
        if before is not None:
            yield "the inputs are not told any more"
        return
    known = _by_name(before)
    for name, spec in _by_name(after).items():
        if name not in known:
            if spec.get("required", True):
                yield f"input {name} is new and required"
            continue
        if not _takes(spec, known[name]):
            yield f"input {name} was {_shown(known[name])} and is {_shown(spec)}"
        elif spec.get("required", True) and not known[name].get("required", True):
            yield f"input {name} is required now"


def _broken_outputs(before: Specs | None, after: Specs | None) -> Iterator[str]:
    if before is None or after is None:
        if before is not None:
            yield "the outputs are not told any more"
        return
    now = _by_name(after)
    for name, spec in _by_name(before).items():
        if name not in now:
            yield f"output {name} is gone"
        elif not _takes(spec, now[name], widening=False):
            yield f"output {name} was {_shown(spec)} and is {_shown(now[name])}"


def _broken_params(before: Specs, after: Specs) -> Iterator[str]:
    known, now = _by_name(before), _by_name(after)
    for name, spec in known.items():
        if name not in now:
            yield f"param {name} is gone"
        elif not _takes(now[name], spec):
            yield f"param {name} was {_shown(spec)} and is {_shown(now[name])}"


def _by_name(specs: Specs) -> dict[str, Mapping[str, Any]]:
    """Specs without a name are told by their place."""
    return {str(spec.get("name", place)): spec for place, spec in enumerate(specs)}


def _takes(taker: Mapping[str, Any], given: Mapping[str, Any], widening: bool = True) -> bool:
    """Whether what ``given`` describes fits where ``taker`` is expected."""
    if taker.get("type") == given.get("type") == "tensor":
        return _tensor_takes(_tensor(taker), _tensor(given))
    if _type(taker) == _type(given):
        return True
    wider = _WIDER.get(str(given.get("type")), set()) if widening else set()
    return taker.get("type") in wider and taker.get("shape") == given.get("shape")


def _tensor_takes(taker: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    to, of = taker.get("shape"), given.get("shape")
    if taker.get("dtype") != given.get("dtype") or not isinstance(to, list) or not isinstance(of, list):
        return taker == given
    return len(to) == len(of) and all(size in (-1, other) for size, other in zip(to, of, strict=True))


def _tensor(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    told = spec.get("tensor-spec")
    return told if isinstance(told, dict) else {}


def _type(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in {"name", "required", "default"}}


def _shown(spec: Mapping[str, Any]) -> str:
    kind = _type(spec)
    told = (
        spec.get("type")
        if kind.keys() <= {"type", "shape"} and not kind.get("shape")
        else json.dumps(kind, sort_keys=True)
    )
    return str(told)[:200]
