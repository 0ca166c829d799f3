"""Which step attempt this code runs in, if any."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from mlplat.errors import InvalidInput
from mlplat.sdk.checkpoints import Checkpoints
from mlplat.tracking.model import ATTEMPT_TAG

MAX_PROGRESS_TEXT = 500


@dataclass(frozen=True)
class StepContext:
    """The attempt that calls the user's function. ``attempt`` counts from 1.

    ``checkpoint`` keeps what the next attempt, or a resumed run, goes on from.
    """

    pipeline: str
    run_id: str
    step: str
    item: int | None
    attempt: int
    max_attempts: int
    http_url: str
    checkpoint: Checkpoints = field(compare=False, repr=False)
    on_progress: Callable[[dict[str, Any]], None] = field(compare=False, repr=False)
    #: It runs in the user's own process: the platform knows nothing of it.
    is_local: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """In another process, such as a trial's, everything but the way to tell the attempt's progress."""
        return {**self.__dict__, "on_progress": _untold}

    @property
    def label(self) -> str:
        """``run/step/item/attempt``, the attempt's name everywhere."""
        return f"{self.run_id}/{self.step}/{-1 if self.item is None else self.item}/{self.attempt}"

    @property
    def run_tags(self) -> dict[str, str]:
        """Tags of the runs that it starts: runs of an attempt that died end with it, and have its step's lineage."""
        return {ATTEMPT_TAG: self.label, "mlplat.pipelineRun": self.run_id, "mlplat.step": self.step}

    def progress(self, done: float | None = None, text: str = "") -> None:
        """Shows how far the attempt is, to everybody who watches the run. Cheap: call it as often as you like.

        Args:
            done: the fraction that is done, 0 to 1; None when it is not known.
            text: a few words.

        Raises:
            InvalidInput: ``done`` is no fraction.
        """
        if done is not None and not 0 <= done <= 1:
            raise InvalidInput(f"progress is a fraction between 0 and 1, not {done!r}")
        self.on_progress({"done": done, "text": text[:MAX_PROGRESS_TEXT]})


def _untold(_progress: dict[str, Any]) -> None:
    """What a process that is not the attempt's own says of its progress goes nowhere."""


_current: ContextVar[StepContext | None] = ContextVar("mlplat_step", default=None)


def current_step() -> StepContext | None:
    """The step attempt under way in this process, or None outside of pipelines."""
    return _current.get()


def enter_step(context: StepContext | None) -> None:
    """Declares the attempt that this process runs from now on."""
    _current.set(context)
