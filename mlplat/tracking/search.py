"""The language of searches: text → tree. MLflow's grammar and more.

More than MLflow: OR, NOT and parentheses; ``IN`` everywhere; ``min(metrics.loss)`` and ``max(...)`` beside the
last value, spelled as calls because keys may contain dots; ``params.lr > 0.01``, where a bare number compares
as a number and params that are none never match.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedInput, VisitError

from mlplat.errors import InvalidInput
from mlplat.tracking.fields import RUN_FIELDS, Aggregate, Entity, Field, Fields

MAX_FILTER_LENGTH = 20_000
#: SQL of deeper trees exhausts Python's stack.
MAX_DEPTH = 30


NUMERIC_COMPARATORS = frozenset({"=", "!=", ">", ">=", "<", "<=", "IN", "NOT IN"})
NULL_TESTS = frozenset({"IS NULL", "IS NOT NULL"})
ORDERED_COMPARATORS = NUMERIC_COMPARATORS
TEXT_COMPARATORS = frozenset({"=", "!=", "LIKE", "ILIKE", "IN", "NOT IN"}) | NULL_TESTS

Value = float | str | tuple[float, ...] | tuple[str, ...] | None


@dataclass(frozen=True)
class Comparison:
    """``field comparator value``; ``value`` is None for the NULL tests and a tuple for IN."""

    field: Field
    comparator: str
    value: Value

    @property
    def is_numeric(self) -> bool:
        """True when numbers are compared: always, or because a param is compared with one."""
        first = self.value[0] if isinstance(self.value, tuple) else self.value
        return self.field.is_numeric or isinstance(first, float)


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
?filter: any_of
order: field                 -> ascending
     | field _ASC            -> ascending
     | field _DESC           -> descending
?any_of: all_of (_OR all_of)*
?all_of: not_ (_AND not_)*
?not_: _NOT not_ -> negation
     | "(" any_of ")"
     | comparison
comparison: field OP literal       -> compare
          | field _IN "(" literal ("," literal)* ")"       -> is_in
          | field _NOT _IN "(" literal ("," literal)* ")"  -> not_in
          | field _IS _NULL        -> is_null
          | field _IS _NOT _NULL   -> not_null
?field: plain
      | IDENTIFIER "(" plain ")"  -> aggregate
plain: IDENTIFIER ["." QUOTED_KEY]
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
_ASC.5: /ASC\b/i
_DESC.5: /DESC\b/i
IDENTIFIER: /[A-Za-z_][\w\/\-]*(\.[\w\/\-]+)*/
QUOTED_KEY: /`[^`]+`|"[^"]+"/
NUMBER: /[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?/
STRING: /'[^']*'|"[^"]*"/
%import common.WS
%ignore WS
"""


@v_args(inline=True)
class _ToTree(Transformer[Any, Any]):
    def __init__(self, fields: Fields) -> None:
        super().__init__()
        self._fields = fields

    def plain(self, first: Token, quoted: Token | None = None) -> tuple[str, str | None]:
        text = str(first)[1:-1] if first.type == "QUOTED_KEY" else str(first)
        return text, str(quoted)[1:-1] if quoted is not None else None

    def aggregate(self, name: Token, plain: tuple[str, str | None]) -> Field:
        try:
            aggregate = Aggregate(str(name).lower())
        except ValueError as error:
            raise InvalidInput(f"Invalid function '{name}'. Valid ones are {', '.join(Aggregate)}.") from error
        return self._fields.resolve(*plain, aggregate)

    def number(self, token: Token) -> float:
        return float(token)

    def string(self, token: Token) -> str:
        return str(token)[1:-1]

    def literal(self, value: str) -> str:
        return value

    def compare(self, field: _Named, operator: Token, value: float | str) -> Comparison:
        return self._checked(field, str(operator).upper(), value)

    def is_in(self, field: _Named, *values: float | str) -> Comparison:
        return self._checked(field, "IN", _list(values))

    def not_in(self, field: _Named, *values: float | str) -> Comparison:
        return self._checked(field, "NOT IN", _list(values))

    def is_null(self, field: _Named) -> Comparison:
        return self._checked(field, "IS NULL", None)

    def not_null(self, field: _Named) -> Comparison:
        return self._checked(field, "IS NOT NULL", None)

    def negation(self, operand: Predicate) -> Not:
        return Not(operand)

    def all_of(self, *operands: Predicate) -> AllOf:
        return AllOf(operands)

    def any_of(self, *operands: Predicate) -> AnyOf:
        return AnyOf(operands)

    def ascending(self, field: _Named) -> OrderBy:
        return OrderBy(self._resolved(field), True)

    def descending(self, field: _Named) -> OrderBy:
        return OrderBy(self._resolved(field), False)

    def _resolved(self, named: _Named) -> Field:
        return named if isinstance(named, Field) else self._fields.resolve(*named)

    def _checked(self, named: _Named, comparator: str, value: Value) -> Comparison:
        field = self._resolved(named)
        if self._fields.takes_quoted_numbers and field.entity is Entity.ATTRIBUTE and field.is_numeric:
            value = _unquoted(value)
        comparison = Comparison(field, comparator, value)
        _check(comparison)
        return comparison


_Named = Field | tuple[str, str | None]


