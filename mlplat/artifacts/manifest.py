"""Manifests: which files a folder had, with the digest of each. They are blobs, named by digests of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from mlplat.artifacts.store import ArtifactStore, StoredFile
from mlplat.errors import Corrupted, NotFound

#: A folder with more is none that anybody registers as a model.
MAX_FILES = 50_000
#: What the platform itself writes beside a run's files, also later.
_OWN = "mlplat/"


class FileDigest(msgspec.Struct, frozen=True, order=True):
    """A file: its path in the folder, its size in bytes, and its SHA-256 in hex."""

    path: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """The files of a folder, by path."""

    files: tuple[FileDigest, ...]


@dataclass(frozen=True)
class Frozen:
    """A folder as it was.

    Args:
        digest: of the manifest's blob.
        stamp: what changes when a file is written, whatever is in it.
        size: bytes of all its files.
    """

    digest: str
    stamp: str
    size: int


@dataclass(frozen=True)
class Difference:
    """A file that is not as it was, and how."""

    path: str
    what: str


def freeze(store: ArtifactStore, folder: str) -> Frozen | None:
    """Keeps the manifest of a folder; None: there are no files, or too many. Reads all of them. Blocks.

    Raises:
        Corrupted: a file is damaged already.
    """
    files = list(_files(store, folder))
    if not files or len(files) > MAX_FILES:
        return None
    manifest = Manifest(tuple(FileDigest(file.path, file.size, _sha256(store, folder, file.path)) for file in files))
    return Frozen(store.put_blob(msgspec.json.encode(manifest)), _stamp(files), sum(file.size for file in files))


def size_of(store: ArtifactStore, digest: str) -> int:
    """Bytes of all files of a manifest. Blocks.

    Raises:
        NotFound, Corrupted: the manifest is gone or corrupt.
    """
    return sum(file.size for file in _load(store, digest).files)


def stamp_of(store: ArtifactStore, folder: str) -> str:
    """See ``Frozen``; looks at no file's bytes. Blocks."""
    return _stamp(_files(store, folder))


def differences(store: ArtifactStore, folder: str, digest: str) -> list[Difference]:
    """The files of a manifest that are gone or have other bytes. Files that came later are none. Blocks.

    Raises:
        NotFound, Corrupted: the manifest is gone or corrupt itself.
    """
    manifest = _load(store, digest)
    sizes = {file.path: file.size for file in _files(store, folder)}
    return list(_different(store, folder, manifest.files, sizes))


def _load(store: ArtifactStore, digest: str) -> Manifest:
    try:
        return msgspec.json.decode(store.get_blob(digest), type=Manifest)
    except msgspec.DecodeError as error:
        raise Corrupted(f"blob {digest} is no manifest") from error


def _different(
    store: ArtifactStore, folder: str, files: Sequence[FileDigest], sizes: dict[str, int]
) -> Iterator[Difference]:
    for file in files:
        size = sizes.get(file.path)
        if size is None:
            yield Difference(file.path, "is gone")
        elif size != file.size:
            yield Difference(file.path, f"has {size} bytes and had {file.size}")
        else:
            try:
                found = _sha256(store, folder, file.path)
            except Corrupted as error:
                yield Difference(file.path, f"cannot be read: {error.message}")
                continue
            if found != file.sha256:
                yield Difference(file.path, f"has the SHA-256 {found[:12]}… and had {file.sha256[:12]}…")


def _files(store: ArtifactStore, folder: str) -> Iterator[StoredFile]:
    return (file for file in store.files(folder) if not file.path.startswith(_OWN))


def _stamp(files: Iterable[StoredFile]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.path}\0{file.size}\0{file.stamp}\n".encode())
    return found.hexdigest()


def _sha256(store: ArtifactStore, folder: str, path: str) -> str:
    found = hashlib.sha256()
    try:
        for chunk in store.read(f"{folder}/{path}"):
            found.update(chunk)
    except NotFound:  # it went away meanwhile: nothing has this digest
        return ""
    return found.hexdigest()
