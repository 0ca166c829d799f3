"""The format of a backup, and the rules for choosing one. No I/O.

Below the place that was given for them, each backup has a folder of its own, named by its time::

    20260131T120000.000000Z/postgres/run.copy.zst …   every table, as Postgres' COPY writes it
    20260131T120000.000000Z/metrics/00000.parquet …   every metric point
    20260131T120000.000000Z/artifacts.jsonl.zst       every artifact: its key, size and SHA-256
    20260131T120000.000000Z/backup.json               written last: what is here, with a SHA-256 of each file
    artifacts/blobs/…, artifacts/files/…              bytes of artifacts, shared by all backups, never changed

A folder without ``backup.json`` is a backup that broke off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from mlplat.artifacts import layout
from mlplat.errors import InvalidInput

FORMAT = "mlplat-backup"
VERSION = 1
MANIFEST = "backup.json"
INDEX = "artifacts.jsonl.zst"
SHARED = "artifacts/"
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
#: Keys of the artifact store below these: bytes named by their digest, and what is not complete yet.
BLOBS, UPLOADS = f"{layout.BLOBS}/", f"{layout.UPLOADS}/"

_NAME_FORMAT = "%Y%m%dT%H%M%S.%fZ"
_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z\Z", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}\Z", re.ASCII)
_WORD = re.compile(r"[a-z_][a-z0-9_]{0,62}\Z", re.ASCII)
_POINTS = re.compile(r"metrics/\d{5,9}\.parquet\Z", re.ASCII)
#: SHA-256, then in any order a mark of compression and the number of a generation.
_BLOB = re.compile(r"(?:.*/)?([0-9a-f]{64})(?:(\.zst)?(?:\.\d{1,19})?|\.\d{1,19}(\.zst))\Z", re.ASCII | re.DOTALL)


class DumpFile(msgspec.Struct, frozen=True):
    """A file of one backup."""

    sha256: str
    bytes: int


class DumpedTable(msgspec.Struct, frozen=True):
    """A table of Postgres. They are listed in an order in which each comes after those that it refers to."""

    name: str
    columns: list[str]
    rows: int

    @property
    def file(self) -> str:
        """Where its rows are."""
        return table_file(self.name)


class DumpedSequence(msgspec.Struct, frozen=True):
    """Where the numbers of a column go on; ``last`` was given out already if ``called``."""

    table: str
    column: str
    last: int
    called: bool


class Backup(msgspec.Struct, frozen=True):
    """``backup.json``.

    Args:
        schema: the revision of Postgres' tables.
        platform: the version of mlplat that wrote it.
        taken_at: the moment that Postgres' tables show; points and artifacts are of then or a little later.
        transactions: no transaction whose number is in the tables has this number or a higher one.
        artifacts: how many there are, and their bytes.
        copied_bytes: how many of these no earlier backup had.
    """

    format: str
    version: int
    name: str
    schema: str
    platform: str
    taken_at: datetime
    finished_at: datetime
    transactions: int
    tables: list[DumpedTable]
    sequences: list[DumpedSequence]
    points: int
    artifacts: int
    artifact_bytes: int
    copied_bytes: int
    files: dict[str, DumpFile]

    @property
    def rows(self) -> int:
        """Rows of all tables."""
        return sum(table.rows for table in self.tables)

    def rows_of(self, table: str) -> int:
        """Rows of one table; 0 where there is none."""
        return next((each.rows for each in self.tables if each.name == table), 0)

    @property
    def dump_bytes(self) -> int:
        """Bytes of its own files, without the artifacts."""
        return sum(file.bytes for file in self.files.values())

    @property
    def summary(self) -> dict[str, object]:
        """What people and scripts want to know of it."""
        return {
            "name": self.name,
            "taken_at": self.taken_at.isoformat(),
            "finished_at": self.finished_at.isoformat(),
            "schema": self.schema,
            "platform": self.platform,
            "runs": self.rows_of("run"),
            "rows": self.rows,
            "points": self.points,
            "artifacts": self.artifacts,
            "artifact_bytes": self.artifact_bytes,
            "dump_bytes": self.dump_bytes,
            "copied_bytes": self.copied_bytes,
        }

    @property
    def points_files(self) -> list[str]:
        """The files with metric points, in order."""
        return sorted(name for name in self.files if _POINTS.match(name))


class Artifact(msgspec.Struct, frozen=True, array_like=True):
    """A line of the index. ``sha256`` is None of a blob, which has its digest in its name."""

    key: str
    bytes: int
    sha256: str | None

    @property
    def place(self) -> str:
        """Where the bytes are, below the place of all backups."""
        if self.sha256 is None:
            return f"{SHARED}blobs/{self.key.removeprefix(BLOBS)}"
        return f"{SHARED}files/{self.sha256[:2]}/{self.sha256}"


@dataclass(frozen=True)
class BlobName:
    """What the name of a blob says of its bytes; the digest is of what comes out of the compression."""

    sha256: str
    compressed: bool


def table_file(table: str) -> str:
    """Where the rows of a table are."""
    return f"postgres/{table}.copy.zst"


def points_file(number: int) -> str:
    """The n-th file with metric points, from 0."""
    return f"metrics/{number:05d}.parquet"


def blob_name(key: str) -> BlobName | None:
    """What the key of an artifact says of its bytes; None: nothing, for it is no blob."""
    found = _BLOB.match(key) if key.startswith(BLOBS) else None
    return BlobName(found[1], bool(found[2] or found[3])) if found else None


def backup_name(taken_at: datetime) -> str:
    """The folder of a backup of that moment."""
    return taken_at.astimezone(UTC).strftime(_NAME_FORMAT)


def is_backup_name(name: str) -> bool:
    """Whether a folder is a backup's."""
    return bool(_NAME.match(name))


