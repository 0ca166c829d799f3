"""Tables out of files, by their suffix."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
from pyarrow import fs as pafs

from mlplat.errors import InvalidInput, NotFound
from mlplat.sdk.capture.redact import strip_credentials

if TYPE_CHECKING:
    from ray.data import Dataset

_FORMATS = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json",
    ".feather": "feather", ".arrow": "feather", ".orc": "orc",
}  # fmt: skip


def read_table(location: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in a file, or in all files of a folder; JSON has one object per line.

    Raises:
        NotFound: no such file.
        InvalidInput: no table, files of several kinds, or a column that is not there.
    """
    filesystem, files, kind = _files(location)
    try:
        # It brings pandas along, which takes half a second that runs without such files need not spend.
        found = import_module("pyarrow.dataset").dataset(files, filesystem=filesystem, format=kind)
        table: pa.Table = found.to_table(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{strip_credentials(location)}: {str(error).splitlines()[0]}") from error
    return table


def read_ray(location: str, columns: Sequence[str] | None = None) -> Dataset:
    """As ``read_table``, read by Ray Data when somebody asks for rows.

    Raises:
        NotFound: no such file.
        InvalidInput: no table, files of several kinds, or of one that Ray Data does not read.
    """
    filesystem, files, kind = _files(location)
    data = import_module("ray.data")
    readers: dict[str, Any] = {"parquet": data.read_parquet, "csv": data.read_csv, "json": data.read_json}
    if kind not in readers:
        raise InvalidInput(f"{strip_credentials(location)}: Ray Data reads {', '.join(readers)}, not {kind}")
    try:
        found: Dataset = readers[kind](files, filesystem=pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)))
        return found if columns is None else found.select_columns(list(columns))
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{strip_credentials(location)}: {str(error).splitlines()[0]}") from error


def _files(location: str) -> tuple[Any, list[str], str]:
    """The filesystem, its files there, and what they all are."""
    shown = strip_credentials(location)
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
        files = sorted(filesystem.find(path))
    except (ImportError, ValueError) as error:
        raise InvalidInput(f"{shown}: {error}") from error
    if not files:
        raise NotFound(f"no such file or folder: {shown}")
    kinds = {_FORMATS.get(posixpath.splitext(name)[1].lower(), "") for name in files}
    if len(kinds) != 1 or "" in kinds:
        raise InvalidInput(f"{shown}: expected files of one kind of {', '.join(sorted(_FORMATS))}")
    return filesystem, files, kinds.pop()
