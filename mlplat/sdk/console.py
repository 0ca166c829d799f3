"""Reading what runs print."""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.parse import quote

from mlplat.sdk.client import Client

POLL_S = 1.0


def console_text(client: Client, run_id: str, *, follow: bool = False, poll_s: float = POLL_S) -> Iterator[str]:
    """What a run printed so far, in parts; with ``follow`` also what it prints until it ends.

    Raises:
        NotFound: no such run.
    """
    cursor = ""
    while True:
        part = client.get(f"/api/v1/runs/{quote(run_id, safe='')}/console", after=cursor or None)
        cursor = part["cursor"]
        yield part["text"]
        if part["more"]:
            continue
        if not (follow and part["running"]):
            return
        time.sleep(poll_s)
