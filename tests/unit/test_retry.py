"""The waits between attempts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.pipelines.retry import backoff_s
from mlplat.pipelines.spec import Retry

policies = st.builds(
    Retry,
    max_attempts=st.integers(1, 100),
    initial_s=st.floats(0, 86_400),
    factor=st.floats(1, 10),
    cap_s=st.floats(0, 86_400),
    jitter=st.floats(0, 1),
)


def test_one_attempt_means_no_retry() -> None:
    assert backoff_s(Retry(max_attempts=1), 1, "seed") is None


def test_the_last_failure_gives_none_and_the_one_before_a_wait() -> None:
    policy = Retry(max_attempts=3, jitter=0)
    assert [backoff_s(policy, failures, "seed") for failures in (1, 2, 3, 4)] == [1.0, 2.0, None, None]


def test_waits_grow_by_the_factor_up_to_the_cap() -> None:
    policy = Retry(max_attempts=9, initial_s=0.5, factor=3, cap_s=10, jitter=0)
    assert [backoff_s(policy, failures, "s") for failures in range(1, 6)] == [0.5, 1.5, 4.5, 10.0, 10.0]


def test_jitter_only_shortens_and_depends_on_seed_and_failure() -> None:
    policy = Retry(max_attempts=50, initial_s=8, factor=1, jitter=0.5)
    waits = [backoff_s(policy, failures, seed) for seed in ("a", "b") for failures in range(1, 21)]
    assert all(wait is not None and 4 <= wait <= 8 for wait in waits)
    assert len(set(waits)) == len(waits)


@settings(deadline=None, max_examples=100)
@given(policies, st.integers(1, 120), st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_wait_is_repeatable_and_within_bounds(policy: Retry, failures: int, seed: str) -> None:
    wait = backoff_s(policy, failures, seed)
    assert wait == backoff_s(policy, failures, seed)
    if failures >= policy.max_attempts:
        assert wait is None
    else:
        assert wait is not None
        full = min(policy.cap_s, policy.initial_s * policy.factor ** (failures - 1))
        assert full * (1 - policy.jitter) <= wait * (1 + 1e-9) + 1e-9
        assert wait <= full


@pytest.mark.parametrize("jitter", [0.0, 0.3, 1.0])
def test_an_initial_wait_of_zero_never_waits(jitter: float) -> None:
    policy = Retry(max_attempts=100, initial_s=0, jitter=jitter)
    assert {backoff_s(policy, failures, "s") for failures in range(1, 100)} == {0.0}
