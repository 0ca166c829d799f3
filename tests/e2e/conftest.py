"""The stock mlflow client, pointed at the session's platform."""

from __future__ import annotations

from collections.abc import Iterator

import mlflow
import pytest
from mlflow import MlflowClient

from tests.platform import Platform


@pytest.fixture
def client(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """An unmodified client; the fluent API uses the same address."""
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    mlflow.set_tracking_uri(platform.url)
    yield MlflowClient(platform.url)
    while mlflow.active_run() is not None:
        mlflow.end_run()
