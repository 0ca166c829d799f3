"""What there is among the artifacts of runs, and its folders: the part of the filesystem that moves no bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
from collections.abc import Iterator, Mapping
from functools import lru_cache
from glob import has_magic
from typing import Any

from fsspec.spec import AbstractFileSystem, make_instance
from fsspec.utils import tokenize

from mlplat.artifacts.model import proxied_path, safe_path
from mlplat.errors import NotFound
from mlplat.sdk.artifact_bytes import as_os_errors, delete, fetch, list_folder
from mlplat.sdk.client import API, RETRY_FOR_S, Client, default_url

Info = dict[str, Any]
#: Folders that an instance has made and not removed; of more it forgets the oldest.
MAX_MADE = 10_000


class ArtifactTree(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """See ``ArtifactFileSystem``."""

    protocol = "mlplat"
    #: Instances are cheap, and the default platform of a process may change.
    cachable = False

    def __init__(self, *, url: str | None = None, retry_for_s: float = RETRY_FOR_S, **options: Any) -> None:
        super().__init__(**options)
        self.url = (url or default_url()).rstrip("/")
        self._retry_for_s = retry_for_s
        self._roots: dict[str, str] = {}
        self._made: dict[str, None] = {}

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
        """By this fsspec compares instances."""
        return str(tokenize(self.fsid))

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        stripped = super()._strip_protocol(path)
        if isinstance(stripped, list):
            return stripped
        return "/".join(part for part in stripped.split("/") if part not in {"", "."})

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
                if path in self._made or next(self._made_in(path), None) is not None or self._listing(path):
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
        """Another one when the file has changed: its ETag, or where it has none the SHA-256 of all its bytes."""
        etag = self.info(path).get("ETag")
        if etag is not None:
            return str(etag)
        with self.open(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def checksum(self, path: Any) -> int:
        """``ukey`` as a number."""
        return int(tokenize(self.ukey(path)), 16)

    def mkdir(self, path: Any, create_parents: bool = True, **_options: Any) -> None:
        """Makes a folder, which others see once a file is in it."""
        self.makedirs(path)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        """Makes a folder and those above it, which others see once a file is in them."""
        path = self._strip_protocol(path)
        found = self._type(path)
        if found == "file" or (found is not None and not exist_ok):
            raise FileExistsError(errno.EEXIST, f"there is a {found}", path)
        if found is None:
            self._stored(path)
            self._made[path] = None
            for oldest in list(self._made)[:-MAX_MADE]:
                self._made.pop(oldest, None)

    def rmdir(self, path: Any) -> None:
        """Removes an empty folder."""
        path = self._strip_protocol(path)
        found = self.ls(path, detail=False)
        if found == [path]:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if found:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        self._remove(path, recursive=True)

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

    @property
    def _client(self) -> Client:
        return _client_of(self.url, self._retry_for_s, os.getpid())

    def _stored(self, path: str) -> str:
        """The path in the artifact store.

        Raises:
            FileNotFoundError: no such run.
            ValueError: the path names no run or is not allowed, or the run's artifacts are not at the platform.
        """
        run_id, _slash, inside = path.partition("/")
        if not run_id:
            raise ValueError(f"a path begins with a run: mlplat://<run id>/<path>, not {path!r}")
        with as_os_errors(path):
            inside = safe_path(inside)
            root = self._roots.get(run_id)
            if root is None:
                root = self._roots[run_id] = self._find_root(run_id)
        return posixpath.join(root, inside) if inside else root

    def _find_root(self, run_id: str) -> str:
        try:
            run = self._client.get(f"{API}/runs/get", run_id=run_id)["run"]
        except NotFound as error:
            raise FileNotFoundError(errno.ENOENT, f"{self.url} has no such run", run_id) from error
        return proxied_path(run["info"]["artifact_uri"])

    def _listing(self, path: str) -> list[Info]:
        with as_os_errors(path):
            return [_named(path, entry) for entry in list_folder(self._client, self._stored(path))]

    def _made_in(self, path: str) -> Iterator[str]:
        """What is directly in a folder because something was made there or below."""
        for made in tuple(self._made):
            if made.startswith(f"{path}/"):
                yield f"{path}/{made.removeprefix(f'{path}/').partition('/')[0]}"

    def _type(self, path: Any) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def _remove(self, path: str, *, recursive: bool) -> None:
        if self.info(path)["type"] == "directory" and not recursive:
            raise IsADirectoryError(errno.EISDIR, "a folder, which recursive=True removes", path)
        for made in tuple(self._made):
            if f"{made}/".startswith(f"{path}/"):
                self._made.pop(made, None)
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
