"""What the left side of a comparison may name, for each kind of thing that can be searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from mlplat.errors import InvalidInput


class Entity(StrEnum):
    """What the left side of a comparison names."""

    METRIC = "metric"
    PARAM = "param"
    TAG = "tag"
    ATTRIBUTE = "attribute"
    DATASET = "dataset"


class Aggregate(StrEnum):
    """Which of a metric's values counts."""

    LAST = "last"
    MIN = "min"
    MAX = "max"


#: Attributes compared as numbers: times in ms since 1970, ``duration`` in seconds, counting numbers.
NUMERIC_ATTRIBUTES = frozenset(
    {"start_time", "end_time", "duration", "creation_time", "last_update_time", "creation_timestamp",
     "last_updated_timestamp", "version_number"}
)  # fmt: skip
#: Attributes whose texts have an order of their own.
ORDERED_ATTRIBUTES = frozenset({"semantic_version"})
DATASET_KEYS = frozenset({"name", "digest", "context"})


@dataclass(frozen=True)
class Field:
    """``entity.key``; of a metric, one of its aggregates."""

    entity: Entity
    key: str
    aggregate: Aggregate = Aggregate.LAST

    @property
    def is_numeric(self) -> bool:
        """True when values of this field are numbers."""
        return self.entity is Entity.METRIC or (self.entity is Entity.ATTRIBUTE and self.key in NUMERIC_ATTRIBUTES)

    @property
    def is_ordered(self) -> bool:
        """True when values of this field are texts with an order of their own."""
        return self.entity is Entity.ATTRIBUTE and self.key in ORDERED_ATTRIBUTES

    def __str__(self) -> str:
        name = f"{self.entity}s.{self.key}"
        return name if self.aggregate is Aggregate.LAST else f"{self.aggregate}({name})"


@dataclass(frozen=True)
class Fields:
    """The rules of one searchable kind: which entities and attributes it has.

    Args:
        attributes: names of attributes; those in ``NUMERIC_ATTRIBUTES`` are numbers.
        entities: what it has besides attributes.
        prefix: another name for ``attribute.``, such as ``run.``.
        aliases: other names of attributes.
        many: attributes of which a row may have any number.
        takes_quoted_numbers: whether a numeric attribute may be compared with a number in quotes.
    """

    attributes: frozenset[str]
    entities: frozenset[Entity]
    prefix: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    many: frozenset[str] = frozenset()
    takes_quoted_numbers: bool = False

    def entity(self, prefix: str) -> Entity:
        """The entity that a prefix names.

        Raises:
            InvalidInput: this kind has none of that name.
        """
        found = Entity.ATTRIBUTE if prefix and prefix == self.prefix else _ENTITY_NAMES.get(prefix)
        if found is None or found not in self.entities | {Entity.ATTRIBUTE}:
            valid = ", ".join(sorted(f"{entity}s" for entity in self.entities | {Entity.ATTRIBUTE}))
            raise InvalidInput(f"Invalid entity type '{prefix}'. Valid values are {valid}.")
        return found

    def resolve(self, text: str, quoted_key: str | None = None, aggregate: Aggregate | None = None) -> Field:
        """The field that ``entity.key``, or a bare attribute, names.

        Raises:
            InvalidInput: no such entity or attribute, or an aggregate of what is no metric.
        """
        prefix, dot, key = text.partition(".")
        if quoted_key is not None:
            prefix, key = text, quoted_key
        elif not dot:
            prefix, key = "attribute", text
        entity = self.entity(prefix)
        if entity is Entity.ATTRIBUTE:
            key = self.aliases.get(key, key)
            _check_key("attribute", key, self.attributes)
        if entity is Entity.DATASET:
            _check_key("dataset", key, DATASET_KEYS)
        if aggregate is not None and entity is not Entity.METRIC:
            raise InvalidInput(f"Invalid use of {aggregate}(): it takes a metric, such as {aggregate}(metrics.loss).")
        return Field(entity, key, aggregate or Aggregate.LAST)


def _check_key(kind: str, key: str, valid: frozenset[str]) -> None:
    if key not in valid:
        raise InvalidInput(f"Invalid {kind} key '{key}' specified. Valid keys are {', '.join(sorted(valid))}.")


_ENTITY_NAMES = {
    "metric": Entity.METRIC,
    "metrics": Entity.METRIC,
    "param": Entity.PARAM,
    "params": Entity.PARAM,
    "parameter": Entity.PARAM,
    "parameters": Entity.PARAM,
    "tag": Entity.TAG,
    "tags": Entity.TAG,
    "attribute": Entity.ATTRIBUTE,
    "attributes": Entity.ATTRIBUTE,
    "attr": Entity.ATTRIBUTE,
    "dataset": Entity.DATASET,
    "datasets": Entity.DATASET,
}

RUN_FIELDS = Fields(
    frozenset({"run_id", "run_name", "status", "user_id", "artifact_uri", "start_time", "end_time", "duration"}),
    frozenset({Entity.METRIC, Entity.PARAM, Entity.TAG, Entity.DATASET}),
    "run",
    {"created": "start_time", "Created": "start_time", "run name": "run_name", "Run name": "run_name"},
)
EXPERIMENT_FIELDS = Fields(
    frozenset({"name", "experiment_id", "creation_time", "last_update_time"}), frozenset({Entity.TAG}), "experiment"
)
LOGGED_MODEL_FIELDS = Fields(
    frozenset({"name", "model_id", "model_type", "status", "source_run_id", "artifact_location",
               "creation_timestamp", "last_updated_timestamp"}),
    frozenset({Entity.METRIC, Entity.PARAM, Entity.TAG}),
    "model",
    {"creation_time": "creation_timestamp", "creation_timestamp_ms": "creation_timestamp",
     "last_updated_time": "last_updated_timestamp", "last_updated_timestamp_ms": "last_updated_timestamp"},
)  # fmt: skip
REGISTERED_MODEL_FIELDS = Fields(
    frozenset({"name", "alias", "creation_timestamp", "last_updated_timestamp"}),
    frozenset({Entity.TAG}),
    "model",
    {"timestamp": "last_updated_timestamp"},
    many=frozenset({"alias"}),
    takes_quoted_numbers=True,
)
#: Metrics, params and datasets are those of the run that a version comes from.
MODEL_VERSION_FIELDS = Fields(
    frozenset({"name", "version_number", "run_id", "source_path", "creation_timestamp", "last_updated_timestamp",
               "alias", "stage", "semantic_version", "user_id"}),
    frozenset({Entity.TAG, Entity.METRIC, Entity.PARAM, Entity.DATASET}),
    "version",
    {"version": "version_number", "source": "source_path", "current_stage": "stage", "author": "user_id"},
    many=frozenset({"alias"}),
    takes_quoted_numbers=True,
)  # fmt: skip
