"""What users log, checked: a mistake is named at once, where it was made."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

from mlplat.errors import InvalidInput
from mlplat.keys import check_key
from mlplat.tracking.model import cut_param

_INT64 = 2**63


def metric_values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The values as floats: numbers, and whatever converts to one (NumPy, Torch and JAX scalars).

    Raises:
        InvalidInput: a key is not a string, or a value not a number.
    """
    values: dict[str, float] = {}
    for key, value in metrics.items():
        if type(value) is float and type(key) is str:
            values[key] = value
        else:
            values[_text(key)] = _number(key, value)
    return values


def step_number(step: SupportsIndex) -> int:
    """The step as an int.

    Raises:
        InvalidInput: not a whole number of 64 bits.
    """
    try:
        number = operator.index(step)
    except TypeError as error:
        raise InvalidInput(f"a step is a whole number, not {step!r}") from error
    if not -_INT64 <= number < _INT64:
        raise InvalidInput(f"a step has 64 bits, {number} has more")
    return number


def param_texts(values: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """Parameters as they are stored, without those in ``known``.

    Raises:
        InvalidInput: a key is malformed, or has another value in ``known``.
    """
    texts = {_checked("param", key): cut_param(str(value)) for key, value in values.items()}
    for key, value in texts.items():
        if known.get(key, value) != value:
            raise InvalidInput(
                f"param {key!r} was logged as {known[key]!r} and cannot become {value!r}: params do not change"
            )
    return {key: value for key, value in texts.items() if key not in known}


def tag_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Tags as they are sent.

    Raises:
        InvalidInput: a key is malformed.
    """
    return {_checked("tag", key): str(value) for key, value in values.items()}


def _checked(kind: str, key: object) -> str:
    text = _text(key)
    check_key(kind, text)
    return text


def _text(key: object) -> str:
    if not isinstance(key, str):
        raise InvalidInput(f"keys are strings, not {type(key).__name__}: {key!r}")
    return str(key)


def _number(key: object, value: Any) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text is not a number")
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # torch raises RuntimeError
        raise InvalidInput(f"metric {key!r}: the value must be a number, not {_short(value)}: {error}") from error


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:80]}{'…' if len(text) > 80 else ''}"
