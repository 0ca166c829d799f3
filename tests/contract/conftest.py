"""Stores shared by the contract tests."""

from __future__ import annotations

import pytest

from mlplat.metrics.store import MetricStore
from tests.contract.chdb import shared_store


@pytest.fixture(scope="session")
def metric_store() -> MetricStore:
    """The process' chDB."""
    return shared_store()
