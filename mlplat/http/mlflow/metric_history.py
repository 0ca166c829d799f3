"""MLflow's endpoints that read metric histories."""

from __future__ import annotations

from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import Answer, Endpoint, check_limit, require, wire_double
from mlplat.http.mlflow.runs import ById, run_id_of
from mlplat.http.services import Services
from mlplat.metrics import queries

MAX_HISTORY = 1_000_000


class History(ById):
    """metrics/get-history"""

    metric_key: str = ""
    max_results: int = MAX_HISTORY
    page_token: str | None = None


async def get_history(services: Services, request: History) -> Answer:
    """GET metrics/get-history"""
    run_id = run_id_of(request)
    key = require("metric_key", request.metric_key)
    limit = check_limit(request.max_results, MAX_HISTORY)
    await services.runs.get(run_id)
    table = await services.metrics.query(queries.history(run_id, key, limit + 1, _after(request.page_token)))
    rows = table.to_pylist()
    answer: Answer = {}
    if rows:
        answer["metrics"] = [
            {"key": key, "value": wire_double(row["value"]), "timestamp": row["timestamp"], "step": row["step"]}
            for row in rows[:limit]
        ]
    if len(rows) > limit:
        last = rows[limit - 1]
        answer["next_page_token"] = f"{last['timestamp']}:{last['step']}:{float(last['value']).hex()}"
    return answer


def _after(token: str | None) -> tuple[int, int, float] | None:
    if not token:
        return None
    try:
        timestamp, step, value = token.split(":")
        return int(timestamp), int(step), float.fromhex(value)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"Invalid page token: {token[:100]!r}") from error


ENDPOINTS = (Endpoint(("GET",), "metrics/get-history", History, get_history),)
