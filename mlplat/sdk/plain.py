"""What a step's function gets when it is called as the plain function that it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlplat.artifacts.store import ArtifactStore
from mlplat.sdk.checkpoints import Checkpoints
from mlplat.sdk.context import StepContext
from mlplat.settings import Settings


@contextmanager
def plain_context(step: str) -> Iterator[StepContext]:
    """The context of a first and only attempt, whose checkpoints go with it."""
    with tempfile.TemporaryDirectory(prefix="mlplat-step-") as folder:
        checkpoints = Checkpoints(ArtifactStore(f"file://{folder}"), ["checkpoints"], attempt=1, keep=1)
        yield StepContext("", "", step, None, 1, 1, Settings().http_url, checkpoints, _ignore, is_local=True)


def _ignore(progress: dict[str, Any]) -> None:
    """Nobody watches."""
