"""Datasets that a run uses, as MLflow's dataset inputs: name, digest, source, schema, size."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from mlplat.errors import InvalidInput, NotFound
from mlplat.sdk import digests
from mlplat.sdk.capture.entry import entry_point
from mlplat.sdk.capture.redact import strip_credentials
from mlplat.sdk.media import as_table

CONTEXT_TAG = "mlflow.data.context"
FEATURE_VIEW_TAG = "mlplat.featureView."
MAX_FEATURE_VIEW = 200
MAX_NAME = 500
MAX_CONTEXT = 500
MAX_SCHEMA = 1_000_000
#: Rows of a Ray Dataset that its digest looks at.
RAY_ROWS = 10_000
_TYPES = {
    "bool": "boolean", "int8": "integer", "int16": "integer", "int32": "integer", "int64": "long", "uint8": "integer",
    "uint16": "integer", "uint32": "long", "halffloat": "float", "float": "float", "double": "double",
    "string": "string", "large_string": "string", "string_view": "string", "binary": "binary", "large_binary": "binary",
}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """A dataset in MLflow's terms; ``source``, ``schema`` and ``profile`` are JSON."""

    name: str
    digest: str
    source_type: str
    source: str
    schema: str | None
    profile: str


@dataclass(frozen=True)
class _Facts:
    digest: str
    schema: dict[str, Any] | None
    profile: dict[str, Any]


def describe(data: Any, name: str | None = None, source: str | None = None) -> Dataset:
    """The dataset that ``data`` is.

    Raises:
        InvalidInput: no such data, or a name that is empty or too long.
        NotFound: no such file.
    """
    location = str(data) if isinstance(data, str | Path) else None
    facts = _facts(data)
    name = name if name is not None else Path(location).stem if location else "dataset"
    if not name or len(name) > MAX_NAME:
        raise InvalidInput(f"a dataset's name has 1 to {MAX_NAME} characters, this has {len(name)}")
    source_type, source_fields = _source(source or location)
    schema = None if facts.schema is None else json.dumps(facts.schema)
    if schema is not None and len(schema) > MAX_SCHEMA:
        schema = None
    return Dataset(name, facts.digest, source_type, json.dumps(source_fields), schema, json.dumps(facts.profile))


def log_inputs_request(
    run_id: str, dataset: Dataset, context: str, feature_views: Sequence[str] = ()
) -> dict[str, Any]:
    """The body of ``runs/log-inputs``.

    Raises:
        InvalidInput: the context is too long, or the name of a feature view is, or is empty.
    """
    for view in feature_views:
        if not 1 <= len(view) <= MAX_FEATURE_VIEW:
            raise InvalidInput(f"a feature view's name has 1 to {MAX_FEATURE_VIEW} characters, this has {len(view)}")
    if len(context) > MAX_CONTEXT:
        raise InvalidInput(f"a dataset's context has at most {MAX_CONTEXT} characters, this has {len(context)}")
    fields = {key: value for key, value in vars(dataset).items() if value is not None}
    tags = [{"key": CONTEXT_TAG, "value": context}] if context else []
    tags += [{"key": FEATURE_VIEW_TAG + view, "value": ""} for view in dict.fromkeys(feature_views)]
    return {"run_id": run_id, "datasets": [{"tags": tags, "dataset": fields}]}


def _facts(data: Any) -> _Facts:
    if isinstance(data, str | Path):
        return _of_files(str(data))
    if _is_array(data):
        return _of_arrays({"features": data})
    if isinstance(data, Mapping) and data and all(_is_array(value) for value in data.values()):
        return _of_arrays({str(key): value for key, value in data.items()})
    if type(data).__module__.startswith("ray.data"):
        return _of_ray(data)
    table = as_table(data)
    return _Facts(digests.table_digest(table), _columns(table.schema), _size(table.num_rows, table.num_columns))


