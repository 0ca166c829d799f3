"""Logged models as values, and the rules their parts obey (MLflow's, unless said otherwise)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from mlplat.errors import InvalidInput
from mlplat.keys import MAX_KEY_LENGTH
from mlplat.tracking.inputs import MAX_DATASET_DIGEST, MAX_DATASET_NAME
from mlplat.tracking.model import MAX_NAME_LENGTH

FORBIDDEN_IN_NAMES = "/:.%\"'"


class LoggedModelStatus(StrEnum):
    """How far the upload of a model's files is."""

    PENDING = "PENDING"
    READY = "READY"
    FAILED = "FAILED"


#: Their names in MLflow's REST API.
WIRE_STATUS = {
    LoggedModelStatus.PENDING: "LOGGED_MODEL_PENDING",
    LoggedModelStatus.READY: "LOGGED_MODEL_READY",
    LoggedModelStatus.FAILED: "LOGGED_MODEL_UPLOAD_FAILED",
}


@dataclass(frozen=True)
class ModelMetric:
    """A metric point of a logged model: the run that measured it, and on which dataset. ``timestamp`` is in ms."""

    model_id: str
    run_id: str
    key: str
    value: float
    timestamp: int
    step: int
    dataset_name: str | None = None
    dataset_digest: str | None = None

    @property
    def identity(self) -> bytes:
        """Equal for equal points, and for no others."""
        parts = (self.run_id, self.key, float(self.value).hex(), self.timestamp, self.step, self.dataset_name,
                 self.dataset_digest)  # fmt: skip
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class LoggedModel:
    """A logged model."""

    model_id: str
    experiment_id: int
    name: str
    artifact_location: str
    status: LoggedModelStatus
    model_type: str | None
    source_run_id: str | None
    deleted: bool
    created_at: datetime
    updated_at: datetime
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: tuple[ModelMetric, ...] = ()


@dataclass(frozen=True)
class NewModel:
    """What a caller says of a model that it is about to upload. Without a name it gets one."""

    experiment_id: int
    name: str | None = None
    model_type: str | None = None
    source_run_id: str | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def check_new(new: NewModel) -> None:
    """Checks what a caller says of a new model.

    Raises:
        InvalidInput: the name has a forbidden character, or a part is too long.
    """
    if new.name is not None and (not new.name or any(character in new.name for character in FORBIDDEN_IN_NAMES)):
        raise InvalidInput(
            f"Invalid model name ({new.name!r}) provided. Model name must be a non-empty string and cannot contain "
            f"the following characters: {' '.join(FORBIDDEN_IN_NAMES)}"
        )
    for what, text in (("name", new.name), ("model_type", new.model_type), ("source_run_id", new.source_run_id)):
        if text is not None and len(text) > MAX_NAME_LENGTH:
            raise InvalidInput(f"'{what}' exceeds the maximum length of {MAX_NAME_LENGTH} characters.")
    check_keys("param", new.params)
    check_keys("tag", new.tags)


def check_keys(kind: str, entries: Mapping[str, str]) -> None:
    """Checks the keys of a model's params or tags.

    Raises:
        InvalidInput: one is empty or too long.
    """
    for key in entries:
        if not key or len(key) > MAX_KEY_LENGTH:
            raise InvalidInput(f"Invalid {kind} name: {key[:300]!r}. Names have 1 to {MAX_KEY_LENGTH} characters.")


def check_metric_dataset(name: str | None, digest: str | None) -> None:
    """Checks the dataset that a metric names.

    Raises:
        InvalidInput: name or digest is too long.
    """
    for what, text, limit in (
        ("dataset_name", name, MAX_DATASET_NAME), ("dataset_digest", digest, MAX_DATASET_DIGEST),
    ):  # fmt: skip
        if text is not None and len(text) > limit:
            raise InvalidInput(f"'{what}' exceeds the maximum length of {limit} characters.")
