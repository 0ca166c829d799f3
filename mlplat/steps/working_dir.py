"""The folder that came with a pipeline's definition, unpacked beside the step."""

from __future__ import annotations

import io
import lzma
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput

MAX_UNPACKED_BYTES = 4 * 1024**3
MAX_FILES = 50_000
KEPT_PER_PROCESS = 8
#: Raised when an archive is damaged, encrypted, packed in an unknown way, or has a file that is a folder, too.
_NO_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, NotImplementedError, RuntimeError,
    FileExistsError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip


@contextmanager
def inside_working_dir(digest: str | None, artifacts: ArtifactStore) -> Iterator[None]:
    """Runs the block in the folder, whose modules can be imported. Does nothing without a digest.

    Raises:
        InvalidInput: the archive is none, or wants to write outside its folder.
    """
    if digest is None:
        yield
        return
    folder, known = _unpacked(digest, artifacts), set(sys.modules)
    try:
        with inside_folder(folder):
            yield
    finally:  # the next attempt of this process may have other modules of the same names
        for name in set(sys.modules) - known:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(f"{folder}{os.sep}"):
                del sys.modules[name]


@contextmanager
def inside_folder(folder: str) -> Iterator[None]:
    """Runs the block in a folder, whose modules can be imported."""
    before = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        os.chdir(before)
        with suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(folder)
        _forget_modules(Path(folder))


def _forget_modules(folder: Path) -> None:
    """Workers stay: a module of this folder must not stand in for one of the same name in the next attempt's."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).is_relative_to(folder):
            del sys.modules[name]


@lru_cache(maxsize=KEPT_PER_PROCESS)
def _unpacked(digest: str, artifacts: ArtifactStore) -> str:
    """Unpacked once per process: steps may write into their folder, so it is not shared between processes."""
    body = artifacts.get_blob(digest)
    folder = tempfile.mkdtemp(prefix="mlplat-dir-")
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            _check(archive, folder)
            archive.extractall(folder)
    except _NO_ARCHIVE as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InvalidInput(f"working_dir {digest} is no zip archive: {error}") from error
    except BaseException:  # the next attempt unpacks it again
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _check(archive: zipfile.ZipFile, folder: str) -> None:
    entries = archive.infolist()
    if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries) > MAX_UNPACKED_BYTES:
        raise InvalidInput(f"the working_dir has more than {MAX_FILES} files or {MAX_UNPACKED_BYTES} bytes")
    root = Path(folder).resolve()
    for entry in entries:
        if not (root / entry.filename).resolve().is_relative_to(root):
            raise InvalidInput(f"the working_dir has a file outside of itself: {entry.filename!r}")
