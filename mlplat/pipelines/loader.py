"""Definitions from text: every problem comes with its line and its path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.dag import Problem, check_graph
from mlplat.pipelines.spec import PipelineSpec

MAX_BYTES = 1024 * 1024


class _Loader(yaml.SafeLoader):
    """Safe, without aliases (their expansion is unbounded) and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # PyYAML's stubs leave it out
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (LookupError, AttributeError, ValueError, TypeError) as error:  # PyYAML's scalars trust their tags
            problem = f"not a {node.tag.rpartition(':')[2]}: {node.value!r}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _value in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


Lines = dict[tuple[str | int, ...], int]


def parse_yaml(text: str, source: str = "<text>") -> PipelineSpec:
    """The pipeline in a YAML text.

    Raises:
        InvalidPipeline: one line per problem, each ``source:line: path: reason``.
    """
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise InvalidPipeline(f"{source}: larger than {MAX_BYTES} bytes")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else 1
        raise InvalidPipeline(f"{source}:{line}: not readable as YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidPipeline(f"{source}: not readable as YAML: {str(error).splitlines()[0]}") from error
    if node is None or not isinstance(document, dict):
        raise InvalidPipeline(f"{source}:1: expected a mapping with 'name' and 'steps'")
    lines: Lines = {}
    _collect_lines(node, (), lines)
    return build_spec(document, source, lines)


def load_file(path: Path) -> PipelineSpec:
    """The pipeline in a YAML file.

    Raises:
        InvalidPipeline: it cannot be read, or is not a pipeline.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InvalidPipeline(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidPipeline(f"{path}: not UTF-8 text") from error


def build_spec(document: Mapping[str, Any], source: str = "definition", lines: Lines | None = None) -> PipelineSpec:
    """A checked spec.

    Raises:
        InvalidPipeline: one line per problem.
    """
    odd = [Problem(path, "may not contain NUL characters") for path in _nul_paths(document, ())]
    if odd:
        raise InvalidPipeline(_report(odd, source, lines))
    try:
        spec = PipelineSpec.model_validate(document)
    except ValidationError as error:
        problems = [Problem(_document_path(item["loc"]), _reason(item)) for item in error.errors()]
        raise InvalidPipeline(_report(problems, source, lines)) from error
    problems = check_graph(spec)
    if problems:
        raise InvalidPipeline(_report(problems, source, lines))
    return spec


def _nul_paths(value: object, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Where a text has a NUL character, which Postgres does not take."""
    if isinstance(value, str):
        if "\x00" in value:
            yield path
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _nul_paths(key, path)
            yield from _nul_paths(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _nul_paths(inner, (*path, index))


def _collect_lines(node: yaml.Node, path: tuple[str | int, ...], lines: Lines) -> None:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _collect_lines(value, (*path, key.value), lines)
            lines[(*path, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*path, index), lines)


#: Names that pydantic adds to the location of a problem inside a union.
_UNION_PARTS = {"str", "int", "float", "bool"}


def _document_path(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Pydantic's location without the names it adds for unions and keys."""
    return tuple(
        part
        for index, part in enumerate(location)
        if not (isinstance(part, str) and ("[" in part or (part in _UNION_PARTS and index > 2)))
    )


def _reason(item: Any) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "missing":
        return "required, but missing"
    if kind == "string_pattern_mismatch":
        if item["loc"][-1] == "uses":
            return f"expected module:function, got {item['input']!r}"
        return f"not a valid name: {item['input']!r} (letters, digits and underscores, a letter first)"
    message = str(item["msg"])
    return message.removeprefix("Value error, ")


def _report(problems: list[Problem], source: str, lines: Lines | None) -> str:
    return "\n".join(
        f"{source}{_line_of(problem.path, lines)}: {'.'.join(map(str, problem.path)) or 'pipeline'}: {problem.message}"
        for problem in problems
    )


def _line_of(path: tuple[str | int, ...], lines: Lines | None) -> str:
    if not lines:
        return ""
    while path and path not in lines:
        path = path[:-1]
    return f":{lines.get(path, 1)}"
