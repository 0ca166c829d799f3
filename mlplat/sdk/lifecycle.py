"""Moving and purging runs from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlplat.sdk.client import API, Client, client_for, default_url
from mlplat.sdk.run import Run

#: Runs in one call, few enough for it to answer in time.
PURGE_PAGE = 200


def move_runs(
    runs: Sequence[Run | str], experiment: str, *, with_children: bool = False, url: str | None = None
) -> list[str]:
    """Moves runs to an experiment that exists, all of them or none. Their artifacts stay where they are.

    Args:
        runs: the runs, or their ids.
        experiment: the experiment's name.
        with_children: take all descendants along.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.

    Returns:
        The ids of the runs that are in the experiment now.

    Raises:
        NotFound: no such run or experiment.
        InvalidInput: one of them is deleted.
    """
    client = client_for(url or default_url())
    found = client.get(f"{API}/experiments/get-by-name", experiment_name=experiment)["experiment"]
    run_ids = [run.run_id if isinstance(run, Run) else run for run in runs]
    body = {"run_ids": run_ids, "experiment_id": found["experiment_id"], "with_children": with_children}
    moved: list[str] = client.post("/api/v1/runs/move", body)["run_ids"]
    return moved


def purge(
    client: Client,
    older_than: str = "0s",
    experiments: Sequence[str] | None = None,
    runs: Sequence[str] | None = None,
    *,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Removes deleted runs and experiments for good; answers counts, bytes per store, and what was kept and why.

    Raises:
        InvalidInput: a run that was asked for by id is active.
    """
    body = {"older_than": older_than, "experiments": experiments, "runs": runs, "dry_run": dry_run, "limit": PURGE_PAGE}
    total: dict[str, Any] = {}
    after = ""
    while True:
        report = client.post("/api/v1/purge", body | {"after": after})
        # Counts add up, lists join.
        total = {key: total[key] + report[key] if key in total else report[key] for key in report if key != "next"}
        if report["next"] is None:
            return total
        after = report["next"]