def _of_arrays(arrays: Mapping[str, Any]) -> _Facts:
    found = {name: digests.array_digest(array) for name, array in arrays.items()}
    first = next(iter(arrays.values()))
    rows = int(first.shape[0]) if first.shape else 1
    profile = {"num_rows": rows, "num_elements": sum(int(array.size) for array in arrays.values())}
    tensors = {
        "features": json.dumps([_tensor(name, array) for name, array in arrays.items() if name != "targets"]),
        "targets": json.dumps([_tensor("targets", arrays["targets"])]) if "targets" in arrays else None,
    }
    return _Facts(digests.combined(found), {"mlflow_tensorspec": tensors}, profile)


def _tensor(name: str, array: Any) -> dict[str, Any]:
    shape = [-1, *(int(size) for size in array.shape[1:])]
    return {"name": name, "type": "tensor", "tensor-spec": {"dtype": str(array.dtype), "shape": shape}}


def _of_files(location: str) -> _Facts:
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
        found = filesystem.find(path, detail=True)
    except (ImportError, ValueError) as error:
        raise InvalidInput(f"{strip_credentials(location)}: {error}") from error
    if not found:
        raise NotFound(f"no such file or folder: {strip_credentials(location)}")
    files = {name: int(entry["size"]) for name, entry in found.items()}
    digest = digests.files_digest(filesystem, files)
    profile: dict[str, Any] = {"num_files": len(files), "size_bytes": sum(files.values())}
    tables = [name for name in sorted(files) if posixpath.splitext(name)[1] in {".parquet", ".pq"}]
    if len(tables) != len(files):
        return _Facts(digest, None, profile)
    try:
        footers = [_footer(filesystem, name) for name in tables]
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{strip_credentials(location)}: not Parquet: {error}") from error
    profile |= {"num_rows": sum(footer.num_rows for footer in footers)}
    return _Facts(digest, _columns(footers[0].schema.to_arrow_schema()), profile)


def _footer(filesystem: Any, path: str) -> Any:
    with filesystem.open(path, "rb") as file:
        return pq.read_metadata(file)


def _of_ray(dataset: Any) -> _Facts:
    """A Ray Dataset is not run for this, except for its first rows.

    The digest covers the schema and either the input files' names, or, of data that came from memory, the
    first rows in any order. The number of rows is known of materialized data only.
    """
    files = sorted(dataset.input_files())
    sample = dataset.take_batch(RAY_ROWS, batch_format="pyarrow") if not files else None
    schema = dataset.schema().base_schema if sample is None else sample.schema
    parts = {"schema": schema.remove_metadata().to_string()} | {f"file {name}": "" for name in files}
    if sample is not None:
        ordered = sample.sort_by([(name, "ascending") for name in sample.column_names if _sortable(sample, name)])
        parts["rows"] = digests.table_digest(ordered)
    materialized = type(dataset).__name__ == "MaterializedDataset"
    profile = _size(int(dataset.count()), len(schema.names)) if materialized else {}
    return _Facts(digests.combined(parts), _columns(schema) if isinstance(schema, pa.Schema) else None, profile)


def _sortable(table: pa.Table, name: str) -> bool:
    return not pa.types.is_nested(table.schema.field(name).type)


def _columns(schema: pa.Schema) -> dict[str, Any]:
    """MLflow's column schema; types it has no word for go by Arrow's."""
    columns = [{"name": field.name, "type": _type_name(field.type), "required": not field.nullable} for field in schema]
    return {"mlflow_colspec": columns}


def _type_name(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _type_name(kind.value_type)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return "datetime"
    return _TYPES.get(str(kind), str(kind))


def _size(rows: int, columns: int) -> dict[str, int]:
    return {"num_rows": rows, "num_elements": rows * columns}


def _source(location: str | None) -> tuple[str, dict[str, Any]]:
    """MLflow's source type and its fields. Without a location the data was made by code."""
    if location is None:
        return "code", {"tags": entry_point().tags()}
    scheme, separator, _rest = location.partition("://")
    if not separator:
        return "local", {"uri": str(Path(location).absolute())}
    url = strip_credentials(location)
    return ("http", {"url": url}) if scheme in {"http", "https"} else (scheme, {"uri": url})


def _is_array(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("dtype", "shape", "tobytes", "astype"))
