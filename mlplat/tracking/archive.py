"""The format of an exported experiment: which files there are, what is in them, what may not be.

A folder or an uncompressed tar with ``manifest.json`` (names, sizes and SHA-256 of all other files),
``experiment.json``, ``runs.parquet``, ``params.parquet``, ``tags.parquet``, ``metrics/00000.parquet`` …
and ``artifacts/<run id>/…``; since version 2 also the datasets that runs read, logged models with
``models/<model id>/…``, and the links between these and the runs. Params and tags come in the order of
the runs or models. Rules without I/O.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import msgspec
import pyarrow as pa

from mlplat.artifacts.model import safe_path
from mlplat.errors import InvalidInput

FORMAT = "mlplat-experiment"
VERSION = 2
MANIFEST = "manifest.json"
EXPERIMENT = "experiment.json"
RUNS = "runs.parquet"
PARAMS = "params.parquet"
TAGS = "tags.parquet"
DATASETS = "datasets.parquet"
INPUTS = "inputs.parquet"
RUN_MODELS = "run_models.parquet"
MODELS = "models.parquet"
MODEL_PARAMS = "model_params.parquet"
MODEL_TAGS = "model_tags.parquet"
MODEL_METRICS = "model_metrics.parquet"
ARTIFACTS = "artifacts/"
MODEL_ARTIFACTS = "models/"
MAX_MANIFEST_BYTES = 256 * 1024 * 1024
MAX_EXPERIMENT_BYTES = 64 * 1024 * 1024
#: A row group is in memory as a whole while it is read.
MAX_ROW_GROUP_BYTES = 1024 * 1024 * 1024

#: The tables that an archive has, by the version that brought them.
_TABLES = {
    1: (RUNS, PARAMS, TAGS),
    2: (DATASETS, INPUTS, RUN_MODELS, MODELS, MODEL_PARAMS, MODEL_TAGS, MODEL_METRICS),
}
_METRICS = re.compile(r"metrics/\d{5,9}\.parquet\Z", re.ASCII)
_ARTIFACT = re.compile(r"(artifacts|models)/[A-Za-z0-9_-]{1,64}/[^\0]+\Z", re.ASCII)
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


def _pairs_schema(owner: str) -> pa.Schema:
    return pa.schema([pa.field(name, _TEXT, nullable=False) for name in (owner, "key", "value")])


PAIRS_SCHEMA = _pairs_schema("run_id")
POINTS_SCHEMA = pa.schema(
    [
        pa.field("run_id", _TEXT, nullable=False),
        pa.field("key", _TEXT, nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("timestamp", pa.int64(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)
#: The datasets that runs read, each once. ``schema`` and ``profile`` are JSON.
DATASETS_SCHEMA = pa.schema(
    [
        *(pa.field(name, _TEXT, nullable=False) for name in ("name", "digest", "source_type", "source")),
        pa.field("schema", _TEXT),
        pa.field("profile", _TEXT),
    ]
)
#: Which run read which dataset, in the order in which that was logged.
INPUTS_SCHEMA = pa.schema(
    [
        *(pa.field(name, _TEXT, nullable=False) for name in ("run_id", "name", "digest")),
        pa.field("tags", pa.map_(_TEXT, _TEXT), nullable=False),
    ]
)
#: Which run read or made which logged model; ``direction`` is ``input`` or ``output``.
RUN_MODELS_SCHEMA = pa.schema(
    [
        *(pa.field(name, _TEXT, nullable=False) for name in ("run_id", "direction", "model_id")),
        pa.field("step", pa.int64(), nullable=False),
    ]
)
#: Times are ms since 1970. ``status`` is PENDING, READY or FAILED.
MODELS_SCHEMA = pa.schema(
    [
        *(pa.field(name, _TEXT, nullable=False) for name in ("model_id", "name", "status")),
        *(pa.field(name, _TEXT) for name in ("model_type", "source_run_id")),
        *(pa.field(name, pa.int64(), nullable=False) for name in ("created_at", "updated_at")),
        pa.field("deleted", pa.bool_(), nullable=False),
        pa.field("artifact_uri", _TEXT, nullable=False),
    ]
)
MODEL_PAIRS_SCHEMA = _pairs_schema("model_id")
#: Points of logged models: the run that measured them, and on which dataset.
MODEL_METRICS_SCHEMA = pa.schema(
    [pa.field("model_id", _TEXT, nullable=False), *POINTS_SCHEMA]
    + [pa.field(name, _TEXT) for name in ("dataset_name", "dataset_digest")]
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
    models: int = 0

    @property
    def metrics(self) -> list[str]:
        """The files with points, in order."""
        return sorted(name for name in self.files if _METRICS.match(name))

    @property
    def artifacts(self) -> list[tuple[str, str, str]]:
        """``(file, run id, path below the run's artifacts)`` of every artifact."""
        return self._below(ARTIFACTS)

    @property
    def model_artifacts(self) -> list[tuple[str, str, str]]:
        """``(file, model id, path below the model's artifacts)`` of every file of a logged model."""
        return self._below(MODEL_ARTIFACTS)

    def _below(self, root: str) -> list[tuple[str, str, str]]:
        parts = [(name, name.split("/", 2)) for name in sorted(self.files) if name.startswith(root)]
        return [(name, owner, path) for name, (_root, owner, path) in parts]


class ExperimentInfo(msgspec.Struct, frozen=True):
    """``experiment.json``. Times are ms since 1970."""

    experiment_id: str
    name: str
    created_at: int
    updated_at: int
    tags: dict[str, str] = {}


def artifact_name(run_id: str, path: str) -> str:
    """The file of an artifact of a run."""
    return f"{ARTIFACTS}{run_id}/{path}"


def model_artifact_name(model_id: str, path: str) -> str:
    """The file of an artifact of a logged model."""
    return f"{MODEL_ARTIFACTS}{model_id}/{path}"


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
    if not 1 <= manifest.version <= VERSION:
        raise InvalidInput(f"{MANIFEST}: version {manifest.version} is not known here; a newer mlplat wrote it")
    tables = {name for version, names in _TABLES.items() if version <= manifest.version for name in names}
    for name, entry in manifest.files.items():
        _check_entry(name, entry, tables)
    for name in sorted({EXPERIMENT} | tables):
        if name not in manifest.files:
            raise InvalidInput(f"{MANIFEST} does not list {name}")
    return manifest


def _check_entry(name: str, entry: FileEntry, tables: Collection[str]) -> None:
    if name != EXPERIMENT and name not in tables and not _METRICS.match(name) and not _is_artifact(name):
        raise InvalidInput(f"{MANIFEST}: a file may not have the name {name[:200]!r}")
    if not _SHA256.match(entry.sha256) or entry.bytes < 0:
        raise InvalidInput(f"{MANIFEST}: size or SHA-256 of {name[:200]!r} is malformed")


def _is_artifact(name: str) -> bool:
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
