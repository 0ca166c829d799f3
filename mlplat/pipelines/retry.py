"""When a failed step is tried again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol


class RetryLike(Protocol):
    """A retry policy."""

    @property
    def max_attempts(self) -> int:
        """Attempts in all, the first included."""
        ...

    @property
    def initial_s(self) -> float:
        """Wait before the second attempt."""
        ...

    @property
    def factor(self) -> float:
        """Growth of the wait from one attempt to the next."""
        ...

    @property
    def cap_s(self) -> float:
        """Longest wait."""
        ...

    @property
    def jitter(self) -> float:
        """Fraction of the wait that is random."""
        ...

    @property
    def on(self) -> list[str]:
        """Exceptions that are worth another attempt; empty: all are."""
        ...

    @property
    def never_on(self) -> list[str]:
        """Exceptions that are not."""
        ...


def is_worth_retrying(policy: RetryLike, error_types: Sequence[str]) -> bool:
    """Whether the policy covers an exception, given its class and bases as ``module.Class``.

    An attempt that ended without an exception, such as a dead process, has no types: only a filter that asks for
    some leaves it out.
    """
    if any(_names(pattern, error_types) for pattern in policy.never_on):
        return False
    return not policy.on or any(_names(pattern, error_types) for pattern in policy.on)


def _names(pattern: str, error_types: Sequence[str]) -> bool:
    return any(name == pattern or name.rpartition(".")[2] == pattern for name in error_types)


def backoff_s(policy: RetryLike, failures: int, seed: str) -> float | None:
    """Seconds to wait after the ``failures``-th failure, or None when the attempts are used up.

    The random part is derived from ``seed``, so that planning the same state twice gives the same time.
    """
    if failures >= policy.max_attempts:
        return None
    wait = min(policy.cap_s, policy.initial_s * policy.factor ** (failures - 1))
    fraction = int.from_bytes(hashlib.sha256(f"{seed}/{failures}".encode()).digest()[:8]) / 2**64
    return wait * (1 - policy.jitter * fraction)
