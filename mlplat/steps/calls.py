"""Calling the code of a step, whatever kind of step it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mlplat.artifacts.store import ArtifactStore
from mlplat.pipelines.model import AttemptRequest
from mlplat.pipelines.outputs import load_arguments
from mlplat.steps.commands import run_command
from mlplat.steps.functions import check_arguments, load_function
from mlplat.steps.notebooks import run_notebook

#: From a step's ``uses`` to its function.
FindFunction = Callable[[str, ArtifactStore], Callable[..., Any]]


def call_step(
    request: AttemptRequest, artifacts: ArtifactStore, context: object, find: FindFunction = load_function
) -> Any:
    """Runs the attempt's function, command or notebook in this process and returns what it gave.

    Args:
        context: given to a function that has a parameter ``ctx``.

    Raises:
        InvalidInput: there is no such function, or it cannot be called so.
        Exception: whatever the user's code raises.
    """
    arguments: dict[str, Any] = load_arguments(dict(request.arguments), artifacts)
    if request.kind == "command":
        return run_command(request.target, arguments, request.label)
    target = str(request.target)
    if request.kind == "notebook":
        folder = f"pipelines/{request.run_id}/notebooks/{request.step}/{request.item}/{request.attempt}"
        return run_notebook(target, arguments, artifacts, folder)
    return call_function(find(target, artifacts), arguments, context, target)


def call_function(function: Callable[..., Any], arguments: Mapping[str, Any], context: object, uses: str) -> Any:
    """Calls a step's function with its arguments, and with the context if it takes one.

    Raises:
        InvalidInput: it cannot be called so.
        Exception: whatever the function raises.
    """
    given = dict(arguments)
    if "ctx" not in given and takes_context(function):
        given["ctx"] = context
    check_arguments(function, given, uses)
    return function(**given)


def takes_context(function: Callable[..., Any]) -> bool:
    """Whether the function has a parameter ``ctx``, which gets the ``StepContext``."""
    try:
        return "ctx" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
