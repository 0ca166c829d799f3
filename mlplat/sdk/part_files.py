"""The files beside their targets in which downloads put these together."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlplat.artifacts.digests import sha256

#: Names that leave room for what makes a part's name of them; file systems take 255 bytes.
MAX_NAME_BYTES = 249


@contextmanager
def part_of(target: Path) -> Iterator[tuple[Path, int]]:
    """A part of a target and its descriptor, for one download alone.

    It is what an earlier download left, unless another one is at work on that: then it is one that nobody goes on with.

    Raises:
        OSError: it cannot be made.
    """
    name = os.fsencode(target.name)
    part = target.with_name(f".{target.name if len(name) <= MAX_NAME_BYTES else sha256(name)}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _is_free(part, descriptor):
            yield part, descriptor
            return
    finally:
        os.close(descriptor)
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield part, descriptor
    finally:
        os.close(descriptor)
        part.unlink(missing_ok=True)


def write_at(descriptor: int, body: memoryview, start: int) -> None:
    """Writes all of it: a disk that gets full takes some of it first, and raises then.

    Raises:
        OSError: it cannot be written.
    """
    while body:
        written = os.pwrite(descriptor, body, start)
        body, start = body[written:], start + written


def _is_free(part: Path, descriptor: int) -> bool:
    """Whether no download is at work on a part, nor made a target of it just now. It is locked then."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), part.stat())
    except OSError:
        return False
