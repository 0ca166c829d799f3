"""/api/v1/metrics/curves: many curves in one answer, as JSON or as an Arrow stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, StringConstraints
from starlette.responses import Response, StreamingResponse

from mlplat.http.services import Services
from mlplat.http.streams import in_pieces, wire_doubles
from mlplat.keys import MAX_KEY_LENGTH
from mlplat.metrics.curves import Curve, CurveRequest, Curves, read_curves
from mlplat.metrics.downsample import Axis
from mlplat.metrics.model import ARROW, encode

MAX_RUNS = 100
MAX_KEYS = 100
MAX_BUCKETS = 10_000
INT64 = 2**63

RunId = Annotated[str, StringConstraints(min_length=1, max_length=250, pattern=r"^[^\x00]*$")]
Key = Annotated[str, StringConstraints(min_length=1, max_length=MAX_KEY_LENGTH, pattern=r"^[^\x00]*$")]
#: JSON has no such numbers.
Double = float | Literal["NaN", "Infinity", "-Infinity"]


class CurvesRequest(BaseModel):
    """Which series, over what, and how fine."""

    run_ids: list[RunId] = Field(min_length=1, max_length=MAX_RUNS)
    keys: list[Key] = Field(
        min_length=1,
        max_length=MAX_KEYS,
        description="Metric keys. `*` stands for anything, `?` for one character: `train/*`.",
    )
    axis: Axis = Field(default=Axis.STEP, description="`relative` is the time since the run's start. Times are in ms.")
    start: int | None = Field(default=None, ge=-INT64, lt=INT64, description="First place on the axis, included.")
    end: int | None = Field(default=None, ge=-INT64, lt=INT64, description="Last place on the axis, included.")
    buckets: int = Field(
        default=1000,
        ge=2,
        le=MAX_BUCKETS,
        description="A series with at most so many points in the range is answered whole. Of any other, each bucket "
        "gives its first, last, lowest and highest point, and NaN and infinite ones beside them.",
    )


class CurveAnswer(BaseModel):
    """One series in the order of the axis. The lists have one length."""

    run_id: str
    key: str
    origin: int = Field(description="The run's start in ms since the epoch: the relative axis is timestamp - origin.")
    exact: bool = Field(description="These are all of the series' points in the range.")
    steps: list[int]
    timestamps: list[int]
    values: list[Double]


class CurvesAnswer(BaseModel):
    """Series without a point in the range are left out. The edges of the buckets are start + n * width."""

    axis: Axis
    bucket_start: int | None
    bucket_width: int | None
    curves: list[CurveAnswer]


def router(services: Services) -> APIRouter:
    """Reading curves."""
    api = APIRouter(tags=["runs"])

    @api.post(
        "/api/v1/metrics/curves",
        response_model=CurvesAnswer,
        responses={200: {"content": {ARROW: {}}, "description": "JSON, or Arrow where the client accepts that."}},
    )
    async def read(wanted: CurvesRequest, request: Request) -> Response:
        """The curves of up to 100 runs and several metrics. No spike is lost: points are picked, never averaged.

        With `Accept: application/vnd.apache.arrow.stream`, an Arrow IPC stream with a row per point: run_id, key,
        step, timestamp, value, exact; the rest is in the metadata of its schema."""
        runs = await services.runs.origins(list(dict.fromkeys(wanted.run_ids)))
        found = await read_curves(
            services.metrics.query,
            CurveRequest(runs, list(dict.fromkeys(wanted.keys)), wanted.axis, wanted.start, wanted.end,
                           wanted.buckets),
        )  # fmt: skip
        if ARROW in request.headers.get("accept", ""):
            return Response(await asyncio.to_thread(_arrow, found), media_type=ARROW)
        return StreamingResponse(in_pieces(_json(found)), media_type="application/json")

    return api


async def _json(found: Curves) -> AsyncIterator[bytes]:
    head = msgspec.json.encode(_head(found))
    yield head[:-1] + b',"curves":['
    for number, curve in enumerate(found.curves):
        yield (b"," if number else b"") + _curve(curve)
    yield b"]}"


def _head(found: Curves) -> dict[str, object]:
    buckets = found.buckets
    return {
        "axis": found.axis,
        "bucket_start": None if buckets is None else buckets.start,
        "bucket_width": None if buckets is None else buckets.width,
    }


def _curve(curve: Curve) -> bytes:
    return msgspec.json.encode(
        {
            "run_id": curve.run_id,
            "key": curve.key,
            "origin": curve.origin_ms,
            "exact": curve.exact,
            "steps": curve.steps.to_numpy().tolist(),
            "timestamps": curve.timestamps.to_numpy().tolist(),
            "values": wire_doubles(curve.values),
        }
    )


def _arrow(found: Curves) -> bytes:
    lengths = pa.array([len(curve.steps) for curve in found.curves], pa.int64())
    columns = {
        "run_id": _repeated(pa.array([curve.run_id for curve in found.curves], pa.string()), lengths),
        "key": _repeated(pa.array([curve.key for curve in found.curves], pa.string()), lengths),
        "step": pa.chunked_array([curve.steps for curve in found.curves], pa.int64()),
        "timestamp": pa.chunked_array([curve.timestamps for curve in found.curves], pa.int64()),
        "value": pa.chunked_array([curve.values for curve in found.curves], pa.float64()),
        "exact": _repeated(pa.array([curve.exact for curve in found.curves], pa.bool_()), lengths),
    }
    origins = {curve.run_id: curve.origin_ms for curve in found.curves}
    metadata = {"curves": msgspec.json.encode(_head(found) | {"origins": origins})}
    return encode(pa.table(columns).replace_schema_metadata(metadata).combine_chunks())


def _repeated(values: pa.Array, lengths: pa.Array) -> pa.Array:
    """Each value as often as its curve has points; text as a dictionary, which keeps it once."""
    places = pc.list_parent_indices(pa.ListArray.from_arrays(_offsets(lengths), pa.nulls(pc.sum(lengths).as_py() or 0)))
    if pa.types.is_string(values.type):
        return pa.DictionaryArray.from_arrays(places.cast(pa.int32()), values)
    return values.take(places)


def _offsets(lengths: pa.Array) -> pa.Array:
    return pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(lengths)]).cast(pa.int32())
