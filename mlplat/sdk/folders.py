"""A folder as one zip file: equal folders give equal bytes."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mlplat.errors import InvalidPipeline
from mlplat.steps.working_dir import MAX_FILES

MAX_ZIPPED_BYTES = 256 * 1024 * 1024
#: What no step needs: histories, caches and environments.
LEFT_OUT = {
    ".git", ".hg", ".svn", "__pycache__", ".venv", "venv", "node_modules", ".ipynb_checkpoints", ".mypy_cache",
    ".pytest_cache", ".ruff_cache", ".DS_Store",
}  # fmt: skip
_EPOCH = (1980, 1, 1, 0, 0, 0)


def zip_folder(folder: Path) -> bytes:
    """The folder's files, without those ``LEFT_OUT``. Links to files are followed; links to folders are not.

    Raises:
        InvalidPipeline: no such folder, or too many files or bytes.
    """
    if not folder.is_dir():
        raise InvalidPipeline(f"{folder}: no such folder")
    out, count, size = io.BytesIO(), 0, 0
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in _files(folder):
            count, size = count + 1, size + path.stat().st_size
            if count > MAX_FILES or size > MAX_ZIPPED_BYTES:
                raise InvalidPipeline(
                    f"{folder}: more than {MAX_FILES} files or {MAX_ZIPPED_BYTES // 1024**2} MiB; "
                    "keep data outside of working_dir"
                )
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, whose permissions follow
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    return out.getvalue()


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        for name in sorted(files):
            path = Path(root) / name
            if name not in LEFT_OUT and not name.endswith(".pyc") and path.is_file():
                yield path
