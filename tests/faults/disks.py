"""Small disks that can be filled: a tmpfs over a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1024 * 1024
_FILLER = "filler"
_ROUND_BYTES = 64 * 1024


class SmallDisk:
    """A disk of its own at ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def free_bytes(self) -> int:
        """Room that is left."""
        return shutil.disk_usage(self.folder).free

    def fill(self, leave_bytes: int = 0) -> None:
        """Takes all room but so much, at once."""
        size = max(self.free_bytes - leave_bytes, 0)
        with (self.folder / _FILLER).open("ab") as filler:
            end = filler.tell()
            while size > 0:
                try:
                    os.posix_fallocate(filler.fileno(), end, size)
                    return
                except OSError:  # others were faster
                    size -= _ROUND_BYTES

    def free(self) -> None:
        """Gives back what ``fill`` has taken."""
        (self.folder / _FILLER).unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """Mounts one; skips the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},mode=0700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk takes the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: what still has a file open there ends by itself.
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=True)
