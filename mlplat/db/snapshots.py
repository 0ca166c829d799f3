"""Reading rows in the order in which they are committed.

A transaction takes its numbers early and may commit late, so ``id > last`` loses rows. A reader remembers instead
which transactions it has seen, as Postgres' own ``pg_snapshot``: what a later snapshot sees and the remembered one
does not is exactly what is new. The rows need a column with the transaction that wrote them, ``TRANSACTION_ID``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Default of a ``bigint`` column: the number of the transaction that inserts the row.
TRANSACTION_ID = "(pg_current_xact_id())::text::bigint"


@dataclass(frozen=True)
class Snapshot:
    """Transactions below ``end`` that are not in ``open`` are seen."""

    end: int
    open: frozenset[int]

    @property
    def start(self) -> int:
        """Every transaction below this is seen."""
        return min(self.open, default=self.end)

    def sees(self, transaction: int) -> bool:
        """Whether the transaction had been committed or given up by then."""
        return transaction < self.end and transaction not in self.open

    def up_to(self, last: int) -> Snapshot:
        """The part of this snapshot with transactions up to ``last``, for a reader that stopped after that one."""
        end = min(self.end, last + 1)
        return Snapshot(end, frozenset(number for number in self.open if number < end))

    def __or__(self, other: Snapshot) -> Snapshot:
        """What either of them sees."""
        unseen = (number for number in self.open | other.open if not self.sees(number) and not other.sees(number))
        return Snapshot(max(self.end, other.end), frozenset(unseen))

    def __lt__(self, other: Snapshot) -> bool:
        """Snapshots of one server: which is the earlier one."""
        return (self.end, -len(self.open)) < (other.end, -len(other.open))

    def __str__(self) -> str:
        """As Postgres writes a ``pg_snapshot``."""
        return f"{self.start}:{self.end}:{','.join(str(number) for number in sorted(self.open))}"

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """What Postgres' ``pg_current_snapshot()::text`` says."""
        _start, end, open_ = text.split(":")
        return cls(int(end), frozenset(int(number) for number in open_.split(",") if number))


def unseen(column: str) -> str:
    """SQL that is true of rows committed since the snapshot ``:seen``, whose first open transaction is ``:seen_start``.

    What is beyond the server's own counter comes from another one, by a restored dump: it counts as seen.
    """
    return (
        f"{column} >= :seen_start AND {column} < pg_snapshot_xmax(pg_current_snapshot())::text::bigint "
        f"AND NOT pg_visible_in_snapshot({column}::text::xid8, CAST(:seen AS pg_snapshot))"
    )


def seen_values(seen: Snapshot) -> Mapping[str, object]:
    """The values that ``unseen`` needs."""
    return {"seen": str(seen), "seen_start": seen.start}
