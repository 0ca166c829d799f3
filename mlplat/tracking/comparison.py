"""Runs side by side: aligning what they have by key, and telling what differs. Nothing here does I/O."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mlplat.tracking.inputs import DATASET_CONTEXT_TAG, DatasetInput

JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"

MAX_FACTS = 20_000
MAX_DEPTH = 8
#: Finding what two texts share takes time that grows faster than they do.
MAX_DIFF_LINES = 10_000
MAX_DIFF_CHARACTERS = 256 * 1024
#: What says when the facts were written down, not what they are.
_NOT_FACTS = frozenset({"format", "captured_at"})
_REQUIREMENT = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s;#]+)", re.MULTILINE | re.ASCII)


@dataclass(frozen=True)
class Row:
    """One key over all runs: ``values`` has one value per run, None where a run has none."""

    key: str
    differs: bool
    values: list[JsonValue]


@dataclass(frozen=True)
class Code:
    """The code that a run ran: its commit, and the changes that were not committed, as a diff.

    ``changes`` is empty when there were none, None when that is not known or they are ``too_many`` to read.
    """

    commit: str | None = None
    changes: str | None = None
    too_many: bool = False

    @property
    def known(self) -> bool:
        """Whether anything is."""
        return self.commit is not None or self.changes is not None or self.too_many


@dataclass(frozen=True)
class CodeDiff:
    """The code of a run against that of the base run.

    ``diff`` is a unified diff of their uncommitted changes: empty when these are equal, None when it cannot be told.
    ``note`` says why not, or that the diff was cut.
    """

    run_id: str
    base_commit: str | None
    commit: str | None
    differs: bool
    diff: str | None
    note: str | None = None


@dataclass(frozen=True)
class RunFacts:
    """What a run's process wrote down about itself; ``environment`` maps flat keys to JSON values."""

    environment: Mapping[str, JsonValue] = field(default_factory=dict)
    code: Code = Code()


def align(
    columns: Sequence[Mapping[str, JsonValue]], judged: Callable[[JsonValue], object] = lambda value: value
) -> list[Row]:
    """One row per key that any run has, by key.

    Args:
        columns: what each run has, by key. A value of None counts as missing.
        judged: the part of a value by which two values are equal or not.
    """
    keys = {key for column in columns for key, value in column.items() if value is not None}
    return [_row(key, [column.get(key) for column in columns], judged) for key in sorted(keys)]


def differences(rows: Sequence[Row]) -> list[Row]:
    """The rows in which the runs differ; a run that lacks a value differs from those that have one."""
    return [row for row in rows if row.differs]


def uses_by_name(inputs: Sequence[DatasetInput]) -> dict[str, JsonValue]:
    """The datasets that went into a run: by name the ``digest`` and ``context`` (may be None) of each use.

    In one order, whatever the order in which they were logged: it is no difference.
    """
    ordered = sorted(inputs, key=lambda one: (one.tags.get(DATASET_CONTEXT_TAG, ""), one.dataset.digest))
    found: dict[str, list[JsonValue]] = {}
    for one in ordered:
        use: JsonValue = {"digest": one.dataset.digest, "context": one.tags.get(DATASET_CONTEXT_TAG)}
        found.setdefault(one.dataset.name, []).append(use)
    return dict(found)


def flatten(document: JsonValue) -> dict[str, JsonValue]:
    """A document's leaves by their path, as in ``packages.numpy``; lists are leaves.

    What is nested too deeply, and what comes after ``MAX_FACTS`` leaves, is left out.
    """
    flat: dict[str, JsonValue] = {}

    def visit(path: str, value: JsonValue, depth: int) -> None:
        if isinstance(value, dict):
            for key, inner in value.items() if depth < MAX_DEPTH else ():
                visit(f"{path}.{key}" if path else key, inner, depth + 1)
        elif value is not None and path and path not in _NOT_FACTS and len(flat) < MAX_FACTS:
            flat[path] = value

    visit("", document, 0)
    return flat


def packages(requirements: str) -> dict[str, JsonValue]:
    """The pinned packages of a requirements file, as ``flatten`` names them."""
    return {f"packages.{name}": version for name, version in _REQUIREMENT.findall(requirements)}


def compare_code(base_id: str, base: Code, run_id: str, other: Code) -> CodeDiff:
    """What the code of run ``run_id`` has different from that of run ``base_id``."""
    changed, diff, note = _changes(base_id, base, run_id, other)
    return CodeDiff(run_id, base.commit, other.commit, changed or base.commit != other.commit, diff, note)


def _changes(base_id: str, base: Code, run_id: str, other: Code) -> tuple[bool, str | None, str | None]:
    """Whether the uncommitted changes differ, how, and what there is to say to that."""
    if base.too_many or other.too_many:
        return True, None, "the uncommitted changes are too large to compare"
    if base.changes is None or other.changes is None:
        one_has_them = base.changes is not other.changes
        who = "only one of the two runs has" if one_has_them else "neither of the two runs has"
        return one_has_them, None, f"{who} its uncommitted changes on record"
    if base.changes == other.changes:
        return False, "", None
    before, after = base.changes.splitlines(), other.changes.splitlines()
    if max(len(before), len(after)) > MAX_DIFF_LINES:
        return True, None, f"the uncommitted changes have more than {MAX_DIFF_LINES} lines"
    diff = "\n".join(difflib.unified_diff(before, after, base_id, run_id, lineterm=""))
    if len(diff) > MAX_DIFF_CHARACTERS:
        return True, diff[:MAX_DIFF_CHARACTERS], f"cut after {MAX_DIFF_CHARACTERS} characters"
    return True, diff, None


def _row(key: str, values: list[JsonValue], judged: Callable[[JsonValue], object]) -> Row:
    if any(value is None for value in values):
        return Row(key, True, values)
    first = judged(values[0])
    return Row(key, any(judged(value) != first for value in values[1:]), values)
