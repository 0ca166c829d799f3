"""``${{ … }}``: JMESPath over ``params``, ``run``, ``steps.<name>.output|state`` and, in a fan-out, ``item``.

JMESPath has no side effects, no loops and no way to reach Python, so an expression cannot do harm.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jmespath
from jmespath.exceptions import JMESPathError

from mlplat.errors import InvalidInput

_OPEN, _CLOSE = "${{", "}}"
#: The next part of a shell command, by the quotes around it.
_SHELL_PARTS = {
    "": re.compile(r"\\.|(?<!\S)#[^\n]*|\$\(|.", re.DOTALL),
    '"': re.compile(r"\\.|\$\(|.", re.DOTALL),
    "'": re.compile(r".", re.DOTALL),
}
ROOTS = ("params", "steps", "item", "run")
RUN_FIELDS = ("id", "pipeline", "state")


@dataclass(frozen=True)
class OutputRef:
    """A step's output that is not JSON: pickled bytes in the artifact store, to be passed on whole."""

    digest: str
    type_name: str

    def get(self, key: str) -> Any:
        """What JMESPath calls to look inside.

        Raises:
            InvalidInput: always; only the receiving step can open the object.
        """
        raise InvalidInput(
            f"an expression cannot look for {key!r} inside a {self.type_name}: only JSON outputs can be taken apart. "
            "Pass the whole output."
        )


