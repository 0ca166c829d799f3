"""Reading growing texts (see ``segments``) from a place on."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from mlplat.artifacts.model import ArtifactInfo
from mlplat.artifacts.segments import Place, plan_read, segment_number
from mlplat.artifacts.store import ArtifactStore


@dataclass(frozen=True)
class TextPart:
    """Some of a text, between two places. Bytes that are no UTF-8 are shown as U+FFFD. ``size`` bytes were read."""

    text: str
    start: Place
    next: Place
    size: int


def read_text(
    artifacts: ArtifactStore,
    folder: str,
    place: Place,
    limit: int,
    entries: Sequence[ArtifactInfo] | None = None,
    *,
    is_over: bool = False,
) -> TextPart:
    """At most ``limit`` bytes that follow ``place``; blocks.

    A character that is cut waits for its rest, which will not come when the text ``is_over``.
    ``entries`` is the folder's listing, for those who have it already.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    parts, size, start = list[str](), 0, place
    for name, begin, end in plan_read(artifacts.list(folder) if entries is None else entries, place, limit):
        body = b"".join(artifacts.read(f"{folder}/{name}", begin, end))
        parts.append(decoder.decode(body))
        size += len(body)
        place = Place(segment_number(name) or 0, begin + len(body))
    cut = len(decoder.getstate()[0])
    if is_over and size < limit:
        parts.append(decoder.decode(b"", final=True))
    elif cut <= place.offset:
        place = Place(place.segment, place.offset - cut)
    return TextPart("".join(parts), start, place, size)


def tail_start(entries: Sequence[ArtifactInfo], place: Place, limit: int) -> Place:
    """Where the last ``limit`` bytes of a folder begin, or ``place`` when fewer follow it."""
    left = limit
    for entry in sorted(entries, key=lambda entry: entry.path, reverse=True):
        number = None if entry.is_dir else segment_number(entry.path)
        if number is None:
            continue
        if number < place.segment:
            return place
        size = entry.size or 0
        known = place.offset if number == place.segment else 0
        if size - known >= left:
            return Place(number, size - left)
        left -= size - known
    return place
