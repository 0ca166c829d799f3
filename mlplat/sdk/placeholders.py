"""Values that will exist when a pipeline runs, and the expressions that are made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import jmespath

from mlplat.errors import InvalidPipeline

_ONE_EXPRESSION = re.compile(r"\s*\$\{\{(.*?)\}\}\s*", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Placeholder:
    """A value that will exist when the pipeline runs: a parameter, a step's output, or what follows from them.

    Comparisons, ``&``, ``|``, ``~``, indexes and slices give placeholders again, which ``when`` takes as conditions
    and steps as arguments.
    """

    expression: str

    def __getitem__(self, key: str | int | slice) -> Placeholder:
        if isinstance(key, str):
            return Placeholder(f"{self._operand()}.{_quoted(key)}")
        if isinstance(key, int):
            return Placeholder(f"{self._operand()}[{key}]")
        parts = ["" if part is None else str(part) for part in (key.start, key.stop, key.step)]
        return Placeholder(f"{self._operand()}[{':'.join(parts if key.step is not None else parts[:2])}]")

    def __eq__(self, other: object) -> Placeholder:  # type: ignore[override]  # a condition, known when it runs
        return self._compared("==", other)

    def __ne__(self, other: object) -> Placeholder:  # type: ignore[override]  # as above
        return self._compared("!=", other)

    def __lt__(self, other: object) -> Placeholder:
        return self._ordered("<", other)

    def __le__(self, other: object) -> Placeholder:
        return self._ordered("<=", other)

    def __gt__(self, other: object) -> Placeholder:
        return self._ordered(">", other)

    def __ge__(self, other: object) -> Placeholder:
        return self._ordered(">=", other)

    def __and__(self, other: object) -> Placeholder:
        return self._compared("&&", other)

    def __rand__(self, other: object) -> Placeholder:
        return self._compared("&&", other)

    def __or__(self, other: object) -> Placeholder:
        return self._compared("||", other)

    def __ror__(self, other: object) -> Placeholder:
        return self._compared("||", other)

    def __invert__(self) -> Placeholder:
        return Placeholder(f"!({self.expression})")

    def __hash__(self) -> int:
        return hash(self.expression)

    def __iter__(self) -> Iterator[Any]:
        raise InvalidPipeline(
            f"{self.expression} has no value while the pipeline is defined, so it cannot be looped over; "
            "use step.map(...) to run a step once per element"
        )

    def __bool__(self) -> NoReturn:
        raise InvalidPipeline(
            f"{self.expression} has no value while the pipeline is defined, so it cannot be tested; "
            "use step.when(...), and & | ~ instead of and, or, not"
        )

    def __str__(self) -> str:
        """In an f-string, the expression as it stands in a definition."""
        return self.template

    @property
    def template(self) -> str:
        """The expression as it stands in a definition."""
        return f"${{{{ {self.expression} }}}}"

    def _ordered(self, operator: str, other: object) -> Placeholder:
        if not isinstance(other, Placeholder | int | float) or isinstance(other, bool):
            raise InvalidPipeline(f"{self.expression} {operator} {other!r}: only numbers have an order in expressions")
        return self._compared(operator, other)

    def _compared(self, operator: str, other: object) -> Placeholder:
        return Placeholder(f"{self._operand()} {operator} {_operand(other)}")

    def _operand(self) -> str:
        return self.expression if _is_simple(self.expression) else f"({self.expression})"


#: In the arguments of ``step.map(...)``: the element.
ITEM = Placeholder("item")


@dataclass(frozen=True)
class _ThisRun:
    """Placeholders, which steps take as texts."""

    id: str = cast("str", Placeholder("run.id"))
    pipeline: str = cast("str", Placeholder("run.pipeline"))
    #: How the steps ended; finally steps only.
    state: str = cast("str", Placeholder("run.state"))


#: The run that the pipeline will have: its ``id``, ``pipeline`` and, in finally steps, ``state``.
this_run = _ThisRun()


def expression(text: str) -> Any:
    """A placeholder of a JMESPath expression over ``params``, ``steps.<name>.output``, ``run`` and ``item``, such as
    ``length(steps.load.output)``, with or without ``${{ }}`` around it."""
    return _of_text(text)


def _of_text(text: str) -> Placeholder:
    whole = _ONE_EXPRESSION.fullmatch(text)
    return Placeholder((whole[1] if whole else text).strip())


def as_condition(value: object) -> Placeholder:
    """What ``when`` takes: a placeholder, the text of an expression, or a value whose truth is known already."""
    if isinstance(value, Placeholder):
        return value
    return _of_text(value) if isinstance(value, str) else Placeholder(_literal(bool(value)))


def as_template(value: Any) -> Any:
    """An argument as it stands in a definition."""
    if isinstance(value, Placeholder):
        return value.template
    if isinstance(value, Mapping):
        return {key: as_template(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_template(inner) for inner in value]
    return value


def fill_item(value: Any, item: object) -> Any:
    """The argument with every placeholder of the element replaced, for a call outside of pipelines."""
    if isinstance(value, Placeholder):
        return jmespath.search(value.expression, {"item": item})
    if isinstance(value, Mapping):
        return {key: fill_item(inner, item) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(fill_item(inner, item) for inner in value)
    return value


#: What needs no parentheses inside a longer expression.
_SIMPLE = re.compile(r"""[A-Za-z_][\w.]*(?:\."(?:[^"\\]|\\.)*"|\[-?\d+\]|\.[A-Za-z_]\w*)*""")


def _is_simple(text: str) -> bool:
    return _SIMPLE.fullmatch(text) is not None


def _operand(value: object) -> str:
    return value._operand() if isinstance(value, Placeholder) else _literal(value)


def _literal(value: object) -> str:
    """A constant in an expression, which is JSON between backticks."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidPipeline(f"an expression cannot hold {value!r:.100}: {error}") from error
    return "`" + text.replace("`", "\\`") + "`"


def _quoted(key: str) -> str:
    return json.dumps(key)
