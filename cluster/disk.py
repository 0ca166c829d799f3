"""What commonly goes wrong with the state folder's disk, in one line each."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlplat.errors import BringUpError

MIN_FREE_BYTES = 500 * 1024 * 1024


@contextmanager
def plain_disk_errors(state_dir: Path) -> Iterator[None]:
    """Turns a full or closed disk into a ``BringUpError`` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise BringUpError(_full(state_dir)) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}:
            raise BringUpError(
                f"{error.filename or state_dir}: {error.strerror}. MLPLAT_STATE_DIR names another state folder."
            ) from error
        raise


def require_space(state_dir: Path) -> None:
    """Checks that there is room to start.

    Raises:
        BringUpError: less than ``MIN_FREE_BYTES`` are free.
    """
    if shutil.disk_usage(state_dir).free < MIN_FREE_BYTES:
        raise BringUpError(_full(state_dir))


def _full(state_dir: Path) -> str:
    existing = next(path for path in (state_dir, *state_dir.parents) if path.exists())
    free = shutil.disk_usage(existing).free // 1024**2
    return (
        f"the disk of {state_dir} is full: {free} MB free, {MIN_FREE_BYTES // 1024**2} MB needed. Free some space, "
        "or put the state elsewhere with MLPLAT_STATE_DIR."
    )
