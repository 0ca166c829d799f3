"""mlplat: tracking, registry, pipelines and artifacts as a Ray application."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlplat.pipelines.spec import Retry
    from mlplat.sdk.automation import schedule, trigger
    from mlplat.sdk.capture.options import Capture
    from mlplat.sdk.context import current_step
    from mlplat.sdk.definition import pipeline, step
    from mlplat.sdk.lifecycle import move_runs
    from mlplat.sdk.pipeline_runs import submit
    from mlplat.sdk.registry import register_model
    from mlplat.sdk.run import Run, RunWarning
    from mlplat.sdk.search import RunRecord, get_run, search_runs
    from mlplat.sdk.starting import resume_run, start_run

__all__ = [
    "Capture",
    "Retry",
    "Run",
    "RunRecord",
    "RunWarning",
    "current_step",
    "get_run",
    "move_runs",
    "pipeline",
    "register_model",
    "resume_run",
    "schedule",
    "search_runs",
    "start_run",
    "step",
    "submit",
    "trigger",
]
__version__ = "0.1.0"

# Loaded when first used: the platform's own processes import this package too, and need none of it.
_HOMES = {
    "Capture": "mlplat.sdk.capture.options",
    "Retry": "mlplat.pipelines.spec",
    "Run": "mlplat.sdk.run",
    "RunRecord": "mlplat.sdk.search",
    "RunWarning": "mlplat.sdk.run",
    "current_step": "mlplat.sdk.context",
    "get_run": "mlplat.sdk.search",
    "move_runs": "mlplat.sdk.lifecycle",
    "pipeline": "mlplat.sdk.definition",
    "register_model": "mlplat.sdk.registry",
    "resume_run": "mlplat.sdk.starting",
    "schedule": "mlplat.sdk.automation",
    "search_runs": "mlplat.sdk.search",
    "start_run": "mlplat.sdk.starting",
    "step": "mlplat.sdk.definition",
    "submit": "mlplat.sdk.pipeline_runs",
    "trigger": "mlplat.sdk.automation",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
