"""How a model's version differs from the one before, and which number of its semantic version grows for that. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from mlplat.registry.semver import Bump
from mlplat.registry.signature import Signature, incompatibilities

MAX_REASON_LENGTH = 500
_MOST_SHOWN = 3


@dataclass(frozen=True)
class Facts:
    """What is known of a version; None: nothing.

    Args:
        signature: what it takes and gives.
        commit: the code that trained it.
        dirty: whether that code had changes that were not committed.
        entry_point: the file that was started.
        data: each dataset that it was trained with, as name and digest, sorted.
        run_id: the run that it comes from; two versions of one run do not differ for that.
    """

    signature: Signature | None = None
    commit: str | None = None
    dirty: bool = False
    entry_point: str | None = None
    data: tuple[str, ...] | None = None
    run_id: str | None = None


UNKNOWN = Facts()


def facts_from_json(value: dict[str, Any]) -> Facts:
    """Facts as ``facts_to_json`` wrote them."""
    data = value.get("data")
    return Facts(**{**value, "data": None if data is None else tuple(data)})


def facts_to_json(facts: Facts) -> dict[str, Any]:
    """What is known, for JSON."""
    return {key: value for key, value in asdict(facts).items() if value not in (None, False)}


def derive_bump(before: Facts, after: Facts) -> tuple[Bump, str]:
    """Which number grows, and why.

    Callers of the one before cannot go on: major. Other data, other code or a signature that grew: minor. Nothing of
    that is known: it was trained again, patch.
    """
    broken = list(islice(_breaks(before, after), _MOST_SHOWN + 1))
    if broken:
        return Bump.MAJOR, _told(broken)
    changed = list(_changes(before, after))
    if changed:
        return Bump.MINOR, _told(changed)
    return Bump.PATCH, "no other signature, data or code is known"


def _breaks(before: Facts, after: Facts) -> Iterator[str]:
    if before.signature is not None:
        if after.signature is None:
            yield "it has no signature any more"
        else:
            yield from incompatibilities(before.signature, after.signature)


def _changes(before: Facts, after: Facts) -> Iterator[str]:
    if before.signature != after.signature:
        yield "the signature changed so that callers can go on"
    if None not in (before.data, after.data) and before.data != after.data:
        yield "other data"
    if None not in (before.commit, after.commit):
        if before.commit != after.commit:
            yield f"other code: commit {before.commit} became {after.commit}"
        elif before.dirty or after.dirty:
            yield "the code had changes that were not committed"
    if None not in (before.entry_point, after.entry_point) and before.entry_point != after.entry_point:
        yield f"another entry point: {before.entry_point} became {after.entry_point}"


def _told(reasons: list[str]) -> str:
    more = ["…"] if len(reasons) > _MOST_SHOWN else []
    return "; ".join([*reasons[:_MOST_SHOWN], *more])[:MAX_REASON_LENGTH]
