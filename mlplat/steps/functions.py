"""From a step's ``uses`` to the function, in a process that runs steps."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cloudpickle

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput
from mlplat.steps.failures import user_line


def load_function(uses: str, artifacts: ArtifactStore) -> Callable[..., Any]:
    """The function that a step uses. A shipped one is unpickled, which runs the user's code.

    Raises:
        InvalidInput: there is no such module or function.
    """
    if uses.startswith("pickle:"):
        function: Callable[..., Any] = cloudpickle.loads(artifacts.get_blob(uses.split(":")[1]))
        return function
    return import_function(uses)


def import_function(uses: str) -> Callable[..., Any]:
    """The function with the name ``module:function``.

    Raises:
        InvalidInput: there is no such module or function.
    """
    module_name, _colon, qualified = uses.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's own code
        where = user_line(error)
        line = f" ({where[0]}:{where[1]})" if where else ""
        raise InvalidInput(f"cannot import {module_name!r}: {type(error).__name__}: {error}{line}") from error
    for part in qualified.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            raise InvalidInput(f"module {module_name!r} has no function {qualified!r}") from error
    target = getattr(target, "function", target)  # a function marked with @step
    if not callable(target):
        raise InvalidInput(f"{uses!r} is a {type(target).__name__}, not a function")
    callable_target: Callable[..., Any] = target
    return callable_target


@dataclass(frozen=True)
class ImportReport:
    """What came of importing names.

    Args:
        problems: the reason, for each name that failed.
        code: SHA-256 of the module's source, for each name that has one.
    """

    problems: dict[str, str]
    code: dict[str, str]


def try_imports(names: Sequence[str]) -> ImportReport:
    """Imports ``module:function`` names, where steps run."""
    report = ImportReport({}, {})
    for name in names:
        try:
            import_function(name)
        except InvalidInput as error:
            report.problems[name] = error.message
            continue
        digest = _source_digest(name.partition(":")[0])
        if digest is not None:
            report.code[name] = digest
    return report


@lru_cache(maxsize=1_000)
def _source_digest(module_name: str) -> str | None:
    file = getattr(sys.modules[module_name], "__file__", None)
    if file is None:
        return hashlib.sha256(f"{module_name} of Python {sys.version}".encode()).hexdigest()
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return None


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], uses: str) -> None:
    """Refuses arguments that the function does not take.

    Raises:
        InvalidInput: it cannot be called so.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin without a signature: calling it will tell
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InvalidInput(f"{uses} cannot be called with ({', '.join(arguments)}): {error}") from error
