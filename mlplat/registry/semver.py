"""Semantic versions (semver.org, three numbers) and ranges of them, as npm writes ranges. Pure.

A range is half open, so that Postgres finds the versions in it by comparing arrays; libraries for ranges only say
whether a given version is inside.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple

from mlplat.errors import InvalidInput

#: Each number, so that it fits into Postgres' integer with its successor.
MAX_NUMBER = 2**31 - 2
MAX_RANGE_LENGTH = 200
_NUMBER = r"(?:0|[1-9]\d{0,9})"
_EXACT = re.compile(rf"({_NUMBER})\.({_NUMBER})\.({_NUMBER})\Z", re.ASCII)
_PART = re.compile(
    rf"(?P<operator>\^|~|>=|<=|>|<|=)?\s*(?P<major>{_NUMBER}|[xX*])(?:\.(?P<minor>{_NUMBER}|[xX*]))?"
    rf"(?:\.(?P<patch>{_NUMBER}|[xX*]))?(?:\s*,\s*|\s+|\Z)",
    re.ASCII,
)


class SemanticVersion(NamedTuple):
    """In the order of precedence."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return ".".join(map(str, self))


class Bump(StrEnum):
    """Which number grows."""

    MAJOR = "major"
    MINOR = "minor"
    PATCH = "patch"


class VersionRange(NamedTuple):
    """From ``lower`` up to, and without, ``upper``."""

    lower: SemanticVersion
    upper: SemanticVersion


FIRST = SemanticVersion(1, 0, 0)
EVERY = VersionRange(SemanticVersion(0, 0, 0), SemanticVersion(MAX_NUMBER + 1, 0, 0))


def bumped(version: SemanticVersion, bump: Bump) -> SemanticVersion:
    """The version that follows.

    Raises:
        InvalidInput: there is no higher number.
    """
    major, minor, patch = version
    match bump:
        case Bump.MAJOR:
            following = SemanticVersion(major + 1, 0, 0)
        case Bump.MINOR:
            following = SemanticVersion(major, minor + 1, 0)
        case Bump.PATCH:
            following = SemanticVersion(major, minor, patch + 1)
    if max(following) > MAX_NUMBER:
        raise InvalidInput(f"after {version} there is no higher {bump} number; give a semantic version")
    return following


def parse_semantic_version(text: str) -> SemanticVersion:
    """A version such as ``1.2.0``.

    Raises:
        InvalidInput: it is none, or a number in it is too large.
    """
    found = _EXACT.match(text)
    if found is None or max(numbers := tuple(map(int, found.groups()))) > MAX_NUMBER:
        raise InvalidInput(
            f"Invalid semantic version: '{text[:50]}'. Expected three numbers up to {MAX_NUMBER}, such as 1.2.0."
        )
    return SemanticVersion(*numbers)


def is_range(text: str) -> bool:
    """Whether a text looks like a range, well-formed or not, rather than like a name or a counting number."""
    return bool(re.match(r"\s*([\^~<>=*]|\d)", text, re.ASCII)) and not text.isdecimal()


def parse_range(text: str) -> VersionRange:
    """A range: ``^1.2``, ``~1.2.3``, ``1.x``, ``1.2``, ``1.2.3``, ``>=1.2 <3``, ``*``.

    Raises:
        InvalidInput: malformed, or nothing can be in it.
    """
    found, at = EVERY, 0
    stripped = text.strip()
    while at < len(stripped) or not stripped:
        part = _PART.match(stripped, at) if len(stripped) <= MAX_RANGE_LENGTH else None
        if part is None:
            raise InvalidInput(
                f"Invalid version range: '{text[:100]}'. Expected for instance ^1.2, ~1.2.3, 1.x or >=1.2 <3."
            )
        found = _intersection(found, _interval(part["operator"] or "=", _numbers(part, text)))
        at = part.end()
    if found.lower >= found.upper:
        raise InvalidInput(f"Invalid version range: '{text[:100]}'. No version can be in it.")
    return found


def _numbers(part: re.Match[str], text: str) -> list[int]:
    """The numbers up to the first that is left open."""
    numbers = list[int]()
    for name in ("major", "minor", "patch"):
        if part[name] is None or part[name] in "xX*":
            break
        numbers.append(int(part[name]))
    if numbers and max(numbers) > MAX_NUMBER:
        raise InvalidInput(f"Invalid version range: '{text[:100]}'. Numbers go up to {MAX_NUMBER}.")
    return numbers


def _interval(operator: str, numbers: list[int]) -> VersionRange:
    if not numbers:
        return EVERY if operator not in {"<", ">"} else VersionRange(EVERY.upper, EVERY.upper)
    lower, upper = _fill(numbers), _after(numbers)
    intervals = {
        "=": (lower, upper),
        ">=": (lower, EVERY.upper),
        ">": (upper, EVERY.upper),
        "<": (EVERY.lower, lower),
        "<=": (EVERY.lower, upper),
        "~": (lower, _after(numbers[:2])),
        "^": (lower, _after(numbers[: _first_that_counts(numbers)])),
    }
    return VersionRange(*intervals[operator])


def _first_that_counts(numbers: list[int]) -> int:
    """How many numbers up to the first that is not zero: changing that one breaks callers."""
    return next((place for place, number in enumerate(numbers, 1) if number), len(numbers))


def _fill(numbers: list[int]) -> SemanticVersion:
    return SemanticVersion(*numbers, *[0] * (3 - len(numbers)))


def _after(numbers: list[int]) -> SemanticVersion:
    return _fill([*numbers[:-1], numbers[-1] + 1])


def _intersection(one: VersionRange, other: VersionRange) -> VersionRange:
    return VersionRange(max(one.lower, other.lower), min(one.upper, other.upper))
