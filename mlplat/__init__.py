"""mlplat: tracking, registry, pipelines and artifacts as a Ray application."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlplat.pipelines.spec import Cache, Checkpoint, Concurrency, Env, Retry
    from mlplat.sdk.automation import schedule, trigger
    from mlplat.sdk.building import finally_
    from mlplat.sdk.capture.options import Capture
    from mlplat.sdk.context import StepContext, current_step
    from mlplat.sdk.definition import Param, pipeline
    from mlplat.sdk.lifecycle import move_runs
    from mlplat.sdk.local_run import LocalOptions
    from mlplat.sdk.pipeline_runs import pipeline_run, submit
    from mlplat.sdk.placeholders import ITEM, expression, this_run
    from mlplat.sdk.registry import register_model
    from mlplat.sdk.run import Run, RunWarning
    from mlplat.sdk.search import RunRecord, get_run, search_runs
    from mlplat.sdk.starting import resume_run, start_run
    from mlplat.sdk.steps import approval, command, notebook, step

__all__ = [
    "ITEM",
    "Cache",
    "Capture",
    "Checkpoint",
    "Concurrency",
    "Env",
    "LocalOptions",
    "Param",
    "Retry",
    "Run",
    "RunRecord",
    "RunWarning",
    "StepContext",
    "approval",
    "command",
    "current_step",
    "expression",
    "finally_",
    "get_run",
    "move_runs",
    "notebook",
    "pipeline",
    "pipeline_run",
    "register_model",
    "resume_run",
    "schedule",
    "search_runs",
    "start_run",
    "step",
    "submit",
    "this_run",
    "trigger",
]
__version__ = "0.1.0"

# Loaded when first used: the platform's own processes import this package too, and need none of it.
_HOMES = {
    "ITEM": "mlplat.sdk.placeholders",
    "Cache": "mlplat.pipelines.spec",
    "Capture": "mlplat.sdk.capture.options",
    "Checkpoint": "mlplat.pipelines.spec",
    "Concurrency": "mlplat.pipelines.spec",
    "Env": "mlplat.pipelines.spec",
    "LocalOptions": "mlplat.sdk.local_run",
    "Param": "mlplat.sdk.definition",
    "Retry": "mlplat.pipelines.spec",
    "Run": "mlplat.sdk.run",
    "RunRecord": "mlplat.sdk.search",
    "RunWarning": "mlplat.sdk.run",
    "StepContext": "mlplat.sdk.context",
    "approval": "mlplat.sdk.steps",
    "command": "mlplat.sdk.steps",
    "current_step": "mlplat.sdk.context",
    "expression": "mlplat.sdk.placeholders",
    "finally_": "mlplat.sdk.building",
    "get_run": "mlplat.sdk.search",
    "move_runs": "mlplat.sdk.lifecycle",
    "notebook": "mlplat.sdk.steps",
    "pipeline": "mlplat.sdk.definition",
    "pipeline_run": "mlplat.sdk.pipeline_runs",
    "register_model": "mlplat.sdk.registry",
    "resume_run": "mlplat.sdk.starting",
    "schedule": "mlplat.sdk.automation",
    "search_runs": "mlplat.sdk.search",
    "start_run": "mlplat.sdk.starting",
    "step": "mlplat.sdk.steps",
    "submit": "mlplat.sdk.pipeline_runs",
    "this_run": "mlplat.sdk.placeholders",
    "trigger": "mlplat.sdk.automation",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
