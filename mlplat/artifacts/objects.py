"""What the artifact store keeps its objects in: byte strings under keys, in a folder or a bucket.

Contract (``tests/contract/test_objects.py``): an object appears whole or not at all, and is durable when ``write``
returns; a write is seen by every read and listing that begins after it; of several writers with ``only_new`` one
wins. Keys are relative paths that the caller has checked. Methods block, are thread-safe, and raise ``Unavailable``
when the place is out of reach and ``StorageFull`` when it has no room.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """An object: its size in bytes, when it was last written (s since 1970), and what changes with every write."""

    key: str
    size: int
    modified_s: float
    stamp: str


@dataclass(frozen=True)
class Child:
    """An object or a folder directly in a folder; a folder has no ``info``."""

    name: str
    info: ObjectInfo | None


class Objects(Protocol):
    """A folder or a bucket."""

    @property
    def is_near(self) -> bool:
        """Whether it costs next to nothing to ask for an object, compared to writing it."""
        ...

    @property
    def chunk_bytes(self) -> int:
        """The average size of chunks: small ones share more, large ones are fewer."""
        ...

    @property
    def parallel(self) -> int:
        """Reads or writes of one file that are worth doing at once."""
        ...

    def make_folders(self, folders: Iterable[str]) -> None:
        """Makes folders ahead of the writes that would make one after the other."""
        ...

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes | None:
        """Bytes ``start`` to ``end`` (exclusive), as far as there are any; None: no such object."""
        ...

    def write(
        self,
        key: str,
        body: bytes | memoryview,
        *,
        only_new: bool = False,
        sha256: str | None = None,
        named_later: bool = False,
    ) -> bool:
        """Stores an object, in place of one that is there; with ``only_new`` False is returned instead.

        Args:
            key: its name.
            body: its bytes.
            only_new: not in place of another one.
            sha256: of the body, in hex: a place that is not near may check what arrives.
            named_later: the bytes are durable when this returns, their name not before ``sync``.

        Raises:
            InvalidInput: a folder is there, or an object is where a folder of the key should be.
        """
        ...

    def sync(self, keys: Iterable[str]) -> None:
        """Objects that were written to these keys, by whatever process, are durable with their names."""
        ...

    def info(self, key: str) -> ObjectInfo | None:
        """None: no such object."""
        ...

    def children(self, folder: str) -> list[Child]:
        """What is directly in a folder; nothing there gives an empty list."""
        ...

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        """All objects below a folder, in no order."""
        ...

    def delete(self, key: str) -> None:
        """Removes an object, or all below a folder of that name; nothing there is fine."""
        ...
