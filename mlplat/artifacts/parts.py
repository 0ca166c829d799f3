"""Files that come in numbered parts, in any order and several at once; they appear when all are joined.

A part is an entry like a file's, in the store's scratch folder: its bytes are stored for good as it arrives, and
joining moves none of them. What nobody joins is removed with the scratch, as is what tells of those that are joined.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Sequence

from mlplat.artifacts.entry import Chunk, Entry, decode
from mlplat.artifacts.layout import UPLOADS
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import Corrupted, InvalidInput, NotFound

MAX_PARTS = 10_000
_UPLOAD = re.compile(r"[0-9a-f]{32}\Z", re.ASCII)


class PartUploads:
    """The uploads of a store that are under way. Methods block."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def begin(self) -> str:
        """The id of a new upload."""
        upload = uuid.uuid4().hex
        self._store.objects.write(_key(upload, 0), b"")
        return upload

    def put(self, upload: str, number: int, pieces: Iterable[bytes], digest: str | None = None) -> str:
        """Stores part ``number``, in place of an earlier one; returns its SHA-256.

        Raises:
            NotFound: no such upload (any more).
            InvalidInput: not a number of a part, or the bytes do not have the SHA-256 ``digest``.
        """
        self._require(upload)
        if not 1 <= number <= MAX_PARTS:
            raise InvalidInput(f"parts have numbers from 1 to {MAX_PARTS}, not {number}")
        entry = self._store.make(pieces)
        if digest is not None and digest != entry.sha256:
            raise InvalidInput(f"part {number} has the SHA-256 {entry.sha256} and should have {digest}")
        self._store.store_entry(_key(upload, number), entry)
        return entry.sha256

    def size(self, upload: str, numbers: Sequence[int]) -> int:
        """Bytes of the file that these parts will make.

        Raises:
            NotFound: no such upload (any more), or a part is missing.
            InvalidInput: there are too many.
        """
        self._require(upload)
        _require_few(numbers)
        return sum(self._part(upload, number).size for number in numbers)

    def join(self, upload: str, parts: Sequence[tuple[int, str | None]], path: str) -> Entry:
        """Makes a file of parts, in the order given, and ends the upload. Again for the same path does nothing.

        Args:
            upload: its id.
            parts: number and SHA-256 of each; None: whatever it is.
            path: of the file.

        Raises:
            NotFound: no such upload (any more), or a part is missing.
            InvalidInput: a part has another digest, or there are too many.
        """
        if self.is_joined(upload, path):
            return self._store.entry(path)
        self._require(upload)
        _require_few(parts)
        chunks, whole = list[Chunk](), hashlib.sha256()
        for number, digest in parts:
            part = self._part(upload, number)
            if digest is not None and digest != part.sha256:
                raise InvalidInput(f"part {number} of upload {upload} has the SHA-256 {part.sha256}, not {digest}")
            for piece in self._store.read_entry(path, part):
                whole.update(piece)
            chunks += part.chunks if part.body is None else [self._store.blobs.put(part.body)] if part.size else []
        entry = Entry(sum(chunk.size for chunk in chunks), whole.hexdigest(), None, tuple(chunks))
        self._store.put_entry(path, entry)
        self._store.objects.write(_key(upload, 0), path.encode())
        for number, _digest in parts:
            self._store.objects.delete(_key(upload, number))
        return entry

    def is_joined(self, upload: str, path: str) -> bool:
        """Whether a file was made of the upload's parts at this path."""
        return bool(path) and self._marker(upload) == path.encode()

    def forget(self, upload: str) -> None:
        """Ends an upload without a file; again does nothing."""
        self._store.objects.delete(f"{UPLOADS}/{_checked(upload)}")

    def _require(self, upload: str) -> None:
        if self._marker(upload) != b"":
            raise NotFound(f"No such upload: {upload}")

    def _marker(self, upload: str) -> bytes | None:
        """Empty while the upload is under way; once it is joined, the file's path."""
        return self._store.objects.read(_key(_checked(upload), 0))

    def _part(self, upload: str, number: int) -> Entry:
        stored = self._store.objects.read(_key(upload, number))
        if stored is None:
            raise NotFound(f"No such part of upload {upload}: {number}")
        try:
            return decode(stored)
        except InvalidInput as error:
            raise Corrupted(f"part {number} of upload {upload} is corrupt: {error.message}") from error


def _key(upload: str, number: int) -> str:
    return f"{UPLOADS}/{upload}/{number}"


def _require_few(parts: Sequence[object]) -> None:
    if len(parts) > MAX_PARTS:
        raise InvalidInput(f"a file has at most {MAX_PARTS} parts, not {len(parts)}")


def _checked(upload: str) -> str:
    if not _UPLOAD.match(upload):
        raise NotFound(f"No such upload: {upload[:80]!r}")
    return upload
