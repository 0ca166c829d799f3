"""The format of an exported experiment: which files there are, what is in them, what may not be.

A folder or an uncompressed tar with ``manifest.json`` (names, sizes and SHA-256 of all other files),
``experiment.json``, ``runs.parquet``, ``params.parquet``, ``tags.parquet``, ``metrics/00000.parquet`` …
and ``artifacts/<run id>/…``. Params and tags come in the order of the runs. Rules without I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
import pyarrow as pa

from mlplat.artifacts.model import safe_path
from mlplat.errors import InvalidInput

FORMAT = "mlplat-experiment"
VERSION = 1
MANIFEST = "manifest.json"
EXPERIMENT = "experiment.json"
RUNS = "runs.parquet"
PARAMS = "params.parquet"
TAGS = "tags.parquet"
ARTIFACTS = "artifacts/"
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
MAX_EXPERIMENT_BYTES = 64 * 1024 * 1024
#: A row group is in memory as a whole while it is read.
MAX_ROW_GROUP_BYTES = 1024 * 1024 * 1024

_METRICS = re.compile(r"metrics/\d{5,9}\.parquet\Z", re.ASCII)
_ARTIFACT = re.compile(r"artifacts/[A-Za-z0-9_-]{1,64}/[^\0]+\Z", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_TEXT = pa.string()

#: Times are ms since 1970. ``artifact_uri`` says where the artifacts were.
RUNS_SCHEMA = pa.schema(
    [
        pa.field("run_id", _TEXT, nullable=False),
        pa.field("name", _TEXT, nullable=False),
        pa.field("status", _TEXT, nullable=False),
        pa.field("user_id", _TEXT, nullable=False),
        pa.field("started_at", pa.int64(), nullable=False),
        pa.field("ended_at", pa.int64()),
        pa.field("deleted", pa.bool_(), nullable=False),
        pa.field("artifact_uri", _TEXT, nullable=False),
    ]
)
PAIRS_SCHEMA = pa.schema([pa.field(name, _TEXT, nullable=False) for name in ("run_id", "key", "value")])
POINTS_SCHEMA = pa.schema(
    [
        pa.field("run_id", _TEXT, nullable=False),
        pa.field("key", _TEXT, nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)


class FileEntry(msgspec.Struct, frozen=True):
    """A file as it must be."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """``manifest.json``."""

    format: str
    version: int
    runs: int
    points: int
    files: dict[str, FileEntry]

    @property
    def metrics(self) -> list[str]:
        """The files with points, in order."""
        return sorted(name for name in self.files if _METRICS.match(name))

    @property
    def artifacts(self) -> list[tuple[str, str, str]]:
        """``(file, run id, path below the run's artifacts)`` of every artifact."""
        names = sorted(name for name in self.files if name.startswith(ARTIFACTS))
        return [(name, *_split(name)) for name in names]


class ExperimentInfo(msgspec.Struct, frozen=True):
    """``experiment.json``. Times are ms since 1970."""

    experiment_id: str
    name: str
    created_at: int
    updated_at: int
    tags: dict[str, str] = {}


def _split(name: str) -> tuple[str, str]:
    run_id, _slash, path = name.removeprefix(ARTIFACTS).partition("/")
    return run_id, path


def artifact_name(run_id: str, path: str) -> str:
    """The file of an artifact."""
    return f"{ARTIFACTS}{run_id}/{path}"


def parse_manifest(body: bytes) -> Manifest:
    """The manifest, with all names in it checked.

    Raises:
        InvalidInput: not a manifest, of a later version, or a file has a name that it may not have.
    """
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{MANIFEST} is not the manifest of an exported experiment: {error}") from error
    if manifest.format != FORMAT:
        raise InvalidInput(f"{MANIFEST}: the format is {manifest.format[:100]!r}, expected {FORMAT!r}")
    if manifest.version != VERSION:
        raise InvalidInput(f"{MANIFEST}: version {manifest.version} is not known here; a newer mlplat wrote it")
    for name, entry in manifest.files.items():
        _check_entry(name, entry)
    for name in (EXPERIMENT, RUNS, PARAMS, TAGS):
        if name not in manifest.files:
            raise InvalidInput(f"{MANIFEST} does not list {name}")
    return manifest


def _check_entry(name: str, entry: FileEntry) -> None:
    if not _is_known(name):
        raise InvalidInput(f"{MANIFEST}: a file may not have the name {name[:200]!r}")
    if not _SHA256.match(entry.sha256) or entry.bytes < 0:
        raise InvalidInput(f"{MANIFEST}: size or SHA-256 of {name[:200]!r} is malformed")


def _is_known(name: str) -> bool:
    if name in {EXPERIMENT, RUNS, PARAMS, TAGS} or _METRICS.match(name):
        return True
    try:
        return bool(_ARTIFACT.match(name)) and safe_path(name) == name
    except InvalidInput:
        return False


def parse_experiment(body: bytes) -> ExperimentInfo:
    """The experiment.

    Raises:
        InvalidInput: malformed.
    """
    try:
        return msgspec.json.decode(body, type=ExperimentInfo)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{EXPERIMENT} is malformed: {error}") from error


def check_files(manifest: Manifest, found: Mapping[str, int]) -> None:
    """Checks that exactly the files of the manifest are there, by name and size.

    Raises:
        InvalidInput: one is missing, too many, or has another size.
    """
    for name in found.keys() - manifest.files.keys() - {MANIFEST}:
        raise InvalidInput(f"the archive has a file that its manifest does not list: {name[:200]!r}")
    for name, entry in manifest.files.items():
        if name not in found:
            raise InvalidInput(f"the archive lacks {name!r}")
        if found[name] != entry.bytes:
            raise InvalidInput(f"{name!r} has {found[name]} bytes, the manifest says {entry.bytes}")
