"""When a failed step is tried again."""

from __future__ import annotations

import hashlib
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


def backoff_s(policy: RetryLike, failures: int, seed: str) -> float | None:
    """Seconds to wait after the ``failures``-th failure, or None when the attempts are used up.

    The random part is derived from ``seed``, so that planning the same state twice gives the same time.
    """
    if failures >= policy.max_attempts:
        return None
    wait = min(policy.cap_s, policy.initial_s * policy.factor ** (failures - 1))
    fraction = int.from_bytes(hashlib.sha256(f"{seed}/{failures}".encode()).digest()[:8]) / 2**64
    return wait * (1 - policy.jitter * fraction)
