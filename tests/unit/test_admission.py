"""Which waiting run comes next, by example and held against the rules for random queues."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.pipelines.admission import AdmissionQueue, Candidate


def queue_of(capacity: int, *candidates: Candidate) -> AdmissionQueue:
    queue = AdmissionQueue(capacity)
    for candidate in candidates:
        queue.add(candidate)
    return queue


def taken(queue: AdmissionQueue) -> list[str]:
    found = []
    while (candidate := queue.take_next()) is not None:
        found.append(candidate.run_id)
    return found


def test_higher_priorities_come_first_then_older_runs() -> None:
    queue = queue_of(9, Candidate("a", 0, "ann"), Candidate("b", 5, "ann"), Candidate("c", 0, "ann"))
    queue.add(Candidate("d", 5, "ann"))
    assert taken(queue) == ["b", "d", "a", "c"]


def test_submitters_take_turns_however_much_each_has_submitted() -> None:
    queue = queue_of(
        6, *(Candidate(f"a{n}", 0, "ann") for n in range(100)), *(Candidate(f"b{n}", 0, "bob") for n in (0, 1))
    )
    assert taken(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_who_has_the_fewest_runs_under_way_comes_next() -> None:
    queue = queue_of(3, *(Candidate(f"a{n}", 0, "ann") for n in range(5)))
    assert taken(queue) == ["a0", "a1", "a2"]
    queue.add(Candidate("b0", 0, "bob"))
    queue.end("a0")
    assert taken(queue) == ["b0"]


def test_a_full_queue_waits_for_an_end() -> None:
    queue = queue_of(1, Candidate("a", 0, ""), Candidate("b", 0, ""))
    assert (taken(queue), len(queue)) == (["a"], 1)
    assert queue.end("a")
    assert not queue.end("a")
    assert (taken(queue), len(queue)) == (["b"], 0)


def test_a_run_whose_key_is_full_lets_others_pass() -> None:
    queue = queue_of(9, *(Candidate(f"a{n}", 0, "", "key", 2) for n in range(4)), Candidate("b", -5, ""))
    assert taken(queue) == ["a0", "a1", "b"]
    assert queue.holders("key") == ["a0", "a1"]
    queue.end("a1")
    assert taken(queue) == ["a2"]


def test_of_those_that_wait_for_a_key_the_most_important_comes_first() -> None:
    queue = queue_of(9, Candidate("a", 0, "", "key"), Candidate("b", 0, "", "key"), Candidate("c", 5, "x", "key"))
    assert taken(queue) == ["c"]
    queue.end("c")
    assert taken(queue) == ["a"]
    queue.add(Candidate("d", 9, "", "key"))
    assert taken(queue) == []
    queue.end("a")
    assert taken(queue) == ["d"]


def test_a_run_that_ended_while_it_waited_leaves_its_key_to_another() -> None:
    queue = queue_of(9, *(Candidate(name, 0, name, "key") for name in "abc"))
    assert taken(queue) == ["a"]
    queue.end("a")
    queue.end("b")  # whose turn it would be
    assert taken(queue) == ["c"]


def test_a_run_is_known_once() -> None:
    queue = queue_of(9, Candidate("a", 0, ""), Candidate("a", 0, ""))
    assert taken(queue) == ["a"]
    queue.add(Candidate("a", 0, ""))
    queue.start(Candidate("a", 0, ""))
    assert (taken(queue), len(queue), list(queue.active)) == ([], 0, ["a"])
    queue.end("a")
    queue.add(Candidate("a", 0, ""))
    assert taken(queue) == ["a"]


class Rules:
    """The same queue, looked at as a whole."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.waiting: list[Candidate] = []
        self.active: list[Candidate] = []

    def fitting(self) -> list[Candidate]:
        """Those that may start, oldest first."""
        if len(self.active) >= self.capacity:
            return []
        held = Counter(candidate.key for candidate in self.active)
        return [c for c in self.waiting if c.key is None or held[c.key] < c.limit]

    def check(self, found: Candidate | None) -> None:
        fitting = self.fitting()
        if found is None:
            assert fitting == [], "something fits, and nothing starts"
            return
        assert found in fitting
        assert found.priority == max(candidate.priority for candidate in fitting)
        running = Counter(candidate.submitter for candidate in self.active)
        # A run with a key may have waited for that, and comes back before its turn or after.
        rivals = [c for c in fitting if c.priority == found.priority and c.key is None]
        assert found.key is not None or running[found.submitter] == min(
            running[candidate.submitter] for candidate in rivals
        )
        own = [candidate for candidate in rivals if candidate.submitter == found.submitter]
        assert found.key is not None or found == own[0]
        self.waiting.remove(found)
        self.active.append(found)


LIMITS = {None: 1, "x": 1, "y": 2, "z": 3}
candidates = st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.sampled_from(list(LIMITS)))
events = st.lists(st.one_of(candidates, st.sampled_from(["take", "take", "end", "drop", "start"])), max_size=80)


@settings(deadline=None, max_examples=500)
@given(st.integers(1, 5), events)
def test_a_queue_keeps_its_rules(capacity: int, happened: list[object]) -> None:
    queue, rules = AdmissionQueue(capacity), Rules(capacity)
    for number, event in enumerate(happened):
        pick = number * 7919
        if isinstance(event, tuple):
            priority, submitter, key = event
            candidate = Candidate(f"r{number}", priority, submitter, key, LIMITS[key])
            queue.add(candidate)
            rules.waiting.append(candidate)
        elif event == "take":
            rules.check(queue.take_next())
        elif event == "end" and rules.active:
            assert queue.end(rules.active.pop(pick % len(rules.active)).run_id)
        elif event == "drop" and rules.waiting:
            assert queue.end(rules.waiting.pop(pick % len(rules.waiting)).run_id)
        elif event == "start" and rules.waiting:  # by somebody else
            candidate = rules.waiting.pop(pick % len(rules.waiting))
            queue.start(candidate)
            rules.active.append(candidate)
        assert len(queue) == len(rules.waiting)
        assert list(queue.active) == [candidate.run_id for candidate in rules.active]
    while rules.waiting:
        found = queue.take_next()
        rules.check(found)
        if found is None:
            assert rules.active, "the rest never starts"
            queue.end(rules.active.pop(0).run_id)
    assert taken(queue) == []
