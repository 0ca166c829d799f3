"""Failures of a step's code, as the person who wrote the code reads them."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from functools import cache
from pathlib import Path
from types import TracebackType

from mlplat.errors import PlatformError

#: Packages between the user's frames that say nothing to the user.
_FRAMEWORKS = ("mlplat", "ray", "cloudpickle", "importlib", "runpy")
#: A part of this package that is a user's code in all but name.
_EXAMPLES = "demo"
MAX_SUMMARY = 500


def user_traceback(error: BaseException) -> str:
    """The traceback with the user's frames only, those of the errors that led to this one included.

    Frames of the platform, of Ray and of the import machinery are left out, wherever they stand.
    """
    told = traceback.TracebackException.from_exception(error, compact=True)
    _clean(told, set())
    return "".join(told.format()).rstrip()


def user_line(error: BaseException) -> tuple[str, int] | None:
    """File and line of the user's code in which the error was raised; None when none of it was under way."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return error.filename, error.lineno
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_framework(frame.filename)]
    return (frames[-1].filename, frames[-1].lineno or 0) if frames else None


def is_refusal(error: BaseException) -> bool:
    """Whether the platform itself refused something, without a line of the user's code under way."""
    return isinstance(error, PlatformError) and user_line(error) is None


def from_users_frame(error: BaseException) -> TracebackType | None:
    """The error's traceback from the user's first frame on; all of it when there is none."""
    found = error.__traceback__
    while found is not None and _is_framework(found.tb_frame.f_code.co_filename):
        found = found.tb_next
    return found or error.__traceback__


def summary(error: BaseException) -> str:
    """``Class: the first line of its text``."""
    first_line = (_text(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:MAX_SUMMARY]


def error_types(error: BaseException) -> tuple[str, ...]:
    """The class and its bases as ``module.Class``, for the retry policy."""
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in type(error).__mro__ if base is not object)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # the user's own code
        return "(its text cannot be told)"


def _clean(told: traceback.TracebackException, seen: set[int]) -> None:
    if id(told) in seen:
        return
    seen.add(id(told))
    told.stack = traceback.StackSummary.from_list([frame for frame in told.stack if not _is_framework(frame.filename)])
    for other in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if other is not None:
            _clean(other, seen)


@cache
def _is_framework(file: str) -> bool:
    if file.startswith("<frozen "):
        return True
    return any(file.startswith(root) for root in _roots()) and not file.startswith(_examples())


@cache
def _roots() -> tuple[str, ...]:
    """Where the frameworks' files lie: a folder with its separator, or one file."""
    found: list[str] = []
    for name in _FRAMEWORKS:
        spec = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += [f"{location}{os.sep}" for location in spec.submodule_search_locations]
        elif spec is not None and spec.origin and spec.has_location:
            found.append(spec.origin)
    return tuple(found)


def _examples() -> str:
    return f"{Path(__file__).resolve().parent.parent / _EXAMPLES}{os.sep}"
