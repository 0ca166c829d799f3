"""What runs of MLflow's own client are tagged with when they are started within a step of a pipeline.

MLflow finds the class by the entry point ``mlflow.run_context_provider``, and calls it whenever a run starts.
"""

from __future__ import annotations

from mlplat.sdk.context import current_step


class StepRunContext:
    """A provider of tags, as MLflow's ``RunContextProvider`` describes it."""

    def in_context(self) -> bool:
        """Whether there is anything to tell."""
        return current_step() is not None

    def tags(self) -> dict[str, str]:
        """See ``StepContext.run_tags``."""
        step = current_step()
        return {} if step is None else step.run_tags
