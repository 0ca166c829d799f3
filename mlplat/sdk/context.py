"""Which step attempt this code runs in, if any."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class StepContext:
    """The attempt that calls the user's function. ``attempt`` counts from 1."""

    pipeline: str
    run_id: str
    step: str
    item: int | None
    attempt: int
    max_attempts: int
    http_url: str

    @property
    def label(self) -> str:
        """``run/step/item/attempt``, the attempt's name everywhere."""
        return f"{self.run_id}/{self.step}/{-1 if self.item is None else self.item}/{self.attempt}"


_current: ContextVar[StepContext | None] = ContextVar("mlplat_step", default=None)


def current_step() -> StepContext | None:
    """The step attempt under way in this process, or None outside of pipelines."""
    return _current.get()


def enter_step(context: StepContext) -> None:
    """Declares the attempt that this process runs from now on."""
    _current.set(context)
