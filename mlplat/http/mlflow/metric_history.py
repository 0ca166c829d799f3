"""MLflow's endpoints that read metric histories."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec
import pyarrow as pa
from starlette.responses import Response, StreamingResponse

from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import Answer, Endpoint, check_limit, require
from mlplat.http.mlflow.runs import ById, run_id_of
from mlplat.http.services import Services
from mlplat.http.streams import in_pieces, wire_doubles
from mlplat.metrics import queries

MAX_HISTORY = 1_000_000
MAX_RUNS = 100
#: Points of one run that get-history-bulk-interval answers, and of all runs that get-history-bulk does.
MAX_SAMPLED = 2_500
MAX_BULK = 25_000
#: A long history is read and sent in pages of so many points.
PAGE = 100_000
#: Points that are turned into JSON at a time.
BATCH = 5_000


#: A point's ``(timestamp, step, value)``.
Position = tuple[int, int, float]


class History(ById):
    """metrics/get-history"""

    metric_key: str = ""
    max_results: int | None = None
    page_token: str | None = None


class Bulk(msgspec.Struct):
    """metrics/get-history-bulk"""

    run_id: list[str] = []
    metric_key: str = ""
    max_results: int = MAX_BULK


class BulkInterval(msgspec.Struct):
    """metrics/get-history-bulk-interval"""

    run_ids: list[str] = []
    metric_key: str = ""
    start_step: int | None = None
    end_step: int | None = None
    max_results: int = MAX_SAMPLED


async def get_history(services: Services, request: History) -> Answer | Response:
    """GET metrics/get-history: without ``max_results`` the whole history, however long, in bounded memory."""
    run_id = run_id_of(request)
    key = require("metric_key", request.metric_key)
    limit = None if request.max_results is None else check_limit(request.max_results, MAX_HISTORY)
    after = _after(request.page_token)
    await services.runs.origins([run_id])
    # One more than asked for shows whether there is a next page.
    pages = _pages(services, run_id, key, None if limit is None else limit + 1, after)
    first = await anext(pages, None)
    if first is None:
        return {}
    return StreamingResponse(in_pieces(_history(key, limit, first, pages)), media_type="application/json")


async def _pages(
    services: Services, run_id: str, key: str, limit: int | None, after: Position | None
) -> AsyncIterator[pa.Table]:
    """The history in tables of at most ``PAGE`` rows, none of them empty."""
    left = limit
    while left is None or left > 0:
        asked = PAGE if left is None else min(PAGE, left)
        page = await services.metrics.query(queries.history(run_id, key, asked, after))
        if page.num_rows:
            yield page
        if page.num_rows < asked:
            return
        after = _position(page, page.num_rows - 1)
        left = None if left is None else left - page.num_rows


async def _history(key: str, limit: int | None, first: pa.Table, rest: AsyncIterator[pa.Table]) -> AsyncIterator[bytes]:
    """The answer's JSON, with a token for the next page when there is more than ``limit``."""
    yield b'{"metrics":['
    sent, token = 0, b""
    page: pa.Table | None = first
    while page is not None:
        shown = page if limit is None else page.slice(0, limit - sent)
        for batch in shown.to_batches(BATCH):
            yield (b"," if sent else b"") + msgspec.json.encode(_points(batch, key))[1:-1]
            sent += batch.num_rows
        if shown.num_rows:
            last = _position(shown, shown.num_rows - 1)
        if shown.num_rows < page.num_rows:
            token = b',"next_page_token":' + msgspec.json.encode(_token(last))
        page = await anext(rest, None)
    yield b"]" + token + b"}"


async def get_history_bulk(services: Services, request: Bulk) -> Answer:
    """GET metrics/get-history-bulk: histories of several runs one after the other. Unknown runs have none."""
    run_ids = _run_ids("GetMetricHistoryBulk", "run_id", request.run_id)
    key = require("metric_key", request.metric_key)
    if request.max_results < 0:
        raise InvalidInput(f"Invalid value {request.max_results} for parameter 'max_results' supplied.")
    table = await services.metrics.query(queries.histories(run_ids, key, min(request.max_results, MAX_BULK)))
    return {"metrics": _points(table, key)}


async def get_history_bulk_interval(services: Services, request: BulkInterval) -> Answer:
    """GET metrics/get-history-bulk-interval: evenly picked points of each run, its first and last among them."""
    run_ids = _run_ids("GetMetricHistoryBulkInterval", "run_ids", request.run_ids)
    key = require("metric_key", request.metric_key)
    if not 1 <= request.max_results <= MAX_SAMPLED:
        raise InvalidInput(f"max_results must be between 1 and {MAX_SAMPLED}.")
    steps = _steps(request.start_step, request.end_step)
    await services.runs.origins(run_ids)
    table = await services.metrics.query(queries.sampled_histories(run_ids, key, request.max_results, steps))
    return {"metrics": _points(table, key)} if table.num_rows else {}


def _run_ids(request: str, name: str, run_ids: Sequence[str]) -> list[str]:
    unique = list(dict.fromkeys(run_ids))
    if not unique:
        raise InvalidInput(f"{request} request must specify at least one run_id: '{name}' is missing.")
    if len(run_ids) > MAX_RUNS:
        raise InvalidInput(f"{request} request cannot specify more than {MAX_RUNS} run_ids. Received {len(run_ids)}.")
    return unique


def _steps(start: int | None, end: int | None) -> tuple[int, int] | None:
    if start is None and end is None:
        return None
    if start is None or end is None:
        raise InvalidInput("If either start step or end step are specified, both must be specified.")
    if start > end:
        raise InvalidInput(f"end_step must be greater than start_step. Found start_step={start} and end_step={end}.")
    for step in (start, end):
        if not -(2**63) <= step < 2**63:
            raise InvalidInput(f"Invalid value {step} for a step: out of range.")
    return start, end


def _points(rows: pa.Table | pa.RecordBatch, key: str) -> list[dict[str, object]]:
    """Points as MLflow writes them, with their run where the rows have one."""
    steps, timestamps = (rows[name].to_pylist() for name in ("step", "timestamp"))
    values = wire_doubles(rows["value"])
    points: list[dict[str, object]] = [
        {"key": key, "value": value, "timestamp": timestamp, "step": step}
        for value, timestamp, step in zip(values, timestamps, steps, strict=True)
    ]
    if "run_id" in rows.schema.names:
        for point, run_id in zip(points, rows["run_id"].to_pylist(), strict=True):
            point["run_id"] = run_id
    return points


def _position(rows: pa.Table, row: int) -> Position:
    return tuple(rows[name][row].as_py() for name in ("timestamp", "step", "value"))


def _token(position: Position) -> str:
    timestamp, step, value = position
    return f"{timestamp}:{step}:{value.hex()}"


def _after(token: str | None) -> Position | None:
    if not token:
        return None
    try:
        timestamp, step, value = token.split(":")
        return int(timestamp), int(step), float.fromhex(value)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"Invalid page token: {token[:100]!r}") from error


ENDPOINTS = (
    Endpoint(("GET",), "metrics/get-history", History, get_history),
    Endpoint(("GET",), "metrics/get-history-bulk", Bulk, get_history_bulk),
    Endpoint(("GET",), "metrics/get-history-bulk-interval", BulkInterval, get_history_bulk_interval),
)
