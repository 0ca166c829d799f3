"""The context of a step's attempt."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput
from mlplat.sdk.checkpoints import Checkpoints
from mlplat.sdk.context import StepContext


def test_a_context_travels_to_other_processes_without_the_way_to_tell_progress(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    lock = threading.Lock()  # as what the attempt's own process tells progress with has one

    def tell(progress: dict[str, Any]) -> None:
        with lock:
            told.append(progress)

    checkpoints = Checkpoints(ArtifactStore(f"file://{tmp_path}"), ("node",), 1, 3)
    context = StepContext("p", "run", "tune", None, 1, 1, "http://localhost", checkpoints, tell)
    context.checkpoint.save({"epoch": 3})
    copy = pickle.loads(cloudpickle.dumps(context))
    copy.progress(0.5)
    context.progress(1.0, "done")
    assert told == [{"done": 1.0, "text": "done"}]
    assert copy == context
    assert copy.checkpoint.load() == {"epoch": 3}


def test_progress_is_a_fraction(tmp_path: Path) -> None:
    checkpoints = Checkpoints(ArtifactStore(f"file://{tmp_path}"), ("node",), 1, 3)
    context = StepContext("p", "run", "s", None, 1, 1, "", checkpoints, lambda progress: None)
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        context.progress(1.5)
