"""Hyperparameter sweeps on Ray Tune, tracked: a parent run, and a child run with its curve per trial."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from mlplat.errors import PlatformError
from mlplat.sdk.context import current_step, enter_step
from mlplat.sdk.run import Run
from mlplat.sdk.starting import start_run

#: Trains with a configuration and yields the metrics of each epoch.
Objective = Callable[[dict[str, Any]], Iterable[Mapping[str, float]]]


@dataclass(frozen=True)
class Trial:
    """One finished trial, with the metrics of its last epoch."""

    config: dict[str, Any]
    metrics: dict[str, float]
    run_id: str


def sweep(
    objective: Objective,
    space: Mapping[str, Any],
    *,
    num_samples: int,
    metric: str,
    mode: str = "max",
    experiment: str,
    name: str = "sweep",
    max_concurrent: int = 2,
    cpus_per_trial: float = 1.0,
    seed: int | None = None,
) -> list[Trial]:
    """Runs a native Ray Tune sweep and returns its trials, best first.

    A sweep leaves objects behind that its process owns, and Ray keeps such a process alive: run the step with
    ``fresh_process``.

    Args:
        objective: a function of the configuration that yields metrics once per epoch.
        space: Ray Tune's search space; ``num_samples`` are drawn from it.
        metric: what trials are ranked by, and ``mode`` ("max" or "min") how.
        experiment: where the parent run and one child run per trial are tracked.
        max_concurrent: trials that run at the same time.
        seed: makes the drawn configurations reproducible.

    Raises:
        PlatformError: no trial succeeded.
    """
    step = current_step()
    with start_run(experiment, name, tags={"mlplat.sweep": name}) as parent:
        parent_id = parent.run_id

        def trainable(config: dict[str, Any]) -> None:
            if step is not None:
                enter_step(step)
            with start_run(experiment, parent=parent_id, params=config) as run:
                last: Mapping[str, float] = {}
                for epoch, last in enumerate(objective(config)):
                    run.log(last, step=epoch)
                    tune.report({**last, "mlplat_run_id": run.run_id})

        with tempfile.TemporaryDirectory(prefix="mlplat-tune-") as storage:
            tuner = tune.Tuner(
                tune.with_resources(trainable, {"cpu": cpus_per_trial}),
                param_space=dict(space),
                tune_config=tune.TuneConfig(
                    num_samples=num_samples,
                    metric=metric,
                    mode=mode,
                    reuse_actors=True,
                    search_alg=tune.search.BasicVariantGenerator(random_state=seed, max_concurrent=max_concurrent),
                ),
                run_config=tune.RunConfig(name=name, storage_path=storage, verbose=1),
            )
            results = tuner.fit()
        finished = [results[index] for index in range(len(results))]
        trials = [_trial(result) for result in finished if result.error is None and result.metrics]
        _summarise(parent, trials, len(results), metric, mode)
    if not trials:
        raise PlatformError(f"all {len(results)} trials failed: {results.errors[0] if results.errors else 'no result'}")
    return sorted(trials, key=lambda trial: trial.metrics[metric], reverse=mode == "max")


def _trial(result: Any) -> Trial:
    config = dict(result.config)
    skipped = {"mlplat_run_id", "timestamp", "training_iteration", "pid", "done", "time_this_iter_s", "time_total_s"}
    metrics = {
        key: float(value)
        for key, value in result.metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in skipped
    }
    return Trial(config, metrics, result.metrics["mlplat_run_id"])


def _summarise(parent: Run, trials: list[Trial], total: int, metric: str, mode: str) -> None:
    if not trials:
        return
    pick = max if mode == "max" else min
    parent.log({f"best_{metric}": pick(trial.metrics[metric] for trial in trials), "trials": float(total)}, step=0)