def find_expressions(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every expression in a JSON-like value, with the path to the string it stands in."""
    if isinstance(value, str):
        for is_inside, part in _parts(value):
            if is_inside:
                yield path, part
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from find_expressions(inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from find_expressions(inner, (*path, index))


def is_expression(text: str) -> bool:
    """Whether the text is one expression and nothing else, so that it gives a value and not a text."""
    return [is_inside for is_inside, _part in islice(_parts(text.strip()), 2)] == [True]


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """The text in parts: expressions without their braces (True), and what is between them.

    Not by a regular expression: one that looks for the end from every opening takes hours where there is none.
    """
    position = 0
    while (start := text.find(_OPEN, position)) >= 0 and (end := text.find(_CLOSE, start + len(_OPEN))) >= 0:
        if start > position:
            yield False, text[position:start]
        yield True, text[start + len(_OPEN) : end].strip()
        position = end + len(_CLOSE)
    if position < len(text):
        yield False, text[position:]


def references(expression: str) -> set[tuple[str, ...]]:
    """The paths an expression reads, such as ``("params", "seed")`` and ``("steps", "load", "output")``.

    Raises:
        InvalidInput: not a JMESPath expression, or it reads something that does not exist.
    """
    found = root_paths(expression)
    for path in found:
        if not path or path[0] not in ROOTS:
            raise InvalidInput(
                f"{expression!r} refers to {'.'.join(path) or 'nothing'}: expressions read params.<name>, "
                "steps.<name>.output, run.id and, with foreach, item"
            )
        if path[0] == "params" and len(path) < 2:
            raise InvalidInput(f"{expression!r}: name the parameter, as in params.seed")
        if path[0] == "steps" and (len(path) < 3 or path[2] not in {"output", "state"}):
            raise InvalidInput(f"{expression!r}: name a step's output, as in steps.load.output")
        if path[0] == "run" and (len(path) < 2 or path[1] not in RUN_FIELDS):
            raise InvalidInput(f"{expression!r}: name one of {', '.join(f'run.{name}' for name in RUN_FIELDS)}")
    return found


def root_paths(expression: str) -> set[tuple[str, ...]]:
    """The paths that an expression reads, whatever they start with; ``()`` for everything.

    Raises:
        InvalidInput: not a JMESPath expression.
    """
    try:
        return set(_root_paths(jmespath.compile(expression).parsed))
    except JMESPathError as error:
        raise InvalidInput(f"not an expression: {expression!r}: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise InvalidInput(f"not an expression: nested too deeply: {expression[:80]!r}…") from error


def _root_paths(node: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths that start at the root, ``()`` for the root itself. What is evaluated elsewhere is left out."""
    kind, children = node["type"], node["children"]
    if kind == "field":
        yield (node["value"],)
    elif kind in {"current", "identity"}:
        yield ()
    elif kind == "subexpression":
        yield from _joined(children)
    elif kind in {"index_expression", "projection", "value_projection", "filter_projection", "flatten", "pipe"}:
        yield from _root_paths(children[0])
    elif kind not in {"literal", "expref"}:
        for child in children:
            yield from _root_paths(child)


def _joined(parts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """``a.b.c[0].d`` reads the path (a, b, c), and ``a.[b, c]`` the paths (a, b) and (a, c).

    Names count until something else than a name comes.
    """
    paths = list(_root_paths(parts[0]))
    if parts[0]["type"] == "field":
        for part in parts[1:]:
            paths = [path + tail for path in paths for tail in list(_root_paths(part)) or [()]]
            if part["type"] != "field":
                break
    yield from paths


def render(template: object, scope: Mapping[str, Any]) -> Any:
    """The template with every expression replaced.

    A string that is one expression becomes its value, of whatever type; inside a longer string,
    values are spliced in as text (JSON for what is not a string).

    Raises:
        InvalidInput: an expression fails on these values.
    """
    if isinstance(template, str):
        if is_expression(template):
            return _evaluate(template.strip()[3:-2].strip(), scope)
        return "".join(as_text(_evaluate(part, scope)) if is_inside else part for is_inside, part in _parts(template))
    if isinstance(template, Mapping):
        return {key: render(inner, scope) for key, inner in template.items()}
    if isinstance(template, list | tuple):
        return [render(inner, scope) for inner in template]
    return template


def render_command(command: str, scope: Mapping[str, Any]) -> str:
    """A shell command whose expressions have become variables, which are set at its start: values are never code.

    A value is one word, or a part of the quoted text that it stands in; quotes of either kind around it are fine.

    Raises:
        InvalidInput: an expression fails on these values.
    """
    values: list[str] = []
    text = ""
    for quotes, part in _shell_parts(command):
        if not is_expression(part):
            text += part
            continue
        values.append(f"mlplat_{len(values)}={shlex.quote(as_text(_evaluate(part[3:-2].strip(), scope)))}")
        variable = f"${{mlplat_{len(values) - 1}}}"
        text += {"": f'"{variable}"', '"': variable, "'": f"'\"{variable}\"'"}[quotes]
    return "; ".join([*values, text])


def _shell_parts(command: str) -> Iterator[tuple[str, str]]:
    """A shell command in parts, each with the quotes that it stands in. Expressions are parts of their own.

    Where this takes some rare syntax for another, a value is split or has a quote too many; it never becomes code.
    """
    stack = [""]
    position, last_close = 0, command.rfind(_CLOSE)
    while position < len(command):
        quotes = stack[-1] if stack[-1] != "(" else ""
        if command.startswith(_OPEN, position) and position + len(_OPEN) <= last_close:
            end = command.find(_CLOSE, position + len(_OPEN)) + len(_CLOSE)
        else:
            match = _SHELL_PARTS[quotes].match(command, position)
            assert match is not None  # each pattern takes any character
            end = match.end()
        part, position = command[position:end], end
        yield quotes, part
        if quotes and part == quotes:
            stack.pop()
        elif part == "$(" and quotes != "'":
            stack.append("(")
        elif not quotes and part in {"'", '"', "("}:
            stack.append(part)
        elif not quotes and part == ")" and stack[-1] == "(":
            stack.pop()


def _evaluate(expression: str, scope: Mapping[str, Any]) -> Any:
    try:
        return jmespath.search(expression, scope)
    except (JMESPathError, TypeError, ValueError, ArithmeticError, RecursionError) as error:  # it lets some through
        raise InvalidInput(f"expression {expression!r} failed: {str(error).splitlines()[0]}") from error


def as_text(value: object) -> str:
    """A value as a part of a text: JSON, unless it is a text.

    Raises:
        InvalidInput: it is no JSON.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, OutputRef):
        raise InvalidInput(f"a {value.type_name} cannot be part of a text")
    try:
        return json.dumps(value)
    except TypeError as error:  # an OutputRef inside a list
        raise InvalidInput("an output that is not JSON cannot be part of a text") from error
