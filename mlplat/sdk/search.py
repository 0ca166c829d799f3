"""Reading runs back: as a table, or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import pandas as pd
import pyarrow as pa

from mlplat.sdk.client import API, Client, client_for, default_url
from mlplat.sdk.listing import every, pairs

PAGE = 1_000
HISTORY_PAGE = 100_000
MAX_RUNS = 100_000
_TIME = pa.timestamp("ms", "UTC")
_INFO = pa.schema(
    [
        ("run_id", pa.string()),
        ("name", pa.string()),
        ("experiment_id", pa.int64()),
        ("status", pa.string()),
        ("user", pa.string()),
        ("started_at", _TIME),
        ("ended_at", _TIME),
        ("artifact_uri", pa.string()),
    ]
)
_HISTORY = pa.schema([("step", pa.int64()), ("timestamp", _TIME), ("value", pa.float64())])


@dataclass(frozen=True)
class RunRecord:
    """A run as it was when it was read. ``metrics`` has the last value of each; times are ms since 1970."""

    run_id: str
    name: str
    experiment_id: int
    status: str
    user: str
    started_ms: int
    ended_ms: int | None
    artifact_uri: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    url: str

    @overload
    def metrics_history(self, key: str, *, as_arrow: Literal[False] = False) -> pd.DataFrame: ...
    @overload
    def metrics_history(self, key: str, *, as_arrow: Literal[True]) -> pa.Table: ...
    def metrics_history(self, key: str, *, as_arrow: bool = False) -> pd.DataFrame | pa.Table:
        """Every point of a metric: ``step``, ``timestamp``, ``value``, in the order in which they were logged.

        Raises:
            NotFound: no such run (any more).
        """
        points = list(
            every(
                lambda page: client_for(self.url).get(
                    f"{API}/metrics/get-history",
                    run_id=self.run_id, metric_key=key, max_results=HISTORY_PAGE, **page,
                ),
                "metrics",
            )
        )  # fmt: skip
        columns = [
            pa.array([point.get("step", 0) for point in points], pa.int64()),
            pa.array([point["timestamp"] for point in points], _TIME),
            pa.array([float(point["value"]) for point in points], pa.float64()),
        ]
        table = pa.Table.from_arrays(columns, schema=_HISTORY)
        return table if as_arrow else table.to_pandas()


def get_run(run_id: str, *, url: str | None = None) -> RunRecord:
    """A run with its params, tags and last metric values.

    Raises:
        NotFound: no such run.
    """
    client = client_for((url or default_url()).rstrip("/"))
    return _record(client.get(f"{API}/runs/get", run_id=run_id)["run"], client.url)


@overload
def search_runs(
    experiments: str | Sequence[str] | None = None,
    filter: str = "",
    order_by: str | Sequence[str] = (),
    *,
    max_results: int = MAX_RUNS,
    as_arrow: Literal[False] = False,
    url: str | None = None,
) -> pd.DataFrame: ...
@overload
def search_runs(
    experiments: str | Sequence[str] | None = None,
    filter: str = "",
    order_by: str | Sequence[str] = (),
    *,
    max_results: int = MAX_RUNS,
    as_arrow: Literal[True],
    url: str | None = None,
) -> pa.Table: ...
def search_runs(
    experiments: str | Sequence[str] | None = None,
    filter: str = "",
    order_by: str | Sequence[str] = (),
    *,
    max_results: int = MAX_RUNS,
    as_arrow: bool = False,
    url: str | None = None,
) -> pd.DataFrame | pa.Table:
    """Runs as a table with one row each, newest first unless ordered otherwise.

    Columns are ``run_id``, ``name``, ``experiment_id``, ``status``, ``user``, ``started_at``, ``ended_at``,
    ``artifact_uri``, and one for each ``params.<key>``, ``metrics.<key>`` (its last value) and ``tags.<key>``.

    Args:
        experiments: names; all experiments by default.
        filter: MLflow's search language, such as ``metrics.loss < 0.1 and params.model = 'tree'``.
        order_by: such as ``metrics.loss`` or ``["params.model", "metrics.loss DESC"]``.
        max_results: at most so many rows.
        as_arrow: an Arrow table instead of a pandas frame.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.

    Raises:
        InvalidInput: the filter or the order cannot be understood.
        NotFound: there is no such experiment.
    """
    client = client_for((url or default_url()).rstrip("/"))
    body = {
        "experiment_ids": _experiment_ids(client, experiments),
        "filter": filter,
        "order_by": [order_by] if isinstance(order_by, str) else list(order_by),
    }
    runs: list[RunRecord] = []
    if body["experiment_ids"]:
        found = every(
            lambda page: client.post(
                f"{API}/runs/search",
                body | {"max_results": min(PAGE, max_results - len(runs))} | page,
            ),
            "runs",
        )
        for run in found:
            runs.append(_record(run, client.url))
            if len(runs) >= max_results:
                break
    table = _table(runs)
    return table if as_arrow else table.to_pandas()


def _experiment_ids(client: Client, names: str | Sequence[str] | None) -> list[str]:
    if names is None:
        found = every(lambda page: client.get(f"{API}/experiments/search", max_results=PAGE, **page), "experiments")
        return [experiment["experiment_id"] for experiment in found]
    wanted = [names] if isinstance(names, str) else list(names)
    return [
        client.get(f"{API}/experiments/get-by-name", experiment_name=name)["experiment"]["experiment_id"]
        for name in wanted
    ]


def _record(run: dict[str, Any], url: str) -> RunRecord:
    info, data = run["info"], run.get("data", {})
    return RunRecord(
        run_id=info["run_id"],
        name=info["run_name"],
        experiment_id=int(info["experiment_id"]),
        status=info["status"],
        user=info.get("user_id", ""),
        started_ms=info["start_time"],
        ended_ms=info.get("end_time"),
        artifact_uri=info["artifact_uri"],
        params=pairs(data.get("params")),
        tags=pairs(data.get("tags")),
        metrics={entry["key"]: float(entry["value"]) for entry in data.get("metrics", ())},
        url=url,
    )


def _table(runs: Sequence[RunRecord]) -> pa.Table:
    columns = [
        [run.run_id for run in runs],
        [run.name for run in runs],
        [run.experiment_id for run in runs],
        [run.status for run in runs],
        [run.user for run in runs],
        [run.started_ms for run in runs],
        [run.ended_ms for run in runs],
        [run.artifact_uri for run in runs],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _INFO, strict=True)]
    names = list(_INFO.names)
    for kind, type_ in (("params", pa.string()), ("metrics", pa.float64()), ("tags", pa.string())):
        data: list[dict[str, Any]] = [getattr(run, kind) for run in runs]
        for key in sorted({key for entries in data for key in entries}):
            names.append(f"{kind}.{key}")
            arrays.append(pa.array([entries.get(key) for entries in data], type_))
    return pa.Table.from_arrays(arrays, names=names)
