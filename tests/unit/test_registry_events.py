"""Events of the registry: what is told of them, who wants them, and how far somebody has read."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplat.db.snapshots import Snapshot
from mlplat.errors import InvalidInput
from mlplat.events.model import KINDS, Cursor, EventFilter, RegistryEvent, describe, parse_kinds, steps


def event(event_id: int = 1, transaction: int = 10, kind: str = "SetAlias", model: str = "m", **fields: object) -> (
    RegistryEvent
):  # fmt: skip
    body = describe(event_id, kind, model, "2026-01-05T09:00:00+00:00", "ann", "why", fields)
    return RegistryEvent(event_id, transaction, 1, body)


def test_an_event_has_the_fields_of_its_command_and_answer() -> None:
    found = event(7, name="m", alias="champion", version=2)
    assert found.body == {
        "id": 7, "kind": "alias_set", "model": "m", "alias": "champion", "version": 2, "by": "ann", "reason": "why",
        "at": "2026-01-05T09:00:00+00:00",
    }  # fmt: skip


def test_no_field_of_a_command_hides_what_all_events_have() -> None:
    fields = {"id": 1, "kind": "x", "model": "other", "by": "eve", "reason": "x", "at": "y", "comment": "z"}
    assert describe(7, "Unheard", "m", "then", "ann", "why", fields) == {
        "id": 7, "kind": "Unheard", "model": "m", "by": "ann", "reason": "why", "at": "then", "comment": "z",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "accepted"),
    [
        (EventFilter(), True),
        (EventFilter(frozenset({"model_renamed"})), True),
        (EventFilter(frozenset({"alias_set"})), False),
        (EventFilter(model="old"), True),
        (EventFilter(model="new*"), True),
        (EventFilter(model="other"), False),
        (EventFilter(model="OLD"), False),
    ],
)
def test_a_filter_knows_both_names_of_a_renamed_model(wanted: EventFilter, accepted: bool) -> None:
    assert wanted.accepts(event(kind="RenameModel", model="old", new_name="new [1]")) is accepted


def test_a_name_that_looks_like_a_pattern_is_itself() -> None:
    assert EventFilter(model="new [1]").accepts(event(model="new [1]"))


def test_kinds_are_known() -> None:
    assert parse_kinds([]) == parse_kinds(["*", "alias_set"]) == frozenset()
    assert parse_kinds(["alias_set", "stage_set"]) == {"alias_set", "stage_set"} <= KINDS
    with pytest.raises(InvalidInput, match="no such kind of event: alias_moved; there are alias_deleted, alias_set"):
        parse_kinds(["alias_moved"])


snapshots = st.builds(
    lambda end, open_: Snapshot(end, frozenset(number for number in open_ if number < end)),
    st.integers(3, 40), st.frozensets(st.integers(3, 40)),
)  # fmt: skip


@given(snapshots, snapshots)
def test_a_union_sees_what_either_sees(one: Snapshot, other: Snapshot) -> None:
    both = one | other
    for number in range(1, 50):
        assert both.sees(number) == (one.sees(number) or other.sees(number))
    assert all(number < both.end for number in both.open)


@given(snapshots, st.lists(st.tuples(st.integers(1, 2**62), st.integers(1, 2**62)), max_size=5))
def test_a_cursor_is_read_as_it_was_written(seen: Snapshot, parts: list[tuple[int, int]]) -> None:
    cursor = Cursor(seen, tuple(parts))
    assert Cursor.parse(str(cursor)) == cursor


def _text(inner: str) -> str:
    return base64.urlsafe_b64encode(inner.encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        "", "5", "x" * 9_000, "é", "!!!", _text("1|3:5:"), _text("2|3:5:|"), _text("1|3:5|"), _text("1|3:5:7|"),
        _text("1|3:5:-1|"), _text("1|0:0:|"), _text(f"1|3:{2**63}:|"), _text("1|3:5:|7"), _text("1|3:5:|a.b"),
        _text(f"1|3:5:|{'9.1,' * 101}"), _text("1|3:5:|1.2.3"), _text("é|3:5:|"),
    ],
)  # fmt: skip
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="expected a cursor"):
        Cursor.parse(text)


@dataclass
class Log:
    """Transactions that begin in order and end in any, with events whose numbers are taken meanwhile."""

    open: dict[int, list[int]] = field(default_factory=dict)
    committed: dict[int, list[int]] = field(default_factory=dict)
    next_transaction: int = 3
    next_event: int = 1

    def do(self, what: int, which: int) -> None:
        """Something happens: a transaction begins, adds an event, or ends."""
        if what == 0 or not self.open:
            self.open[self.next_transaction] = []
            self.next_transaction += 1
            return
        transaction = list(self.open)[which % len(self.open)]
        if what == 1:
            self.committed[transaction] = self.open.pop(transaction)
        else:
            self.open[transaction].append(self.next_event)
            self.next_event += 1

    @property
    def snapshot(self) -> Snapshot:
        """What is committed now."""
        return Snapshot(self.next_transaction, frozenset(self.open))

    def read(self, after: Cursor, limit: int) -> list[RegistryEvent]:
        """A page, as the statement reads it."""
        begun = dict(after.parts)
        found = [
            event(number, transaction)
            for transaction, numbers in sorted(self.committed.items())
            if not after.seen.sees(transaction)
            for number in numbers
            if number > begun.get(transaction, 0)
        ]
        whole = next((i for i in range(limit, len(found)) if found[i].transaction != found[i - 1].transaction), None)
        return found[:whole]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 4)), max_size=80),
    st.integers(1, 4),
)
def test_a_reader_that_stops_anywhere_gets_each_event_once(what: list[tuple[int, int, int]], limit: int) -> None:
    log, cursor, got = Log(), Cursor(Snapshot(3, frozenset())), []
    for kind, which, takes in what:
        log.do(kind, which)
        page = log.read(cursor, limit)[: takes if takes < 4 else None]
        whole = log.read(cursor, limit)
        places = steps(cursor, log.snapshot, whole)
        got += [item.event_id for item in page]
        if page:
            cursor = Cursor.parse(str(places[len(page) - 1]))
    while page := log.read(cursor, limit):
        got += [item.event_id for item in page]
        cursor = steps(cursor, log.snapshot, page)[-1]
    assert sorted(got) == sorted(number for numbers in log.committed.values() for number in numbers)
