"""Where the parts of a definition stand in their files, and problems as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

from mlplat.pipelines.dag import Path, Problem

#: Problems that are told of one definition, and how much of each: what comes in may be long, and is told back.
MAX_PROBLEMS = 100
MAX_REASON = 1_000
MAX_NAME = 100
MAX_PARTS = 40


class Mark(NamedTuple):
    """A line of a file."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


#: The line of each part of a definition, by its path.
Lines = dict[Path, Mark]


def report(problems: Iterable[Problem], source: str, lines: Mapping[Path, Mark]) -> str:
    """One line per problem, each ``source:line: path: reason``; without the line where it is not known.

    Of many problems the first ``MAX_PROBLEMS``, and a line which says that there are more.
    """
    told = list(islice(problems, MAX_PROBLEMS + 1))
    texts = [
        f"{_place(problem.path, lines) or source}: {_told(problem.path)}: {one_line(problem.message, MAX_REASON)}"
        for problem in told[:MAX_PROBLEMS]
    ]
    return "\n".join([*texts, f"{source}: pipeline: there are more problems"] if len(told) > MAX_PROBLEMS else texts)


def one_line(text: str, limit: int) -> str:
    """The text as a part of a line: what breaks lines or cannot be seen is escaped, and the middle may be left out."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _told(path: Path) -> str:
    names = [one_line(str(part), MAX_NAME) if str(part).strip() else repr(part) for part in path]
    if len(names) > MAX_PARTS:
        names = [*names[: MAX_PARTS // 2], "…", *names[-MAX_PARTS // 2 :]]
    return ".".join(names) or "pipeline"


def _place(path: Path, lines: Mapping[Path, Mark]) -> Mark | None:
    """The line of the part, else of the smallest part around it that has one."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)
