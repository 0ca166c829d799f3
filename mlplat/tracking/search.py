"""The filter language of run search: text → tree. MLflow's grammar, plus OR, NOT and parentheses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedInput, VisitError

from mlplat.errors import InvalidInput

MAX_FILTER_LENGTH = 20_000
#: SQL of deeper trees exhausts Python's stack.
MAX_DEPTH = 30


class Entity(StrEnum):
    """What the left side of a comparison names."""

    METRIC = "metric"
    PARAM = "param"
    TAG = "tag"
    ATTRIBUTE = "attribute"


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
    "run": Entity.ATTRIBUTE,
}

NUMERIC_ATTRIBUTES = {"start_time", "end_time"}
STRING_ATTRIBUTES = {"run_id", "run_name", "status", "user_id", "artifact_uri"}
_ATTRIBUTE_ALIASES = {"created": "start_time", "Created": "start_time", "run name": "run_name", "Run name": "run_name"}


@dataclass(frozen=True)
class Fields:
    """The attributes that an entity's filters may name; ``aliases`` maps other spellings to them."""

    numeric: frozenset[str]
    text: frozenset[str]
    aliases: Mapping[str, str]


RUN_FIELDS = Fields(frozenset(NUMERIC_ATTRIBUTES), frozenset(STRING_ATTRIBUTES), _ATTRIBUTE_ALIASES)

NUMERIC_COMPARATORS = {"=", "!=", ">", ">=", "<", "<="}
STRING_COMPARATORS = {"=", "!=", "LIKE", "ILIKE", "IN", "NOT IN", "IS NULL", "IS NOT NULL"}


@dataclass(frozen=True)
class Field:
    """``entity.key``."""

    entity: Entity
    key: str

    def is_numeric(self, fields: Fields = RUN_FIELDS) -> bool:
        """True when values of this field are compared as numbers."""
        return self.entity is Entity.METRIC or (self.entity is Entity.ATTRIBUTE and self.key in fields.numeric)


@dataclass(frozen=True)
class Comparison:
    """``field comparator value``; ``value`` is None for the NULL tests and a tuple for IN."""

    field: Field
    comparator: str
    value: float | str | tuple[str, ...] | None


@dataclass(frozen=True)
class Not:
    """Negation."""

    operand: Predicate


@dataclass(frozen=True)
class AllOf:
    """Conjunction; true when empty."""

    operands: tuple[Predicate, ...]


@dataclass(frozen=True)
class AnyOf:
    """Disjunction."""

    operands: tuple[Predicate, ...]


Predicate = Comparison | Not | AllOf | AnyOf


@dataclass(frozen=True)
class OrderBy:
    """One key of an order."""

    field: Field
    ascending: bool


_GRAMMAR = r"""
?start: any_of
?any_of: all_of (_OR all_of)*
?all_of: not_ (_AND not_)*
?not_: _NOT not_ -> negation
     | "(" any_of ")"
     | comparison
comparison: field OP literal       -> compare
          | field _IN "(" string ("," string)* ")"       -> is_in
          | field _NOT _IN "(" string ("," string)* ")"  -> not_in
          | field _IS _NULL        -> is_null
          | field _IS _NOT _NULL   -> not_null
field: IDENTIFIER ["." QUOTED_KEY]
     | QUOTED_KEY
literal: NUMBER -> number
       | string
string: STRING
OP: "!=" | ">=" | "<=" | "=" | ">" | "<" | /I?LIKE\b/i
_AND.5: /AND\b/i
_OR.5: /OR\b/i
_NOT.5: /NOT\b/i
_IN.5: /IN\b/i
_IS.5: /IS\b/i
_NULL.5: /NULL\b/i
IDENTIFIER: /[A-Za-z_][\w\/\-]*(\.[\w\/\-]+)*/
QUOTED_KEY: /`[^`]+`|"[^"]+"/
NUMBER: /[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?/
STRING: /'[^']*'|"[^"]*"/
%import common.WS
%ignore WS
"""


def make_field(text: str, quoted_key: str | None = None, fields: Fields = RUN_FIELDS) -> Field:
    """The field that ``entity.key``, or a bare attribute, names.

    Raises:
        InvalidInput: no such entity or attribute.
    """
    prefix, dot, rest = text.partition(".")
    if quoted_key is not None:
        prefix, rest = text, quoted_key
    elif not dot:
        prefix, rest = "attribute", text
    entity = _ENTITY_NAMES.get(prefix)
    if entity is None:
        raise InvalidInput(f"Invalid entity type {prefix!r}. Valid ones are metrics, params, tags and attributes.")
    if entity is Entity.ATTRIBUTE:
        rest = fields.aliases.get(rest, rest)
        if rest not in fields.numeric | fields.text:
            valid = sorted(fields.numeric | fields.text)
            raise InvalidInput(f"Invalid attribute key {rest!r}. Valid ones are {', '.join(valid)}.")
    return Field(entity, rest)


