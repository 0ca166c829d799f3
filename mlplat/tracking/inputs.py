"""What goes into a run and comes out of it, as values: datasets and logged models. The limits are MLflow's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlplat.errors import InvalidInput

#: The input tag that says what a dataset was used for, such as ``train``.
DATASET_CONTEXT_TAG = "mlflow.data.context"
#: With the name of a view of a feature store behind it: an input tag that says the dataset was read through that view.
FEATURE_VIEW_TAG = "mlplat.featureView."

#: The directions of a link between a run and a logged model.
INPUT = "input"
OUTPUT = "output"

MAX_INPUTS = 1_000
MAX_DATASET_NAME = 500
MAX_DATASET_DIGEST = 36
MAX_DATASET_SOURCE = 65_535
MAX_DATASET_SCHEMA = 1_048_575
MAX_DATASET_PROFILE = 16_777_215
MAX_INPUT_TAG_KEY = 255
MAX_INPUT_TAG_VALUE = 500


@dataclass(frozen=True)
class Dataset:
    """A dataset of an experiment, identified by name and digest. ``schema`` and ``profile`` are JSON texts."""

    name: str
    digest: str
    source_type: str
    source: str
    schema: str | None = None
    profile: str | None = None


@dataclass(frozen=True)
class DatasetInput:
    """A dataset that a run read, with the tags of that use."""

    dataset: Dataset
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def feature_views(self) -> list[str]:
        """The feature views that the dataset was read through, by name."""
        names = (key.removeprefix(FEATURE_VIEW_TAG) for key in self.tags if key.startswith(FEATURE_VIEW_TAG))
        return sorted(filter(None, names))


@dataclass(frozen=True)
class ModelOutput:
    """A logged model that a run made, and the step at which it did."""

    model_id: str
    step: int


@dataclass(frozen=True)
class RunLinks:
    """Everything that goes into a run and comes out of it, in the order in which it was logged."""

    datasets: tuple[DatasetInput, ...] = ()
    model_inputs: tuple[str, ...] = ()
    model_outputs: tuple[ModelOutput, ...] = ()


NO_LINKS = RunLinks()


def unique_inputs(inputs: Sequence[DatasetInput]) -> list[DatasetInput]:
    """The inputs of one request; of several with the same name and digest, the first.

    Raises:
        InvalidInput: too many, or a part is missing or too long.
    """
    check_count("datasets", len(inputs))
    unique: dict[tuple[str, str], DatasetInput] = {}
    for one in inputs:
        check_dataset(one.dataset)
        check_input_tags(one.tags)
        unique.setdefault((one.dataset.name, one.dataset.digest), one)
    return list(unique.values())


def check_count(what: str, count: int) -> None:
    """Checks how many inputs or outputs one request has.

    Raises:
        InvalidInput: more than ``MAX_INPUTS``.
    """
    if count > MAX_INPUTS:
        raise InvalidInput(f"A request can contain at most {MAX_INPUTS} {what}. Got {count}.")


def check_dataset(dataset: Dataset) -> None:
    """Checks a dataset.

    Raises:
        InvalidInput: a part is missing or too long.
    """
    _check_text("name", dataset.name, MAX_DATASET_NAME)
    _check_text("digest", dataset.digest, MAX_DATASET_DIGEST)
    _check_text("source_type", dataset.source_type, MAX_DATASET_NAME)
    _check_text("source", dataset.source, MAX_DATASET_SOURCE, may_be_empty=True)
    _check_text("schema", dataset.schema or "", MAX_DATASET_SCHEMA, may_be_empty=True)
    _check_text("profile", dataset.profile or "", MAX_DATASET_PROFILE, may_be_empty=True)


def check_input_tags(tags: Mapping[str, str]) -> None:
    """Checks the tags of an input.

    Raises:
        InvalidInput: a key is missing, or a key or value is too long.
    """
    for key, value in tags.items():
        _check_text("key", key, MAX_INPUT_TAG_KEY)
        _check_text("value", value, MAX_INPUT_TAG_VALUE, may_be_empty=True)


def _check_text(name: str, value: str, limit: int, *, may_be_empty: bool = False) -> None:
    if not value and not may_be_empty:
        raise InvalidInput(f"Missing value for required parameter '{name}' of a dataset or its tag.")
    if len(value) > limit:
        raise InvalidInput(f"'{name}' exceeds the maximum length of {limit} characters: it has {len(value)}.")
