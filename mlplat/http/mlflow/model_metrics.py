"""Metrics that name a logged model: they are attached to that model too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlplat.http.mlflow.endpoint import parse_double
from mlplat.http.services import Services
from mlplat.tracking.logged_model import ModelMetric, check_metric_dataset


class WireMetric(Protocol):
    """A metric of a request, already checked but for the model and dataset that it names."""

    key: str
    value: float | str | None
    timestamp: int | None
    step: int
    model_id: str | None
    dataset_name: str | None
    dataset_digest: str | None


async def check_models(services: Services, metrics: Sequence[WireMetric]) -> None:
    """Checks the models and datasets that metrics name, before anything is written.

    ``metrics``: those that name a model.

    Raises:
        NotFound: no such model.
        InvalidInput: a dataset's name or digest is too long.
    """
    if not metrics:
        return
    for metric in metrics:
        check_metric_dataset(metric.dataset_name, metric.dataset_digest)
    await services.logged_models.check({metric.model_id for metric in metrics if metric.model_id})


async def attach_model_metrics(services: Services, run_id: str, metrics: Sequence[WireMetric]) -> None:
    """Adds metrics to the models that they name.

    Raises:
        NotFound: no such model.
    """
    points = [
        ModelMetric(
            metric.model_id, run_id, metric.key, parse_double("value", metric.value), metric.timestamp or 0,
            metric.step, metric.dataset_name or None, metric.dataset_digest or None,
        )
        for metric in metrics
        if metric.model_id
    ]  # fmt: skip
    if points:
        await services.logged_models.log_metrics(points)
