"""``mlplat://<run id>/<path>``: the artifacts of runs as an fsspec filesystem."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.callbacks import DEFAULT_CALLBACK, NoOpCallback
from fsspec.utils import isfilelike

from mlplat.sdk import transfer
from mlplat.sdk.artifact_bytes import Part, as_os_errors, copy, download, fetch, progress_of, upload
from mlplat.sdk.artifact_files import ArtifactReader, ArtifactTextWriter, ArtifactWriter, new_spool
from mlplat.sdk.artifact_tree import ArtifactTree, Info

_TEXT_OPTIONS = ("encoding", "errors", "newline")


class ArtifactFileSystem(ArtifactTree):
    """Files of runs, as they are at the platform at that moment: nothing is cached. Thread-safe; survives forks.

    A file appears when it is complete and replaces what was there; of two writers the last one wins. Folders are
    there as long as something is in them; one that was made and is empty exists for this instance only.

    Methods raise what fsspec's do, ValueError for paths that are not allowed, and ``mlplat.errors.Unavailable`` when
    the platform stays out of reach. A copy in another process talks to the same platform.

    Args:
        url: the platform; by default that of the step under way, of ``MLPLAT_URL``, or of this machine.
        retry_for_s: how long a platform that is out of reach is tried.
    """

    blocksize = 4 * 1024 * 1024

    def open(self, path: Any, mode: str = "rb", **options: Any) -> Any:
        """Opens a file for reading (``r``), writing (``w``), or writing where there is none (``x``).

        Raises:
            NotImplementedError: any other mode. Files are written as a whole.
        """
        if "b" in mode or "r" in mode:
            return super().open(path, mode, **options)
        text = {name: options.pop(name) for name in _TEXT_OPTIONS if name in options}
        return ArtifactTextWriter(self.open(path, f"{mode.replace('t', '')}b", **options), **text)

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, autocommit: bool = True, **options: Any
    ) -> ArtifactReader | ArtifactWriter:
        if mode == "rb":
            size = options.pop("size", None)
            size = self._file_info(path)["size"] if size is None else size
            return ArtifactReader(self, path, mode, block_size or self.blocksize, size=size, **options)
        if mode not in {"wb", "xb"}:
            raise NotImplementedError(f"{path}: artifacts are written as a whole; mode {mode!r} is not supported")
        self._check_target(path, create=mode == "xb")
        return ArtifactWriter(partial(self._upload, path), autocommit)

    def cat_file(self, path: Any, start: int | None = None, end: int | None = None, **_options: Any) -> bytes:
        """The bytes of a file, or of the slice of it."""
        path = self._strip_protocol(path)
        if (start or 0) < 0 or (end or 0) < 0:
            start, end, _step = slice(start, end).indices(self._file_info(path)["size"])
        if end is not None and end <= (start or 0):
            return b""
        return self.fetch(path, start or 0, end).body

    def fetch(self, path: str, start: int, end: int | None) -> Part:
        """Bytes ``start`` to ``end`` (exclusive; None: the end) of a file, with its size."""
        with self._reading(path):
            return fetch(self._client, self._stored(path), start, end)

    def pipe_file(self, path: Any, value: Any, mode: str = "overwrite", **_options: Any) -> None:
        """Writes a file of these bytes; with the mode ``create`` only where there is none."""
        path = self._strip_protocol(path)
        self._check_target(path, create=mode == "create")
        self._upload(path, io.BytesIO(value), memoryview(value).nbytes)

    def put_file(
        self, lpath: Any, rpath: Any, callback: Any = DEFAULT_CALLBACK, mode: str = "overwrite", **_options: Any
    ) -> None:
        """Sends a file of this machine; of a folder only its name."""
        path = self._strip_protocol(rpath)
        if Path(lpath).is_dir():
            self.makedirs(path, exist_ok=True)
            return
        self._check_target(path, create=mode == "create")
        with Path(lpath).open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            callback.set_size(size)
            self._upload(path, source, size, callback)

    def get_file(
        self, rpath: Any, lpath: Any = None, callback: Any = DEFAULT_CALLBACK, outfile: Any = None, **options: Any
    ) -> None:
        """Fetches a file, which appears on this machine when it is complete; of a folder only its name."""
        if outfile is not None or isfilelike(lpath):
            super().get_file(rpath, lpath, callback=callback, outfile=outfile, **options)
            return
        path, local = self._strip_protocol(rpath), Path(lpath)
        if not isinstance(callback, NoOpCallback):
            callback.set_size(self.info(path)["size"])
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._reading(path):
                transfer.download(self._client, self._stored(path), local, progress_of(callback))
        except IsADirectoryError:
            if not self.isdir(path):  # it is the folder on this machine that is in the way
                raise
            local.mkdir(exist_ok=True)

    def cp_file(self, path1: Any, path2: Any, **_options: Any) -> None:
        """Copies a file, a small one by way of this machine; of a folder only its name.

        Raises:
            SameFileError: the two paths are one.
        """
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if source == target:
            raise shutil.SameFileError(f"{source!r} cannot be copied onto itself")
        with suppress(FileNotFoundError), as_os_errors(target):
            self._check_target(target)
            if copy(self._client, self._stored(source), self._stored(target)):
                return
        with new_spool() as spool:
            try:
                self._download(source, spool, DEFAULT_CALLBACK)
            except IsADirectoryError:
                self.makedirs(target, exist_ok=True)
            else:
                self._check_target(target)
                self._upload(target, spool, spool.seek(0, os.SEEK_END))

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **options: Any) -> None:
        """Moves a file, or with ``recursive`` a folder: copies and then removes it.

        Raises:
            ValueError: a folder would come into itself.
        """
        target = self._strip_protocol(path2)
        if self._strip_protocol(path1) == target:
            return
        for source in self.expand_path(path1):
            if f"{target}/".startswith(f"{source}/"):
                raise ValueError(f"{source!r} cannot be moved into itself, to {target!r}")
        super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **options)

    def _file_info(self, path: str) -> Info:
        info = self.info(path)
        if info["type"] == "directory":
            raise _is_a_folder(path)
        return info

    def _check_target(self, path: str, *, create: bool = False) -> None:
        """Raises what speaks against writing to a path, before anything is written."""
        self._stored(path)
        if "/" not in path:
            raise _is_a_folder(path)
        if create and self.exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            with as_os_errors(path):
                yield
        except FileNotFoundError:
            if self.isdir(path):
                raise _is_a_folder(path) from None
            raise

    def _download(self, path: str, into: Any, callback: Any) -> None:
        with self._reading(path):
            download(self._client, self._stored(path), into, callback)

    def _upload(self, path: str, source: Any, size: int, callback: Any = DEFAULT_CALLBACK) -> None:
        try:
            with as_os_errors(path):
                upload(self._client, self._stored(path), source, size, callback)
        except ValueError:
            self._raise_obstacle(path)
            raise

    def _raise_obstacle(self, path: str) -> None:
        """Raises what stands in the way of a file, if something does."""
        if self.isdir(path):
            raise _is_a_folder(path)
        above = posixpath.dirname(path)
        while "/" in above:
            if self.isfile(above):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), above)
            above = posixpath.dirname(above)


def _is_a_folder(path: str) -> IsADirectoryError:
    return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
