"""Where the parts of a definition stand in their files, and problems as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mlplat.pipelines.dag import Path, Problem


class Mark(NamedTuple):
    """A line of a file."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


#: The line of each part of a definition, by its path.
Lines = dict[Path, Mark]


def report(problems: Iterable[Problem], source: str, lines: Mapping[Path, Mark]) -> str:
    """One line per problem, each ``source:line: path: reason``; without the line where it is not known."""
    return "\n".join(
        f"{_place(problem.path, lines) or source}: {'.'.join(map(str, problem.path)) or 'pipeline'}: {problem.message}"
        for problem in problems
    )


def _place(path: Path, lines: Mapping[Path, Mark]) -> Mark | None:
    """The line of the part, else of the smallest part around it that has one."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)
