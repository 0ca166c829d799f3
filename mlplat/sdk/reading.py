"""Tables out of files, by their suffix."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from importlib import import_module

import fsspec
import pyarrow as pa

from mlplat.errors import InvalidInput, NotFound
from mlplat.sdk.capture.redact import strip_credentials

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
    try:
        # It brings pandas along, which takes half a second that runs without such files need not spend.
        found = import_module("pyarrow.dataset").dataset(files, filesystem=filesystem, format=kinds.pop())
        table: pa.Table = found.to_table(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{shown}: {str(error).splitlines()[0]}") from error
    return table
