"""Reading what a run's process wrote down about itself: files in its artifacts, and tags."""

from __future__ import annotations

import msgspec

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import NotFound
from mlplat.tracking.comparison import Code, JsonValue, RunFacts, flatten, packages
from mlplat.tracking.model import Run

ENVIRONMENT_FILE = "mlplat/environment.json"
REQUIREMENTS_FILE = "mlplat/requirements.txt"
CODE_DIFF_FILE = "mlplat/code.diff"
COMMIT_TAG = "mlflow.source.git.commit"
DIRTY_TAG = "mlflow.source.git.dirty"
SOURCE_TAG = "mlflow.source.name"
MAX_FILE_BYTES = 1024 * 1024
#: Facts that MLflow's client sends as tags, by the name they have here.
_TAGS = {"git.commit": COMMIT_TAG, "source": SOURCE_TAG, "user": "mlflow.user"}


def read_facts(store: ArtifactStore, run: Run, root: str | None) -> RunFacts:
    """The facts of a run; what is not there, too large or malformed is left out. Blocks.

    Args:
        root: the folder of the run's artifacts in the store, None when they are elsewhere.
    """
    facts = {name: run.tags[tag] for name, tag in _TAGS.items() if tag in run.tags}
    commit = run.tags.get(COMMIT_TAG)
    if root is None:
        return RunFacts(facts, Code(commit))
    environment = flatten(_decode(read_small(store, f"{root}/{ENVIRONMENT_FILE}")))
    changes = read_small(store, f"{root}/{CODE_DIFF_FILE}")
    if changes is None and run.tags.get(DIRTY_TAG) == "false":
        changes = b""
    if not any(key.startswith("packages.") for key in environment):
        environment |= packages((read_small(store, f"{root}/{REQUIREMENTS_FILE}") or b"").decode(errors="replace"))
    too_many = changes is not None and len(changes) > MAX_FILE_BYTES
    text = None if changes is None or too_many else changes.decode(errors="replace")
    return RunFacts(facts | environment, Code(commit, text, too_many))


def read_small(store: ArtifactStore, path: str) -> bytes | None:
    """A file's bytes, cut just behind ``MAX_FILE_BYTES``; None when there is no such file. Blocks."""
    try:
        return b"".join(store.read(path, 0, MAX_FILE_BYTES + 1))
    except NotFound:
        return None


def _decode(body: bytes | None) -> JsonValue:
    try:
        document: JsonValue = None if body is None else msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return document
