"""Which backups there are below one place, and whether they are sound."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from mlplat.backup.artifacts import check_artifacts
from mlplat.backup.model import MANIFEST, MAX_MANIFEST_BYTES, Backup, choose, is_backup_name, parse_backup
from mlplat.backup.tree import Missing, Tree
from mlplat.errors import InvalidInput
from mlplat.tally import Tally, no_tally

#: Where files of a disk are until they are complete.
SCRATCH = ".partial"


def place_url(text: str) -> str:
    """The URL of a place as people name it: a folder, ``file:///…`` or ``s3://…``.

    Raises:
        InvalidInput: a URL of another kind.
    """
    if "://" not in text:
        return f"file://{Path(text).expanduser().absolute()}"
    if not text.startswith(("file:///", "s3://")):
        raise InvalidInput(f"backups lie in a folder or at s3://…, not at {text}")
    return text


def open_place(url: str) -> Tree:
    """The place of backups at a URL."""
    return Tree(url, scratch=SCRATCH, private=True)


def find_backups(place: Tree) -> dict[str, Backup | None]:
    """All backups by name, in the order of time; None: it broke off.

    Raises:
        InvalidInput: one has a damaged ``backup.json``, or a newer mlplat wrote it.
    """
    found: dict[str, Backup | None] = {}
    for name in filter(is_backup_name, place.children()):
        found[name] = None
        with suppress(Missing):
            found[name] = parse_backup(place.read_small(f"{name}/{MANIFEST}", MAX_MANIFEST_BYTES), name)
    return found


def pick(place: Tree, at: datetime | str | None) -> Backup:
    """See ``choose``."""
    try:
        return choose(find_backups(place), at)
    except InvalidInput as error:
        raise InvalidInput(f"{place.url.removeprefix('file://')}: {error.message}") from error


def check_files(place: Tree, backup: Backup, tally: Tally = no_tally) -> Iterator[str]:
    """Reads all files of the backup's own; says what is wrong."""
    done = 0
    for name, file in sorted(backup.files.items()):
        digest, size = hashlib.sha256(), 0
        try:
            for chunk in place.read(f"{backup.name}/{name}"):
                digest.update(chunk)
                size += len(chunk)
        except Missing:
            yield f"{backup.name}/{name} is missing"
            continue
        if size != file.bytes or digest.hexdigest() != file.sha256:
            yield f"{backup.name}/{name} is corrupt: its size or SHA-256 is another one"
        done += file.bytes
        tally("bytes of dumps checked", done, backup.dump_bytes)


def verify(place: Tree, backup: Backup, tally: Tally = no_tally) -> list[str]:
    """Reads all that belongs to the backup; says what is wrong."""
    problems = list(check_files(place, backup, tally))
    if problems:  # the index may be one of them
        return problems
    return list(check_artifacts(place, backup, tally))


def require_sound_files(place: Tree, backup: Backup, tally: Tally = no_tally) -> None:
    """See ``check_files``.

    Raises:
        InvalidInput: something is wrong.
    """
    for problem in check_files(place, backup, tally):
        raise InvalidInput(f"{problem}; this backup cannot be restored, choose another one with --at")