def _list(values: Sequence[float | str]) -> tuple[float, ...] | tuple[str, ...]:
    numbers = tuple(value for value in values if isinstance(value, float))
    texts = tuple(value for value in values if isinstance(value, str))
    if numbers and texts:
        raise InvalidInput("Invalid list of values: numbers and quoted strings cannot be mixed.")
    return numbers or texts


def _unquoted(value: Value) -> Value:
    """With counting numbers for texts that are such."""
    values = value if isinstance(value, tuple) else (value,)
    texts = [item for item in values if isinstance(item, str) and item.isascii() and item.isdecimal()]
    if not texts or len(texts) < len(values):
        return value
    numbers = tuple(map(float, texts))
    return numbers if isinstance(value, tuple) else numbers[0]


def _check(comparison: Comparison) -> None:
    field, value = comparison.field, comparison.value
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    if field.entity is Entity.METRIC:
        allowed = NUMERIC_COMPARATORS
    elif field.entity is Entity.ATTRIBUTE and field.is_numeric:
        allowed = NUMERIC_COMPARATORS | NULL_TESTS
    elif field.is_ordered:
        allowed = ORDERED_COMPARATORS
    else:
        allowed = NUMERIC_COMPARATORS if comparison.is_numeric else TEXT_COMPARATORS
    if comparison.comparator not in allowed:
        hint = "; compare with a bare number" if field.entity is Entity.PARAM and not comparison.is_numeric else ""
        raise InvalidInput(
            f"Invalid comparator '{comparison.comparator}' for {field.entity} '{field.key}', "
            f"not one of {', '.join(sorted(allowed))}{hint}."
        )
    if any(isinstance(item, float) and math.isinf(item) for item in values):
        raise InvalidInput(f"Number too large for {field.entity} '{field.key}'.")
    if field.is_numeric and any(isinstance(item, str) for item in values):
        kind = "metric" if field.entity is Entity.METRIC else f"numeric attribute: {field.key}"
        raise InvalidInput(f"Expected numeric value type for {kind}. Found {values[0]!r}")
    if comparison.is_numeric and not field.is_numeric and field.entity is not Entity.PARAM:
        raise InvalidInput(
            f"Expected a quoted string value for {field.entity} '{field.key}' (e.g. 'my-value'). Got value {values[0]}"
        )


@lru_cache(maxsize=1)
def _parser() -> Lark:
    return Lark(_GRAMMAR, parser="lalr", lexer="contextual", maybe_placeholders=False, start=["filter", "order"])


def parse_filter(text: str, fields: Fields = RUN_FIELDS) -> Predicate:
    """The tree of a filter; an empty filter is true.

    Raises:
        InvalidInput: the text is not a filter; the message shows where it stops being one.
    """
    if not text.strip():
        return AllOf(())
    tree: Predicate = _parse(text, "filter", "filter string", fields)
    if _depth(tree) > MAX_DEPTH:
        raise InvalidInput(f"Invalid filter string: nested more than {MAX_DEPTH} deep.")
    return tree


def parse_order(text: str, fields: Fields = RUN_FIELDS) -> OrderBy:
    """The order that ``entity.key [ASC|DESC]`` names.

    Raises:
        InvalidInput: not of that form, no such field, or nothing to order by.
    """
    order: OrderBy = _parse(text, "order", "order_by clause", fields)
    named = order.field
    if named.entity is Entity.DATASET:
        raise InvalidInput(f"Invalid order_by clause {text!r}: a run may have many datasets.")
    if named.entity is Entity.ATTRIBUTE and named.key in fields.many:
        raise InvalidInput(f"Invalid order_by clause {text!r}: there may be many of {named.key!r}.")
    return order


def parse_orders(texts: Sequence[str], fields: Fields = RUN_FIELDS) -> tuple[OrderBy, ...]:
    """The whole order of a search.

    Raises:
        InvalidInput: as ``parse_order``, or a field occurs twice.
    """
    orders = tuple(parse_order(text, fields) for text in texts)
    names = [str(order.field) for order in orders]
    if len(set(names)) < len(names):
        raise InvalidInput(f"`order_by` contains duplicate fields: {names}")
    return orders


def _parse(text: str, start: str, what: str, fields: Fields) -> Any:
    if len(text) > MAX_FILTER_LENGTH:
        raise InvalidInput(f"Invalid {what}: longer than {MAX_FILTER_LENGTH} characters.")
    try:
        return _ToTree(fields).transform(_parser().parse(text, start=start))
    except UnexpectedInput as error:
        where = error.get_context(text).rstrip() if (error.pos_in_stream or 0) >= 0 else "at its end"
        raise InvalidInput(f"Invalid {what}, not understood here:\n{where}") from error
    except VisitError as error:
        if isinstance(error.orig_exc, InvalidInput):
            raise error.orig_exc from error
        raise InvalidInput(f"Invalid {what}: nested too deeply.") from error
    except RecursionError as error:
        raise InvalidInput(f"Invalid {what}: nested too deeply.") from error


def _depth(predicate: Predicate) -> int:
    match predicate:
        case Comparison():
            return 1
        case Not(operand):
            return 1 + _depth(operand)
        case AllOf(operands) | AnyOf(operands):
            return 1 + max(map(_depth, operands), default=0)


def conjuncts(predicate: Predicate) -> tuple[Predicate, ...]:
    """The parts that must all hold."""
    if not isinstance(predicate, AllOf):
        return (predicate,)
    return tuple(part for operand in predicate.operands for part in conjuncts(operand))


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
