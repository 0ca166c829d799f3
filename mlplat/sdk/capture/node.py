"""The node that this process runs on: a run needs its metrics once, however many processes write to the run."""

from __future__ import annotations

import errno
import re
import socket


def host_name() -> str:
    """The host's name, in characters that are safe in a path and in a metric's key."""
    return re.sub(r"[^A-Za-z0-9._\-]", "_", socket.gethostname())[:64] or "host"


def claim_node(run_id: str) -> socket.socket | None:
    """Makes this process the one that speaks for its node in a run, until it closes the socket or ends.

    None: another process does already. The claim is a name among the node's abstract Unix sockets, which need no
    file and vanish with their process.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0mlplat-node-{run_id[:64]}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            claim.close()
            return None
    return claim
