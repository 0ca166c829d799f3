"""Sending what processes that are gone have left in the spool folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlplat.errors import Overloaded, Unavailable
from mlplat.sdk.backlog import Backlog
from mlplat.sdk.client import Client
from mlplat.sdk.delivery import MAX_BATCH_BYTES, Delivered, Delivery, Refusal
from mlplat.sdk.records import Origin, attachment_of, read_origin
from mlplat.sdk.spool import Frame, SpoolFile, spooled_files

#: What the platform refuses, but might take later, is kept for so long.
KEEP_S = 30 * 24 * 3600.0
DAMAGED_SUFFIX = ".damaged"
SEND_TIMEOUT_S = 30.0


@dataclass
class Left:
    """What became of one file."""

    path: Path
    origin: Origin
    records: int = 0
    points: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    damaged_bytes: int = 0

    @property
    def summary(self) -> str:
        """One line for people."""
        text = f"{self.points} points, {self.records} other records"
        if self.refusals:
            text += f", {len(self.refusals)} refused"
        if self.damaged_bytes:
            text += f", {self.damaged_bytes} unreadable bytes at its end"
        return text


def sender_to(url: str) -> Delivery:
    """A delivery that tries once."""
    return Delivery(Client(url, retry_for_s=0, timeout_s=SEND_TIMEOUT_S))


def resend_leftovers(
    folder: Path,
    delivery_to: Callable[[str], Delivery],
    *,
    only_url: str | None = None,
    max_bytes: int,
    pause_s: float = 0.0,
) -> Iterator[Left]:
    """Sends and deletes the files of processes that are gone, oldest first, and yields what became of each.

    What is refused and might be taken later moves to a new file, which is given up after 30 days.

    Args:
        delivery_to: the way to the platform at a URL.
        only_url: leaves other platforms' files alone.
        pause_s: between two requests, to leave the interpreter to others.

    Raises:
        PlatformError: the platform is away; what it has not taken stays.
    """
    for path in spooled_files(folder):
        file = SpoolFile.adopt(path)
        if file is None:
            continue
        is_empty = False
        try:
            origin = read_origin(file.origin) or Origin("", "", 0, 0)
            if only_url is None or origin.url == only_url:
                yield _send_file(file, origin, delivery_to(origin.url), max_bytes, pause_s)
                is_empty = True
        finally:
            file.close(delete=is_empty)


def _send_file(file: SpoolFile, origin: Origin, delivery: Delivery, max_bytes: int, pause_s: float) -> Left:
    left = Left(file.path, origin)
    is_old = time.time() - origin.created_ms / 1000 > KEEP_S
    aside = Backlog(file.path.parent, file.origin, max_bytes)
    try:
        while found := file.read(MAX_BATCH_BYTES):
            frames = [frame for frame, _offset in found]
            delivered = _deliver(delivery, frames, file.attachments)
            left.refusals += delivered.refusals
            if not is_old and any(refusal.may_pass for refusal in delivered.refusals):
                aside.take_over(frames[0], file.attachments)
            left.points += delivered.points
            left.records += int(delivered.points == 0 and not delivered.refusals)
            file.acknowledge(found[delivered.frames - 1][1])
            if (name := attachment_of(frames[0])) is not None:
                (file.attachments / name).unlink(missing_ok=True)
            time.sleep(pause_s)
    finally:
        aside.close()
    if file.pending_bytes:
        left.damaged_bytes = file.pending_bytes
        if not file.tail_is_torn():  # a disk's fault, not a crash: somebody may want to look at it
            file.path.with_suffix(DAMAGED_SUFFIX).hardlink_to(file.path)
    return left


def _deliver(delivery: Delivery, frames: list[Frame], attachments: Path) -> Delivered:
    try:
        return delivery.deliver(frames, attachments)
    except (Unavailable, Overloaded):
        raise
    except Exception as error:  # one record that nobody can make sense of must not hold up the others
        reason = f"{type(error).__name__}: {error}"
        return Delivered(1, 0, [Refusal("unknown", reason, may_pass=True)])
