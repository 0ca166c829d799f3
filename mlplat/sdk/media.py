"""Rich values as bytes: tables, figures, images, documents.

What the user hands over is known by what it can do, so that no plotting or array library is needed here.
"""

from __future__ import annotations

import io
import json
import posixpath
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mlplat.artifacts.model import safe_path
from mlplat.errors import InvalidInput
from mlplat.tracking.model import MAX_TAG_LENGTH

LOGGED_ARTIFACTS_TAG = "mlflow.loggedArtifacts"
MAX_PIXELS = 200_000_000
_PNG_COLOURS = {1: 0, 3: 2, 4: 6}


def table_path(name: str, step: int | None) -> str:
    """Where a table lies among the run's artifacts; steps sort by name.

    Raises:
        InvalidInput: not a name for a folder, or a negative step.
    """
    if not name.strip() or safe_path(name) != name:
        raise InvalidInput(f"not a table's name: {name!r}")
    if step is not None and step < 0:
        raise InvalidInput(f"a table's step may not be negative: {step}")
    return f"tables/{name}/{'table' if step is None else f'{step:012d}'}.parquet"


def logged_tables(paths: Mapping[str, str]) -> str:
    """The value of MLflow's tag that lists tables, the newest of each name; the first ones that fit."""
    entries: list[dict[str, str]] = []
    for path in paths.values():
        longer = [*entries, {"path": path, "type": "table"}]
        if len(json.dumps(longer)) > MAX_TAG_LENGTH:
            break
        entries = longer
    return json.dumps(entries)


def as_table(data: Any) -> pa.Table:
    """Tabular data as Arrow.

    Raises:
        InvalidInput: it is none, or a column has values of several types.
    """
    try:
        if isinstance(data, pa.Table):
            return data
        if isinstance(data, pa.RecordBatch):
            return pa.Table.from_batches([data])
        if type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns"):
            return pa.Table.from_pandas(data)
        if hasattr(data, "__arrow_c_stream__"):  # polars and others
            return pa.table(data)
        if isinstance(data, Mapping):
            return pa.table({str(key): column for key, column in data.items()})
        if isinstance(data, list | tuple) and all(isinstance(row, Mapping) for row in data):
            names = dict.fromkeys(key for row in data for key in row)  # a row may lack some
            return pa.table({str(name): [row.get(name) for row in data] for name in names})
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InvalidInput(f"this is not a table: {error}") from error
    raise InvalidInput(
        f"a {type(data).__name__} is not a table; give a DataFrame, Arrow table, list of dicts or dict of columns"
    )


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file.

    Raises:
        InvalidInput: it has a column that Parquet cannot hold.
    """
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, compression="zstd")
    except pa.ArrowException as error:
        raise InvalidInput(f"this table cannot be written as Parquet: {error}") from error
    return sink.getvalue()


def document_bytes(value: Any, path: str) -> bytes:
    """JSON, or YAML by the path's ending.

    Raises:
        InvalidInput: it holds something that the format cannot.
    """
    try:
        if _ending(path) in {"yaml", "yml"}:
            text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
        else:
            text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidInput(f"{path}: {str(error).splitlines()[0]}") from error
    return text.encode()


def figure_bytes(figure: Any, path: str) -> bytes:
    """A matplotlib or plotly figure in the format of the path's ending.

    Raises:
        InvalidInput: no such figure, or a format that it cannot be written in.
    """
    ending = _ending(path)
    try:
        if hasattr(figure, "savefig"):
            sink = io.BytesIO()
            figure.savefig(sink, format=ending)
            return sink.getvalue()
        if hasattr(figure, "to_html") and hasattr(figure, "to_json"):
            if ending == "html":
                return str(figure.to_html(include_plotlyjs="cdn")).encode()
            return str(figure.to_json()).encode() if ending == "json" else bytes(figure.to_image(format=ending))
    except Exception as error:  # each library has its own
        raise InvalidInput(f"the figure cannot be written to {path}: {error}") from error
    raise InvalidInput(f"a {type(figure).__name__} is not a figure of matplotlib or plotly")


def image_bytes(image: Any, path: str) -> bytes:
    """A PIL image in the format of the path's ending, or an array as PNG.

    Raises:
        InvalidInput: no such image, or a format that it cannot be written in.
    """
    ending = _ending(path)
    if hasattr(image, "save") and hasattr(image, "mode"):
        sink = io.BytesIO()
        try:
            image.save(sink, format={"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()))
        except (KeyError, OSError, ValueError) as error:
            raise InvalidInput(f"the image cannot be written to {path}: {error}") from error
        return sink.getvalue()
    if not (hasattr(image, "dtype") and hasattr(image, "shape")):
        raise InvalidInput(f"a {type(image).__name__} is not an image; give one of PIL, or an array")
    if ending != "png":
        raise InvalidInput(f"{path}: arrays are written as .png; make it an image of PIL for other formats")
    return _png(image)


def _png(array: Any) -> bytes:
    """An array as PNG; torch tensors pass through their own ``numpy``."""
    if hasattr(array, "detach"):
        array = array.detach().cpu().numpy()
    shape, kind = tuple(int(size) for size in array.shape), str(array.dtype)
    channels = shape[2] if len(shape) == 3 else 1
    if len(shape) not in {2, 3} or channels not in _PNG_COLOURS or 0 in shape or shape[0] * shape[1] > MAX_PIXELS:
        raise InvalidInput(
            f"not the shape of an image: {shape}; expected (height, width) or (height, width, 1 | 3 | 4)"
        )
    if kind.startswith("float"):
        if not (array.min() >= 0 and array.max() <= 1):
            raise InvalidInput("an image of floats has values from 0 to 1; scale them, or make them uint8")
        array = (array * 255).round()
    elif kind == "bool":
        array = array * 255
    elif kind != "uint8":
        raise InvalidInput(f"an image has uint8, float or bool values, not {kind}")
    body, width = array.astype("uint8").tobytes(), shape[1] * channels
    rows = b"".join(b"\0" + body[start : start + width] for start in range(0, len(body), width))
    header = struct.pack(">IIBBBBB", shape[1], shape[0], 8, _PNG_COLOURS[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _ending(path: str) -> str:
    ending = posixpath.splitext(path)[1].lower().removeprefix(".")
    if not ending:
        raise InvalidInput(f"{path!r}: the file's ending says how it is written, such as .png or .json")
    return ending


def _plain(value: Any) -> Any:
    """Scalars and arrays of numpy and torch, dates, paths and sets, as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "__fspath__"):
        return value.__fspath__()
    raise TypeError(f"a {type(value).__name__} is not JSON")
