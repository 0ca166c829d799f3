"""mlplat: tracking, registry, pipelines and artifacts as a Ray application."""

from mlplat.pipelines.spec import Retry
from mlplat.sdk.context import current_step
from mlplat.sdk.definition import pipeline, step
from mlplat.sdk.pipeline_runs import submit
from mlplat.sdk.registry import register_model
from mlplat.sdk.run import Run, start_run

__all__ = ["Retry", "Run", "current_step", "pipeline", "register_model", "start_run", "step", "submit"]
__version__ = "0.1.0"
