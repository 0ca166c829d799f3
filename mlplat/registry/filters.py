"""What searches of models and of versions compare, as SQL.

Of an alias a row may have any number: ``alias != 'x'`` holds if it has another one, ``NOT alias = 'x'`` if it does not
have this one, as it is with datasets.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, cast, func, literal, or_, select
from sqlalchemy.types import DOUBLE_PRECISION, Text

from mlplat.db.tables import (
    model_alias,
    model_version,
    model_version_tag,
    registered_model,
    registered_model_tag,
    run_param,
)
from mlplat.errors import InvalidInput
from mlplat.registry.model import PROMPT_TAG, SEMANTIC_VERSION_TAG, parse_stage
from mlplat.registry.semver import VersionRange, parse_range, parse_semantic_version
from mlplat.tracking.fields import Entity, Field
from mlplat.tracking.filters import TESTS, FilterCompiler, MetricRuns, entry_conditions, once
from mlplat.tracking.paging import Kind
from mlplat.tracking.search import Comparison, OrderBy, Predicate, comparisons
from mlplat.tracking.search_tables import Tables, Term

_model, _version = registered_model.c, model_version.c

MODELS = Tables(
    identity=(_model.name,),
    attributes={
        "name": _model.name,
        # Callers see milliseconds.
        "creation_timestamp": func.date_trunc("milliseconds", _model.created_at),
        "last_updated_timestamp": func.date_trunc("milliseconds", _model.updated_at),
    },
    pairs={Entity.TAG: registered_model_tag},
    ties=(Term(_model.name, True, Kind.TEXT),),
    ordered={"creation_timestamp": (_model.created_at,), "last_updated_timestamp": (_model.updated_at,)},
    many={"alias": model_alias.c.alias},
)
VERSIONS = Tables(
    identity=(_version.name, _version.version),
    attributes={
        "name": _version.name,
        "version_number": cast(_version.version, DOUBLE_PRECISION),
        "run_id": _version.run_id,
        "source_path": _version.source,
        "user_id": _version.user_id,
        "stage": _version.stage,
        "semantic_version": _version.semantic,
        "creation_timestamp": func.date_trunc("milliseconds", _version.created_at),
        "last_updated_timestamp": func.date_trunc("milliseconds", _version.updated_at),
    },
    pairs={Entity.TAG: model_version_tag, Entity.PARAM: run_param},
    ties=(Term(_version.name, True, Kind.TEXT), Term(_version.version, False, Kind.NUMBER)),
    ordered={
        "version_number": (_version.version,),
        "semantic_version": tuple(_version.semantic[place] for place in (1, 2, 3)),
        "creation_timestamp": (_version.created_at,),
        "last_updated_timestamp": (_version.updated_at,),
    },
    nullable=frozenset({"run_id"}),
    run=_version.run_id,
    many={"alias": model_alias.c.alias},
)
#: Of versions; models come by name, which breaks their ties.
NEWEST_FIRST = OrderBy(Field(Entity.ATTRIBUTE, "last_updated_timestamp"), ascending=False)

_STAGE = Field(Entity.ATTRIBUTE, "stage")
_SEMANTIC = Field(Entity.ATTRIBUTE, "semantic_version")
_IS_PROMPT = Field(Entity.TAG, PROMPT_TAG)
_SHOWN_SEMANTIC = Field(Entity.TAG, SEMANTIC_VERSION_TAG)
_PROMPTS = Comparison(_IS_PROMPT, "=", "true")
_NO_PROMPT = literal("false", Text)


def names_prompts(predicate: Predicate) -> bool:
    """Whether a filter says itself which prompts it wants; else they are hidden."""
    return any(found.field == _IS_PROMPT for found in comparisons(predicate))


class RegistryCompiler(FilterCompiler):
    """Filter trees of models or of versions → conditions.

    Args:
        probed: comparisons with so many entries that each row's own are looked up.
    """

    def __init__(
        self, tables: Tables, metric_runs: MetricRuns | None = None, probed: Collection[Comparison] = ()
    ) -> None:
        super().__init__(tables, metric_runs)
        self._name = tables.identity[0]
        self._probed = probed

    def compare(self, comparison: Comparison) -> ColumnElement[bool]:
        """The condition of one comparison.

        Raises:
            InvalidInput: a value that its field cannot have.
        """
        if comparison.field == _STAGE:
            return super().compare(_known_stages(comparison))
        if comparison.field == _SEMANTIC:
            return _in_ranges(comparison)
        if comparison.field == _SHOWN_SEMANTIC and self._tables is VERSIONS:
            return TESTS[comparison.comparator](func.array_to_string(_version.semantic, "."), comparison.value)
        if comparison.field == _IS_PROMPT and comparison.value is not None:
            return self._compare_prompt(comparison)
        return super().compare(comparison)

    def is_of_entries(self, comparison: Comparison) -> bool:
        """See ``FilterCompiler``."""
        is_special = comparison.field == _SHOWN_SEMANTIC and self._tables is VERSIONS
        return super().is_of_entries(comparison) and not is_special

    def is_countable(self, comparison: Comparison) -> bool:
        """Whether just those rows pass that have an entry which does."""
        return self.is_of_entries(comparison) and comparison.comparator != "IS NULL" and comparison.field != _IS_PROMPT

    def is_probed(self, comparison: Comparison) -> bool:
        """See ``FilterCompiler``."""
        return comparison in self._probed

    def lookup(self, query: Select[Any]) -> Select[Any]:
        """See ``FilterCompiler``. Without the offset the planner may gather the entries of all rows instead."""
        return query.offset(0)

    def is_no_prompt(self) -> ColumnElement[bool]:
        """MLflow's rule: whatever has the name of a prompt, or of a version of one, is not shown unless asked for."""
        tables = {registered_model_tag, self._tables.pairs[Entity.TAG]}
        named = [select(tag.c.name).where(or_(*entry_conditions(tag, _PROMPTS))) for tag in sorted(tables, key=str)]
        return and_(*(~once(self._name.in_(query)) for query in named))

    def _compare_prompt(self, comparison: Comparison) -> ColumnElement[bool]:
        """Without the tag it is as if it were 'false': MLflow's client asks for models with ``!= 'true'``."""
        untagged = super().compare(Comparison(_IS_PROMPT, "IS NULL", None))
        holds_for_others = TESTS[comparison.comparator](_NO_PROMPT, comparison.value)
        return or_(super().compare(comparison), and_(holds_for_others, untagged, self.is_no_prompt()))


def _known_stages(comparison: Comparison) -> Comparison:
    """With stages as they are spelled."""
    value: Any = comparison.value
    if comparison.comparator in {"=", "!="}:
        value = parse_stage(value).value
    elif comparison.comparator in {"IN", "NOT IN"}:
        value = tuple(parse_stage(item).value for item in value)
    return Comparison(comparison.field, comparison.comparator, value)


def _in_ranges(comparison: Comparison) -> ColumnElement[bool]:
    """``=`` and ``IN`` take ranges, the rest exact versions."""
    values: Any = comparison.value if isinstance(comparison.value, tuple) else (comparison.value,)
    if comparison.comparator in {"=", "!=", "IN", "NOT IN"}:
        inside = or_(*(_within(parse_range(item)) for item in values))
        return inside if comparison.comparator in {"=", "IN"} else ~inside
    try:
        [exact] = map(parse_semantic_version, values)
    except InvalidInput as error:
        raise InvalidInput(f"{error.message} Ranges such as ^1.2 are compared with = and !=.") from error
    return TESTS[comparison.comparator](_version.semantic, list(exact))


def _within(wanted: VersionRange) -> ColumnElement[bool]:
    return and_(_version.semantic >= list(wanted.lower), _version.semantic < list(wanted.upper))
