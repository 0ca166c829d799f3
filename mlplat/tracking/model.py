"""Experiments and runs as values, and the rules their parts obey (MLflow's, unless said otherwise)."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from mlplat.errors import InvalidInput
from mlplat.keys import check_key
from mlplat.tracking.inputs import NO_LINKS, RunLinks

DEFAULT_EXPERIMENT_ID = 0
DEFAULT_EXPERIMENT_NAME = "Default"
RUN_NAME_TAG = "mlflow.runName"
PARENT_RUN_TAG = "mlflow.parentRunId"
#: JSON list of the models that a run logged.
MODEL_HISTORY_TAG = "mlflow.log-model.history"
MAX_MODEL_HISTORY = 100
#: ``<pipeline run>/<step>/<item>/<attempt>`` of the attempt that started a run.
ATTEMPT_TAG = "mlplat.attempt"
#: Why the platform itself ended a run.
REAPED_TAG = "mlplat.reaped"
_RUN_ID_SPACE = uuid.UUID("6d6c706c-6174-4a72-8a75-6e2d69642d31")

MAX_PARAM_LENGTH = 6_000
MAX_TAG_LENGTH = 8_000
MAX_NAME_LENGTH = 500
MAX_BATCH_METRICS = 1_000
MAX_BATCH_PARAMS = 100
MAX_BATCH_TAGS = 100
MAX_BATCH_TOTAL = 1_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class RunStatus(StrEnum):
    """MLflow's run states."""

    SCHEDULED = "SCHEDULED"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


class ViewType(StrEnum):
    """Which of active and deleted entities a search returns."""

    ACTIVE_ONLY = "ACTIVE_ONLY"
    DELETED_ONLY = "DELETED_ONLY"
    ALL = "ALL"


@dataclass(frozen=True)
class Experiment:
    """An experiment with its tags."""

    experiment_id: int
    name: str
    artifact_location: str
    deleted: bool
    created_at: datetime
    updated_at: datetime
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run with its params, tags and links; metric values live in the metric store."""

    run_id: str
    experiment_id: int
    name: str
    status: RunStatus
    user_id: str
    artifact_uri: str
    deleted: bool
    started_at: datetime
    ended_at: datetime | None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    links: RunLinks = NO_LINKS


@dataclass(frozen=True)
class RunUpdate:
    """Params and tags to write to a run, keys checked and values cut."""

    run_id: str
    params: dict[str, str]
    tags: dict[str, str]


def from_ms(value: int) -> datetime:
    """The aware datetime of a wire time.

    Raises:
        InvalidInput: negative, or beyond year 9999.
    """
    try:
        if value < 0:
            raise OverflowError
        return _EPOCH + timedelta(milliseconds=value)
    except OverflowError as error:
        raise InvalidInput(f"Invalid time {value}: expected milliseconds since 1970") from error


def to_ms(value: datetime) -> int:
    """The wire time of an aware datetime."""
    return (value - _EPOCH) // timedelta(milliseconds=1)


def parse_experiment_id(value: str) -> int:
    """The number in an experiment id.

    Raises:
        InvalidInput: not a decimal number.
    """
    if not value.isascii() or not value.isdecimal() or len(value) > 18:
        raise InvalidInput(f"Invalid experiment ID: {value!r}. Experiment IDs are decimal numbers.")
    return int(value)


def cut_param(value: str) -> str:
    """A param's value as stored: MLflow cuts what is too long."""
    return value[:MAX_PARAM_LENGTH]


def cut_tag(value: str) -> str:
    """A tag's value as stored: MLflow cuts what is too long."""
    return value[:MAX_TAG_LENGTH]


def run_id_for(request: str) -> str:
    """The id of the run that a request creates: a repeated request finds the run it made.

    A client that chooses the request's key knows its run's id before the platform does.
    """
    return uuid.uuid5(_RUN_ID_SPACE, request).hex


def append_model(history: str | None, entry: Mapping[str, object]) -> str:
    """The value of the tag that lists a run's models after one more; of more than ``MAX_MODEL_HISTORY`` the newest.

    Raises:
        InvalidInput: ``history`` is no JSON list.
    """
    try:
        entries = json.loads(history or "[]")
    except ValueError:
        entries = None
    if not isinstance(entries, list):
        raise InvalidInput(
            f"The run's tag '{MODEL_HISTORY_TAG}' is not a JSON list; delete it and log the model again."
        )
    return json.dumps([*entries, entry][-MAX_MODEL_HISTORY:])


def check_name(kind: str, name: str) -> None:
    """Checks the name of an experiment.

    Raises:
        InvalidInput: empty or too long.
    """
    if not name.strip():
        raise InvalidInput(f"Invalid {kind} name: {name!r}. It may not be empty.")
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidInput(
            f"Invalid {kind} name: it has {len(name)} characters, at most {MAX_NAME_LENGTH} are allowed."
        )


def unique_params(params: list[tuple[str, str]]) -> dict[str, str]:
    """The params of one batch.

    Raises:
        InvalidInput: a key occurs twice (even with equal values), or a key is malformed.
    """
    seen: dict[str, str] = {}
    for key, value in params:
        check_key("param", key)
        if key in seen:
            raise InvalidInput(f"Duplicate parameter keys have been submitted: {key!r}.")
        seen[key] = cut_param(value)
    return seen


_ADJECTIVES = """
able amber bold brave bright calm clever cosmic crisp eager fair fleet fluent gentle glad golden
grand happy honest keen kind lively lucid lunar merry mighty noble patient polite proud quick quiet
rapid rare shy silent smart solar spirited stately steady swift tidy upbeat valiant vivid warm wise
witty zealous
""".split()  # noqa: SIM905
_NOUNS = """
ant badger bat bear bee bird boar bug calf carp cat chimp colt crab crane crow deer dove duck eel
elk ewe finch fish fly fox frog gnat goat goose hare hawk hen hound jay kit koi lamb lark loon lynx
mare mink mole moose moth mouse mule newt owl ox panda perch pig pug quail ram rat rook seal shad
shark sheep shrew shrike slug snail snake squid stag stork swan tern toad trout vole wasp whale wolf
worm wren yak
""".split()  # noqa: SIM905


def random_run_name() -> str:
    """A name for a run whose owner gave none, such as ``swift-wren-417``."""
    return f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}-{secrets.randbelow(1000)}"
