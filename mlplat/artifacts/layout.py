"""Where in the artifact store what lies: its own folders, and everything else, which is users' files by their paths."""

from __future__ import annotations

from collections.abc import Iterator

from mlplat.artifacts.objects import ObjectInfo, Objects

#: Bytes by their digest, and what is not complete yet.
BLOBS, UPLOADS = ".blobs", ".uploads"
_COLLECTOR = ".collector"
CONDEMNED_KEY = f"{_COLLECTOR}/condemned.json"
#: Says that users' files are entries.
FORMAT_KEY = f"{_COLLECTOR}/format"
#: Random text by which a process knows that a folder which it has is the one that the platform means.
PLACE_KEY = f"{_COLLECTOR}/place"
#: Folders of the store itself; no user's path begins with one.
OWN = (BLOBS, UPLOADS, _COLLECTOR)
#: Points of runs that ended long ago, which the platform alone writes and removes: files that everybody may read.
ARCHIVED_METRICS = "metrics-archive"
#: Suffix of blobs that are compressed.
PACKED = ".zst"


def files(objects: Objects) -> Iterator[ObjectInfo]:
    """All files of users, in no order."""
    for child in objects.children(""):
        if child.info is not None:
            yield child.info
        elif child.name not in OWN:
            yield from objects.walk(child.name)