@v_args(inline=True)
class _ToTree(Transformer[Any, Any]):
    def __init__(self, fields: Fields) -> None:
        super().__init__()
        self._fields = fields

    def field(self, first: Token, quoted: Token | None = None) -> Field:
        if first.type == "QUOTED_KEY":
            return make_field(str(first)[1:-1], fields=self._fields)
        return make_field(str(first), str(quoted)[1:-1] if quoted is not None else None, self._fields)

    def number(self, token: Token) -> float:
        return float(token)

    def string(self, token: Token) -> str:
        return str(token)[1:-1]

    def literal(self, value: str) -> str:
        return value

    def compare(self, field: Field, operator: Token, value: float | str) -> Comparison:
        return _checked(self._fields, Comparison(field, str(operator).upper(), value))

    def is_in(self, field: Field, *values: str) -> Comparison:
        return _checked(self._fields, Comparison(field, "IN", values))

    def not_in(self, field: Field, *values: str) -> Comparison:
        return _checked(self._fields, Comparison(field, "NOT IN", values))

    def is_null(self, field: Field) -> Comparison:
        return _checked(self._fields, Comparison(field, "IS NULL", None))

    def not_null(self, field: Field) -> Comparison:
        return _checked(self._fields, Comparison(field, "IS NOT NULL", None))

    def negation(self, operand: Predicate) -> Not:
        return Not(operand)

    def all_of(self, *operands: Predicate) -> AllOf:
        return AllOf(operands)

    def any_of(self, *operands: Predicate) -> AnyOf:
        return AnyOf(operands)


def _checked(fields: Fields, comparison: Comparison) -> Comparison:
    field, comparator, value = comparison.field, comparison.comparator, comparison.value
    is_numeric = field.is_numeric(fields)
    allowed = NUMERIC_COMPARATORS if is_numeric else STRING_COMPARATORS
    if comparator not in allowed:
        raise InvalidInput(f"Invalid comparator {comparator!r} for {field.entity} {field.key!r}.")
    if isinstance(value, float) and math.isinf(value):
        raise InvalidInput(f"Number too large for {field.entity} {field.key!r}.")
    if is_numeric and not isinstance(value, float):
        raise InvalidInput(f"Expected a number for {field.entity} {field.key!r}, found {value!r}.")
    if not is_numeric and isinstance(value, float):
        raise InvalidInput(
            f"Expected a quoted string value for {field.entity} {field.key!r} (e.g. 'my-value'), found {value!r}."
        )
    return comparison


@lru_cache(maxsize=1)
def _parser() -> Lark:
    return Lark(_GRAMMAR, parser="lalr", lexer="contextual", maybe_placeholders=False)


def parse_filter(text: str, fields: Fields = RUN_FIELDS) -> Predicate:
    """The tree of a filter over an entity with these fields; an empty filter is true.

    Raises:
        InvalidInput: the text is not a filter; the message shows where it stops being one.
    """
    if not text.strip():
        return AllOf(())
    if len(text) > MAX_FILTER_LENGTH:
        raise InvalidInput(f"Invalid filter string: longer than {MAX_FILTER_LENGTH} characters.")
    try:
        tree: Predicate = _ToTree(fields).transform(_parser().parse(text))
        depth = _depth(tree)
    except UnexpectedInput as error:
        where = error.get_context(text).rstrip() if (error.pos_in_stream or 0) >= 0 else "at its end"
        raise InvalidInput(f"Invalid filter string, not understood here:\n{where}") from error
    except VisitError as error:
        if isinstance(error.orig_exc, InvalidInput):
            raise error.orig_exc from error
        raise InvalidInput("Invalid filter string: nested too deeply.") from error
    except RecursionError as error:
        raise InvalidInput("Invalid filter string: nested too deeply.") from error
    if depth > MAX_DEPTH:
        raise InvalidInput(f"Invalid filter string: nested more than {MAX_DEPTH} deep.")
    return tree


def _depth(predicate: Predicate) -> int:
    match predicate:
        case Comparison():
            return 1
        case Not(operand):
            return 1 + _depth(operand)
        case AllOf(operands) | AnyOf(operands):
            return 1 + max(map(_depth, operands), default=0)


def parse_order(text: str) -> OrderBy:
    """The order that ``entity.key [ASC|DESC]`` names.

    Raises:
        InvalidInput: no such field.
    """
    name, direction = text.strip(), "ASC"
    head, _space, tail = name.rpartition(" ")
    if head and tail.upper() in {"ASC", "DESC"}:
        name, direction = head.strip(), tail.upper()
    entity, dot, key = name.partition(".")
    quoted = dot and len(key) > 2 and key[0] == key[-1] and key[0] in '`"'
    field = make_field(entity, key[1:-1]) if quoted else make_field(name.strip('`"'))
    return OrderBy(field, direction == "ASC")


def comparisons(predicate: Predicate) -> Iterator[Comparison]:
    """Every comparison in the tree."""
    match predicate:
        case Comparison():
            yield predicate
        case Not(operand):
            yield from comparisons(operand)
        case AllOf(operands) | AnyOf(operands):
            for operand in operands:
                yield from comparisons(operand)
