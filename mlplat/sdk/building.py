"""The pipeline that is being defined, while its function runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlplat.errors import InvalidInput, InvalidPipeline
from mlplat.pipelines.expressions import references
from mlplat.pipelines.locations import Lines, Mark
from mlplat.sdk.placeholders import Placeholder, as_template
from mlplat.sdk.shipping import Shipper

_HERE = str(Path(__file__).resolve().parent)


@dataclass
class Builder:
    """Collects the steps of one pipeline.

    Args:
        shipper: how the code of steps gets to the workers.
        around: the pipelines that this one is a part of, the outermost first, and itself.
    """

    shipper: Shipper
    around: tuple[object, ...]
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    finally_: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: Lines = field(default_factory=dict)
    in_finally: bool = False
    #: Sub-pipelines whose only output has no name of its own.
    single: set[object] = field(default_factory=set)
    _latest: dict[object, str] = field(default_factory=dict)

    def add(
        self,
        origin: object,
        name: str,
        entry: Mapping[str, Any],
        arguments: Mapping[str, Any],
        needs: Sequence[object],
    ) -> str:
        """Adds a step and returns its name, which has a number when ``name`` is taken.

        Args:
            origin: what was called; ``after(origin)`` finds this step.
            entry: the step's other fields; what is None is left out.
        """
        unique, count = name, 1
        while unique in self.steps or unique in self.finally_:
            count += 1
            unique = f"{name}_{count}"
        fields = {key: value for key, value in entry.items() if value is not None}
        if arguments:
            fields["with"] = {key: as_template(value) for key, value in arguments.items()}
        if needs:
            fields["needs"] = list(dict.fromkeys(found for other in needs for found in self._steps_of(other)))
        section = self.finally_ if self.in_finally else self.steps
        section[unique] = fields
        self._latest[origin] = unique
        self.lines["finally" if self.in_finally else "steps", unique] = _users_line()
        return unique

    def latest(self, origin: object) -> str | None:
        """The step that was added last for what was called."""
        return self._latest.get(origin)

    def _steps_of(self, other: object) -> list[str]:
        """The steps that something stands for: an output, a step's name, or what was called."""
        if isinstance(other, str):
            return [other]
        if isinstance(other, Placeholder):
            try:
                read = sorted(path[1] for path in references(other.expression) if path[0] == "steps")
            except InvalidInput as error:
                raise InvalidPipeline(f"{other.expression}: {error.message}") from error
            if not read:
                raise InvalidPipeline(f"{other.expression} is no step's output, so nothing can come after it")
            return read
        name = self.latest(getattr(other, "origin", other))
        if name is None:
            what = getattr(other, "name", None) or type(other).__name__
            raise InvalidPipeline(f"{what} is no step of this pipeline, so nothing can come after it; call it first")
        return [name]


_building: ContextVar[Builder | None] = ContextVar("mlplat_building", default=None)


def current_builder() -> Builder | None:
    """The pipeline that is being defined, if any."""
    return _building.get()


@contextmanager
def building(builder: Builder | None) -> Iterator[None]:
    """Steps that are called in the block are added to the builder; with None they run."""
    token = _building.set(builder)
    try:
        yield
    finally:
        _building.reset(token)


@contextmanager
def finally_() -> Iterator[None]:
    """Steps that are called in the block run when all others are over, however they ended.

    Outside of a pipeline the block simply runs.

    Raises:
        InvalidPipeline: inside of another such block.
    """
    builder = current_builder()
    if builder is None:
        yield
        return
    if builder.in_finally:
        raise InvalidPipeline("finally_ inside finally_: put these steps into one block")
    builder.in_finally = True
    try:
        yield
    finally:
        builder.in_finally = False


def _users_line() -> Mark:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return Mark(frame.f_code.co_filename, frame.f_lineno)
