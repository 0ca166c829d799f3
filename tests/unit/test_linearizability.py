"""The checker of histories: against brute force, and on defects that it must find."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.linearizability import UNKNOWN, Operation, is_linearizable


def register(state: int, operation: Operation) -> int | None:
    """A number that is read, written, and compared and set."""
    known = operation.returned != UNKNOWN
    match operation.what, operation.arguments:
        case "read", ():
            return state if not known or operation.result == state else None
        case "write", (value,):
            return int(value)
        case "cas", (expected, value):
            if known and operation.result != (state == expected):
                return None
            return int(value) if state == expected else state
    raise AssertionError(operation)


def brute_force(history: Sequence[Operation]) -> bool:
    """Tries every order of every choice of the operations that are unknown."""
    known = [operation for operation in history if operation.returned != UNKNOWN]
    unknown = [operation for operation in history if operation.returned == UNKNOWN]
    for choice in range(2 ** len(unknown)):
        chosen = known + [operation for number, operation in enumerate(unknown) if choice >> number & 1]
        if any(_explains(order) for order in permutations(chosen)):
            return True
    return False


def _explains(order: Sequence[Operation]) -> bool:
    state: int | None = 0
    for number, operation in enumerate(order):
        if any(later.returned < operation.called for later in order[number + 1 :]):
            return False
        assert state is not None
        state = register(state, operation)
        if state is None:
            return False
    return True


_VALUES = st.integers(0, 2)
_CALLS = st.one_of(
    st.tuples(st.just("read"), st.just(()), _VALUES),
    st.tuples(st.just("write"), st.tuples(_VALUES), st.none()),
    st.tuples(st.just("cas"), st.tuples(_VALUES, _VALUES), st.booleans()),
)
_TIMES = st.tuples(st.integers(0, 9), st.integers(1, 5) | st.just(UNKNOWN))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(_CALLS, _TIMES), max_size=5))
def test_it_says_what_brute_force_says(
    calls: list[tuple[tuple[str, tuple[int, ...], object], tuple[int, float]]],
) -> None:
    history = [
        Operation(what, arguments, called + number / 100, called + number / 100 + lasted, result)
        for number, ((what, arguments, result), (called, lasted)) in enumerate(calls)
    ]
    assert is_linearizable(history, register, 0) == brute_force(history)


def test_a_stale_read_is_found() -> None:
    history = [Operation("write", (1,), 0, 1), Operation("read", (), 2, 3, result=0)]
    assert not is_linearizable(history, register, 0)
    during = [Operation("write", (1,), 0, 4), Operation("read", (), 2, 3, result=0)]
    assert is_linearizable(during, register, 0)


def test_a_lost_update_is_found() -> None:
    both = [Operation("cas", (0, value), 0, 2, result=True) for value in (1, 2)]
    assert not is_linearizable(both, register, 0)
    assert is_linearizable([both[0], Operation("cas", (0, 2), 0, 2, result=False)], register, 0)


def test_what_is_unknown_may_have_happened_late_or_never() -> None:
    lost = Operation("write", (1,), 0, UNKNOWN)
    for results in ([0, 0], [0, 1], [1, 1]):
        reads = [Operation("read", (), 10 * n, 10 * n + 1, result=result) for n, result in enumerate(results, 1)]
        assert is_linearizable([lost, *reads], register, 0)
    reads = [Operation("read", (), 10 * n, 10 * n + 1, result=result) for n, result in enumerate([1, 0], 1)]
    assert not is_linearizable([lost, *reads], register, 0)


class Register:
    """A real one that threads use; ``broken`` forgets that its compare-and-set has to be one step."""

    def __init__(self, *, broken: bool) -> None:
        self._value = 0
        self._lock = threading.Lock()
        self._broken = broken

    def cas(self, expected: int, value: int) -> bool:
        """Sets the value if it is the expected one."""
        if self._broken:
            if self._value != expected:
                return False
            time.sleep(0.0005)
            self._value = value
            return True
        with self._lock:
            if self._value != expected:
                return False
            self._value = value
            return True

    def read(self) -> int:
        """The value."""
        return self._value


def _use(register_: Register, seed: int, history: list[Operation]) -> None:
    dice = random.Random(seed)
    for _ in range(200):
        called = time.monotonic()
        if dice.random() < 0.5:
            result: object = register_.read()
            history.append(Operation("read", (), called, time.monotonic(), result))
        else:
            arguments = (register_.read(), dice.randrange(4))
            called = time.monotonic()
            result = register_.cas(*arguments)
            history.append(Operation("cas", arguments, called, time.monotonic(), result))


def _history_of(register_: Register) -> list[Operation]:
    history: list[Operation] = []
    threads = [threading.Thread(target=_use, args=(register_, seed, history)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return history


def test_long_histories_of_threads_are_judged() -> None:
    assert is_linearizable(_history_of(Register(broken=False)), register, 0)
    assert not is_linearizable(_history_of(Register(broken=True)), register, 0)
