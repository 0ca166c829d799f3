"""Artifacts in a backup: an index of all keys, and bytes that all backups of one place share.

Blobs never change and are copied once, by their names. Anything else is kept by the digest of its bytes, so that each
backup has its own. It is copied before the blobs are looked for: these are then a superset of what it needs, as nothing
is purged meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec
import pyarrow as pa

from mlplat.backup.digests import actual, expected
from mlplat.backup.model import BLOBS, INDEX, SHARED, Artifact, Backup, DumpFile, blob_name, parse_artifact
from mlplat.backup.tree import Missing, Tree
from mlplat.errors import Corrupted, Unavailable
from mlplat.parallel import in_order
from mlplat.tally import Tally, no_tally

WORKERS = 8
#: Artifacts that are under way at once.
WINDOW = 256
#: Files up to this size are read once, larger ones twice when they are new.
SMALL_BYTES = 8 * 1024 * 1024
#: A line of the index has a key and little more. What is packed may be anything.
MAX_LINE_BYTES = 64 * 1024
#: How often a file that is written again while it is copied is looked at.
LOOKS = 3
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Copied:
    """What a backup has of artifacts; ``copied_bytes``: what no earlier one had."""

    artifacts: int = 0
    bytes: int = 0
    copied_bytes: int = 0


class _Changed(Exception):
    """A file was written while it was read."""


def dump_artifacts(source: Tree, target: Tree, folder: str, tally: Tally = no_tally) -> tuple[Copied, DumpFile]:
    """Copies what the target does not have yet, and writes the index below ``folder``.

    Raises:
        Unavailable: a file was written again and again.
    """
    have = target.sizes(SHARED)
    copied = Copied()
    with target.writing(f"{folder}{INDEX}") as sink:
        with pa.output_stream(sink, compression="zstd") as out:
            for only_blobs, keep in ((False, _keep_file), (True, _keep_blob)):
                found = source.sizes(BLOBS if only_blobs else "").items()
                wanted = [(key, size) for key, size in found if (blob_name(key) is not None) == only_blobs]
                for kept in _in_parallel(partial(keep, source, target, have), sorted(wanted)):
                    if kept is not None:
                        artifact, new_bytes = kept
                        out.write(msgspec.json.encode(artifact) + b"\n")
                        copied.artifacts += 1
                        copied.bytes += artifact.bytes
                        copied.copied_bytes += new_bytes
                        tally("artifacts", copied.artifacts, None)
        file = DumpFile(sink.sha256, sink.bytes)
    return copied, file


def load_artifacts(
    place: Tree, backup: Backup, target: Tree, *, skip_damaged: bool = False, tally: Tally = no_tally
) -> list[str]:
    """Makes the target's keys those of the backup; says what is wrong with those that were left out.

    Blobs that are there are left alone, so that it may be repeated; other keys than the backup's are removed.

    Raises:
        Corrupted: the bytes of one are not what they were, unless ``skip_damaged``.
    """
    have = target.sizes()
    problems, wanted = [], set[str]()
    brought = _in_parallel(partial(_bring, place, target, have), artifacts_of(place, backup))
    for done, (key, problem) in enumerate(brought, 1):
        if problem is not None and not skip_damaged:
            raise Corrupted(problem)
        if problem is None:
            wanted.add(key)
        else:
            problems.append(problem)
        tally("artifacts", done, backup.artifacts)
    for key in have.keys() - wanted:
        target.delete(key)
    return problems


def artifacts_of(place: Tree, backup: Backup) -> Iterator[Artifact]:
    """The backup's index."""
    with place.open(f"{backup.name}/{INDEX}") as source, pa.input_stream(source, compression="zstd") as body:
        rest = b""
        while block := body.read(SMALL_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield from map(parse_artifact, lines)
            if len(rest) > MAX_LINE_BYTES:
                raise Corrupted(f"{backup.name}/{INDEX} has a line of more than {MAX_LINE_BYTES} bytes")
    if rest:
        raise Corrupted(f"{backup.name}/{INDEX} ends in the middle of a line")


def damage(place: Tree, artifact: Artifact) -> str | None:
    """What is wrong with the bytes of an artifact in a backup."""
    try:
        with place.open(artifact.place) as source:
            return _difference(artifact, actual(source, artifact))
    except Missing:
        return f"{artifact.place} is missing"


def check_artifacts(place: Tree, backup: Backup, tally: Tally = no_tally) -> Iterator[str]:
    """Reads all bytes; says what is wrong."""
    for done, problem in enumerate(_in_parallel(partial(damage, place), artifacts_of(place, backup)), 1):
        tally("artifacts", done, backup.artifacts)
        if problem is not None:
            yield problem


def _keep_file(
    source: Tree, target: Tree, have: dict[str, int], listed: tuple[str, int]
) -> tuple[Artifact, int] | None:
    """What is in the target now, and its bytes if they are new there; None: the file is gone."""
    key, _size = listed
    for _look in range(LOOKS):
        try:
            size, sha256, body = _look_at(source, key)
            artifact = Artifact(key, size, sha256)
            if have.get(artifact.place) == size:
                return artifact, 0
            with target.writing(artifact.place) as sink:
                for chunk in [body] if body is not None else source.read(key):
                    sink.write(chunk)
                if sink.sha256 != sha256:
                    raise _Changed
            return artifact, size
        except Missing:
            return None
        except _Changed:
            continue
    raise Unavailable(f"the artifact {key} is written all the time; retry")


def _look_at(source: Tree, key: str) -> tuple[int, str, bytes | None]:
    """Size, SHA-256, and the bytes if they are few."""
    digest, size, body = hashlib.sha256(), 0, bytearray()
    for chunk in source.read(key):
        digest.update(chunk)
        size += len(chunk)
        if size <= SMALL_BYTES:
            body += chunk
    return size, digest.hexdigest(), bytes(body) if size <= SMALL_BYTES else None


def _keep_blob(
    source: Tree, target: Tree, have: dict[str, int], listed: tuple[str, int]
) -> tuple[Artifact, int] | None:
    key, size = listed
    artifact = Artifact(key, size, None)
    if have.get(artifact.place) == size:
        return artifact, 0
    with target.writing(artifact.place) as sink:
        try:
            for chunk in source.read(key):
                sink.write(chunk)
        except Missing as error:  # whoever removes blobs must hold the lock that a backup holds
            raise Unavailable(f"{key} was removed while it was backed up; retry") from error
    return Artifact(key, sink.bytes, None), sink.bytes


def _bring(place: Tree, target: Tree, have: dict[str, int], artifact: Artifact) -> tuple[str, str | None]:
    """The key, and what is wrong with its bytes."""
    if artifact.sha256 is None and have.get(artifact.key) == artifact.bytes:
        return artifact.key, None
    try:
        with place.open(artifact.place) as source, target.writing(artifact.key) as sink:
            problem = _difference(artifact, actual(source, artifact, sink))
            if problem is not None:
                raise Corrupted(problem)
    except Missing:
        return artifact.key, f"{artifact.place} is missing"
    except Corrupted as error:
        return artifact.key, error.message
    return artifact.key, None


def _difference(artifact: Artifact, found: tuple[int, str]) -> str | None:
    size, sha256 = found
    name = blob_name(artifact.key) if artifact.sha256 is None else None
    # The same bytes may have been compressed anew since, and better.
    if size != artifact.bytes and not (name is not None and name.compressed):
        return f"{artifact.place} has {size} bytes, the backup says {artifact.bytes}"
    if sha256 != expected(artifact):
        return f"{artifact.place} is corrupt: its SHA-256 is another one"
    return None


def _in_parallel(call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The answers, in order."""
    with ThreadPoolExecutor(WORKERS, "backup") as pool:
        yield from in_order(pool, WINDOW, (partial(call, item) for item in items))
