"""``mlplat://<run id>/<path>``: the artifacts of runs as an fsspec filesystem."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from glob import has_magic
from pathlib import Path
from typing import Any

from fsspec.callbacks import DEFAULT_CALLBACK, NoOpCallback
from fsspec.spec import AbstractFileSystem, make_instance
from fsspec.utils import isfilelike, tokenize

from mlplat.artifacts.model import proxied_path, safe_path
from mlplat.errors import NotFound
from mlplat.sdk.artifact_bytes import Part, as_os_errors, delete, download, fetch, list_folder, upload
from mlplat.sdk.artifact_files import ArtifactReader, ArtifactTextWriter, ArtifactWriter, new_spool
from mlplat.sdk.client import API, RETRY_FOR_S, Client, default_url

Info = dict[str, Any]
_TEXT_OPTIONS = ("encoding", "errors", "newline")


class ArtifactFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Files of runs, as they are at the platform at that moment: nothing is cached. Thread-safe; survives forks.

    A file appears when it is complete and replaces what was there; of two writers the last one wins. Folders are
    there as long as something is in them; those that were made and are empty exist for this instance only.

    Methods raise what fsspec's do, ValueError for paths that are not allowed, and ``mlplat.errors.Unavailable`` when
    the platform stays out of reach. A copy in another process talks to the same platform.

    Args:
        url: the platform; by default that of the step under way, of ``MLPLAT_URL``, or of this machine.
        retry_for_s: how long a platform that is out of reach is tried.
    """

    protocol = "mlplat"
    #: Instances are cheap, and the default platform of a process may change.
    cachable = False
    blocksize = 4 * 1024 * 1024

    def __init__(self, *, url: str | None = None, retry_for_s: float = RETRY_FOR_S, **options: Any) -> None:
        super().__init__(**options)
        self.url = (url or default_url()).rstrip("/")
        self._retry_for_s = retry_for_s
        self._roots: dict[str, str] = {}
        self._made: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return make_instance, (type(self), (), self._options)

    def to_dict(self, *, include_password: bool = True) -> dict[str, Any]:
        """What another process makes the same filesystem of."""
        return {**super().to_dict(include_password=include_password), **self._options}

    @property
    def fsid(self) -> str:
        """Names the platform."""
        return f"mlplat-{self.url}"

    @property
    def _options(self) -> dict[str, Any]:
        return {**self.storage_options, "url": self.url}

    @property
    def _fs_token(self) -> str:
        return str(tokenize(self.fsid))

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        stripped = super()._strip_protocol(path)
        if isinstance(stripped, list):
            return stripped
        return "/".join(part for part in stripped.split("/") if part not in {"", "."})

    # What is there

    def ls(self, path: Any, detail: bool = True, **_options: Any) -> list[Any]:
        """What is in a folder, by name. Runs cannot be listed: ``mlplat.search_runs`` finds them."""
        path = self._strip_protocol(path)
        found = {info["name"]: info for info in self._listing(path)} if path else {}
        for name in self._made_in(path):
            found.setdefault(name, _folder(name))
        if path and not found:
            info = self.info(path)
            if info["type"] == "file":
                found[path] = info
        return [found[name] if detail else name for name in sorted(found)]

    def info(self, path: Any, **_options: Any) -> Info:
        """``name``, ``type`` and ``size`` in bytes; ``ETag`` where the platform tells."""
        path = self._strip_protocol(path)
        if "/" not in path:
            if path:
                self._stored(path)
            return _folder(path)
        with as_os_errors(path):
            try:
                part = fetch(self._client, self._stored(path), 0, 1)
            except NotFound:
                if next(self._made_in(path, itself=True), None) is not None or self._listing(path):
                    return _folder(path)
                raise
        etag = {} if part.etag is None else {"ETag": part.etag}
        return {"name": path, "size": part.size, "type": "file", **etag}

    def exists(self, path: Any, **_options: Any) -> bool:
        """Whether there is a file or a folder."""
        return self._type(path) is not None

    def isdir(self, path: Any) -> bool:
        """Whether there is a folder."""
        return self._type(path) == "directory"

    def isfile(self, path: Any) -> bool:
        """Whether there is a file."""
        return self._type(path) == "file"

    def ukey(self, path: Any) -> str:
        """Another one when the file may have changed: its ETag, or a new one each time where it has none."""
        return str(self.info(path).get("ETag") or uuid.uuid4().hex)

    def checksum(self, path: Any) -> int:
        """``ukey`` as a number."""
        return int(tokenize(self.ukey(path)), 16)

    # Bytes

    def fetch(self, path: str, start: int, end: int | None) -> Part:
        """Bytes ``start`` to ``end`` of a file, none of them negative."""
        with self._reading(path):
            return fetch(self._client, self._stored(path), start, end)

    def cat_file(self, path: Any, start: int | None = None, end: int | None = None, **_options: Any) -> bytes:
        """The bytes of a file, or of the slice of it."""
        path = self._strip_protocol(path)
        if (start or 0) < 0 or (end or 0) < 0:
            start, end, _step = slice(start, end).indices(self._file_info(path)["size"])
        if end is not None and end <= (start or 0):
            return b""
        return self.fetch(path, start or 0, end).body

    def open(self, path: Any, mode: str = "rb", **options: Any) -> Any:
        """Opens a file for reading (``r``), writing (``w``), or writing where there is none (``x``)."""
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
        self._check_target(path)
        if mode == "xb":
            self._check_free(path)
        return ArtifactWriter(partial(self._upload, path), autocommit)

    def pipe_file(self, path: Any, value: Any, mode: str = "overwrite", **_options: Any) -> None:
        """Writes a file of these bytes."""
        path = self._strip_protocol(path)
        if mode == "create":
            self._check_free(path)
        self._upload(path, io.BytesIO(value), memoryview(value).nbytes)

    def put_file(
        self, lpath: Any, rpath: Any, callback: Any = DEFAULT_CALLBACK, mode: str = "overwrite", **_options: Any
    ) -> None:
        """Sends a file of this machine; of a folder only its name."""
        path = self._strip_protocol(rpath)
        if mode == "create":
            self._check_free(path)
        if Path(lpath).is_dir():
            self.makedirs(path, exist_ok=True)
            return
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
        half = local.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with half.open("wb") as out:
                self._download(path, out, callback)
            half.replace(local)
        except IsADirectoryError:
            if local.is_dir() or not self.isdir(path):
                raise
            local.mkdir(exist_ok=True)
        finally:
            half.unlink(missing_ok=True)

    def cp_file(self, path1: Any, path2: Any, **_options: Any) -> None:
        """Copies a file by way of this machine; of a folder only its name.

        Raises:
            SameFileError: the two paths are one.
        """
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if source == target:
            raise shutil.SameFileError(f"{source!r} cannot be copied onto itself")
        self._check_target(target)
        with new_spool() as spool:
            try:
                self._download(source, spool, DEFAULT_CALLBACK)
            except IsADirectoryError:
                self.makedirs(target, exist_ok=True)
            else:
                self._upload(target, spool, spool.seek(0, os.SEEK_END))

    # Changes

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

    def rm_file(self, path: Any) -> None:
        """Removes a file."""
        self._remove(self._strip_protocol(path), recursive=False)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Removes files and, with ``recursive``, folders. A path that exists is not taken for a pattern."""
        for given in path if isinstance(path, (list, tuple)) else [path]:
            one = self._strip_protocol(given)
            if recursive and maxdepth is not None:
                for file in self.find(one, maxdepth=maxdepth):
                    self._remove(file, recursive=False)
            elif has_magic(one) and not self.exists(one):
                for found in self.expand_path(one):
                    self._remove(found, recursive=recursive)
            else:
                self._remove(one, recursive=recursive)

    def mkdir(self, path: Any, create_parents: bool = True, **_options: Any) -> None:
        """Makes a folder, for this instance, until a file is in it."""
        self.makedirs(path)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        """Makes a folder and those above it, for this instance, until a file is in them."""
        path = self._strip_protocol(path)
        found = self._type(path)
        if found == "file" or (found is not None and not exist_ok):
            raise FileExistsError(errno.EEXIST, f"there is a {found}", path)
        if found is None:
            self._check_target(path)
            self._made.add(path)

    def rmdir(self, path: Any) -> None:
        """Removes an empty folder."""
        path = self._strip_protocol(path)
        found = self.ls(path, detail=False)
        if found == [path]:
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", path)
        if found:
            raise OSError(errno.ENOTEMPTY, "the folder is not empty", path)
        self._remove(path, recursive=True)

    # How

    @property
    def _client(self) -> Client:
        return _client_of(self.url, self._retry_for_s, os.getpid())

    def _stored(self, path: str) -> str:
        """The path in the artifact store."""
        run_id, _slash, inside = path.partition("/")
        if not run_id:
            raise ValueError(f"a path names a run: mlplat://<run id>/<path>, not {path!r}")
        with as_os_errors(path):
            inside = safe_path(inside)
            root = self._roots.get(run_id)
            if root is None:
                run = self._client.get(f"{API}/runs/get", run_id=run_id)["run"]
                root = self._roots[run_id] = proxied_path(run["info"]["artifact_uri"])
        return posixpath.join(root, inside) if inside else root

    def _listing(self, path: str) -> list[Info]:
        with as_os_errors(path):
            return [_named(path, entry) for entry in list_folder(self._client, self._stored(path))]

    def _made_in(self, path: str, *, itself: bool = False) -> Iterator[str]:
        """Folders that were made in a folder; with ``itself`` also that."""
        for made in tuple(self._made):
            if made.startswith(f"{path}/"):
                yield f"{path}/{made.removeprefix(f'{path}/').partition('/')[0]}"
            elif itself and made == path:
                yield made

    def _type(self, path: Any) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def _file_info(self, path: str) -> Info:
        info = self.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, "a folder", path)
        return info

    def _check_target(self, path: str) -> None:
        """Raises what speaks against writing to a path before anything is written."""
        if "/" not in path:
            self._stored(path)
            raise IsADirectoryError(errno.EISDIR, "the folder of a run", path)
        self._stored(path)

    def _check_free(self, path: str) -> None:
        if self.exists(path):
            raise FileExistsError(errno.EEXIST, "it exists", path)

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            with as_os_errors(path):
                yield
        except FileNotFoundError:
            if self.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "a folder", path) from None
            raise

    def _download(self, path: str, into: Any, callback: Any) -> None:
        with self._reading(path):
            download(self._client, self._stored(path), into, callback)

    def _upload(self, path: str, source: Any, size: int, callback: Any = DEFAULT_CALLBACK) -> None:
        self._check_target(path)
        try:
            with as_os_errors(path):
                upload(self._client, self._stored(path), source, size, callback)
        except ValueError:
            self._raise_obstacle(path)
            raise
        self._made.difference_update([made for made in tuple(self._made) if path.startswith(f"{made}/")])

    def _raise_obstacle(self, path: str) -> None:
        if self.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "a folder", path)
        above = posixpath.dirname(path)
        while "/" in above:
            if self.isfile(above):
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", above)
            above = posixpath.dirname(above)

    def _remove(self, path: str, *, recursive: bool) -> None:
        if self.info(path)["type"] == "directory" and not recursive:
            raise IsADirectoryError(errno.EISDIR, "a folder; recursive=True removes it", path)
        self._made.difference_update([made for made in tuple(self._made) if f"{made}/".startswith(f"{path}/")])
        with as_os_errors(path):
            delete(self._client, self._stored(path))


@lru_cache(maxsize=16)
def _client_of(url: str, retry_for_s: float, _pid: int) -> Client:
    """One client per platform and process: connections cannot be shared with a forked child."""
    return Client(url, retry_for_s)


def _folder(path: str) -> Info:
    return {"name": path, "size": 0, "type": "directory"}


def _named(folder: str, entry: Mapping[str, Any]) -> Info:
    name = f"{folder}/{entry['path']}"
    return _folder(name) if entry["is_dir"] else {"name": name, "size": entry["file_size"], "type": "file"}
