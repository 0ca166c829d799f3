"""Definitions from text: every problem comes with its line and its path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.dag import Path as Where
from mlplat.pipelines.dag import Problem, check_graph
from mlplat.pipelines.locations import Lines, Mark, report
from mlplat.pipelines.refusals import problems_of
from mlplat.pipelines.spec import KINDS, MAX_DEPTH, PipelineSpec

#: Of a definition with all the files that it names.
MAX_BYTES = 1024 * 1024
_TEXT = "tag:yaml.org,2002:str"
_TAGS_OF_WORDS = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null", "timestamp")}


@dataclass(frozen=True)
class LoadedPipeline:
    """A definition from files.

    Args:
        folders: where each file lies, by the path of its part of the definition; ``()`` is the whole.
    """

    spec: PipelineSpec
    folders: Mapping[Where, Path]


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
            if key_node.tag in _TAGS_OF_WORDS:  # `on:` is a name here, not the boolean of YAML 1.1
                key_node.tag = _TEXT
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str = "<text>") -> PipelineSpec:
    """The pipeline in a YAML text.

    Raises:
        InvalidPipeline: one line per problem, each ``source:line: path: reason``.
    """
    lines: Lines = {}
    return build_spec(_read(text, source, (), lines), source, lines)


def load_file(path: Path) -> LoadedPipeline:
    """The pipeline in a YAML file, with the files that its sub-pipelines name.

    Raises:
        InvalidPipeline: a file cannot be read, or is not a pipeline.
    """
    files = _Files()
    document = files.read(path, (), (), None)
    return LoadedPipeline(build_spec(document, str(path), files.lines), files.folders)


def build_spec(document: Mapping[str, Any], source: str = "definition", lines: Lines | None = None) -> PipelineSpec:
    """A checked spec.

    Raises:
        InvalidPipeline: one line per problem.
    """
    try:
        odd = [Problem(path, "may not contain NUL characters") for path in _nul_paths(document, ())]
        if odd:
            raise InvalidPipeline(report(odd, source, lines or {}))
        spec = PipelineSpec.model_validate(document)
    except RecursionError as error:
        raise InvalidPipeline(report([Problem((), "nested too deeply")], source, lines or {})) from error
    except ValidationError as error:
        raise InvalidPipeline(report(problems_of(error), source, lines or {})) from error
    problems = check_graph(spec)
    if problems:
        raise InvalidPipeline(report(problems, source, lines or {}))
    return spec


def json_schema() -> dict[str, Any]:
    """The JSON Schema of definitions in YAML, where a sub-pipeline may be the name of another file."""
    schema = PipelineSpec.model_json_schema(by_alias=True)
    step = schema["$defs"]["Step"]
    step["properties"]["pipeline"]["anyOf"].append({"type": "string", "description": "another file, relative to this"})
    step["oneOf"] = [{"required": [kind]} for kind in KINDS]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@dataclass
class _Files:
    """Reads a file and what it names, and remembers what came from where."""

    lines: Lines = field(default_factory=dict)
    folders: dict[Where, Path] = field(default_factory=dict)
    _bytes: int = 0

    def read(self, path: Path, where: Where, around: tuple[Path, ...], named: Mark | None) -> dict[str, Any]:
        """The document in a file.

        Args:
            where: the part of the definition that the file is.
            around: the files that led to this one.
            named: the line that names the file.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidPipeline(f"{_told(named, where)}{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InvalidPipeline(f"{_told(named, where)}{path}: not UTF-8 text") from error
        self._bytes += len(text.encode())
        if around and self._bytes > MAX_BYTES:
            raise InvalidPipeline(f"{_told(named, where)}{path}: all files together are larger than {MAX_BYTES} bytes")
        document = _read(text, str(path), where, self.lines)
        self.folders[where] = path.resolve().parent
        self._include(document, where, path.parent, (*around, path.resolve()))
        return document

    def _include(self, document: dict[str, Any], where: Where, folder: Path, around: tuple[Path, ...]) -> None:
        for section in ("steps", "finally"):
            steps = document.get(section)
            for name, step in steps.items() if isinstance(steps, dict) else ():
                inner = step.get("pipeline") if isinstance(step, dict) else None
                place = (*where, section, name, "pipeline")
                if isinstance(inner, str):
                    step["pipeline"] = self._read_named(folder / inner, place, around)
                elif isinstance(inner, dict) and len(place) <= 3 * (MAX_DEPTH + 1):
                    self._include(inner, place, folder, around)

    def _read_named(self, path: Path, where: Where, around: tuple[Path, ...]) -> dict[str, Any]:
        named = self.lines[where]
        if path.resolve() in around:
            files = " → ".join(file.name for file in (*around[around.index(path.resolve()) :], path))
            raise InvalidPipeline(f"{_told(named, where)}the files name one another: {files}")
        if len(around) > MAX_DEPTH:
            raise InvalidPipeline(f"{_told(named, where)}sub-pipelines are nested more than {MAX_DEPTH} deep")
        return self.read(path, where, around, named)


def _told(named: Mark | None, where: Where) -> str:
    return "" if named is None else f"{named}: {'.'.join(map(str, where))}: "


def _read(text: str, source: str, where: Where, lines: Lines) -> dict[str, Any]:
    """The document in a text; its lines are added to ``lines``."""
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
    _collect_lines(node, where, source, lines)
    return document


def _nul_paths(value: object, path: Where) -> Iterator[Where]:
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


def _collect_lines(node: yaml.Node, path: Where, source: str, lines: Lines) -> None:
    lines[path] = Mark(source, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _collect_lines(value, (*path, key.value), source, lines)
            lines[(*path, key.value)] = Mark(source, key.start_mark.line + 1)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect_lines(value, (*path, index), source, lines)
