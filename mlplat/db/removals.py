"""Who may remove things for good: one at a time."""

from __future__ import annotations

#: Key of the advisory lock, in Postgres, of whatever removes points or artifacts that rows may refer to. A backup holds
#: it, too: what its rows refer to must still be there when it comes to the artifacts.
REMOVALS = 0x70757267