def parse_backup(body: bytes, name: str) -> Backup:
    """The backup that a folder's ``backup.json`` describes, with all names in it checked.

    Raises:
        InvalidInput: it is none, or of a later format.
    """
    where = f"{name}/{MANIFEST}"
    try:
        backup = msgspec.json.decode(body, type=Backup)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{where} is damaged: {error}") from error
    if backup.format != FORMAT or backup.version != VERSION:
        raise InvalidInput(
            f"{where}: format {backup.format[:50]!r} {backup.version} is not known here, only {FORMAT} {VERSION}"
        )
    if backup.name != name:
        raise InvalidInput(f"{where} is of backup {backup.name[:50]!r}")
    _check_names(backup, where)
    return backup


def _check_names(backup: Backup, where: str) -> None:
    words = [word for table in backup.tables for word in (table.name, *table.columns)]
    words += [word for sequence in backup.sequences for word in (sequence.table, sequence.column)]
    bad = next((word for word in words if not _WORD.match(word)), None)
    if bad is not None:
        raise InvalidInput(f"{where}: {bad[:80]!r} is no name of a table or column")
    own = {table.file for table in backup.tables}
    for name, file in backup.files.items():
        if name not in own and name != INDEX and not _POINTS.match(name):
            raise InvalidInput(f"{where}: a file may not have the name {name[:200]!r}")
        if not _SHA256.match(file.sha256) or file.bytes < 0:
            raise InvalidInput(f"{where}: size or SHA-256 of {name[:200]!r} is malformed")
    missing = sorted((own | {INDEX}) - backup.files.keys())
    if missing:
        raise InvalidInput(f"{where} does not list {missing[0]}")


def parse_artifact(line: bytes) -> Artifact:
    """A line of the index.

    Raises:
        InvalidInput: malformed.
    """
    try:
        found = msgspec.json.decode(line, type=Artifact)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{INDEX} has a damaged line: {error}") from error
    sound = blob_name(found.key) is not None if found.sha256 is None else bool(_SHA256.match(found.sha256))
    if not sound or found.bytes < 0 or not is_key(found.key):
        raise InvalidInput(f"{INDEX} has a damaged line: {found.key[:200]!r}")
    return found


def is_key(key: str) -> bool:
    """Whether a key names something below its root."""
    return bool(key) and "\0" not in key and not any(part in {"", ".", ".."} for part in key.split("/"))


def parse_at(text: str) -> datetime | str:
    """What ``--at`` names: a backup by its name, or a moment; without a zone in this machine's time.

    Raises:
        InvalidInput: neither.
    """
    if is_backup_name(text):
        return text
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            f"--at: expected a backup's name or a time such as 2026-01-31T12:00, not {text[:60]!r}"
        ) from error


def choose(backups: Mapping[str, Backup | None], at: datetime | str | None) -> Backup:
    """The backup to restore: the one of that name, or the last that was taken until then; without either, the last.

    Args:
        backups: by their names; None: it broke off.

    Raises:
        InvalidInput: there is none, or it broke off.
    """
    if isinstance(at, str):
        if at not in backups:
            raise InvalidInput(f"there is no backup {at}; there are {_some(sorted(backups))}")
        chosen = backups[at]
        if chosen is None:
            raise InvalidInput(f"backup {at} is incomplete: it has no {MANIFEST}")
        return chosen
    complete = [backup for backup in backups.values() if backup is not None]
    if not complete:
        raise InvalidInput("there is no complete backup" + (f", only {_some(sorted(backups))}" if backups else ""))
    found = [backup for backup in complete if at is None or backup.taken_at <= at]
    if not found:
        first = min(complete, key=lambda backup: backup.taken_at)
        raise InvalidInput(f"no complete backup is so old; the first is {first.name}")
    return max(found, key=lambda backup: backup.taken_at)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[-5:]) or "none"
