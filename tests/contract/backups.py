"""Backups that are put together by tests."""

from __future__ import annotations

from datetime import UTC, datetime

from mlplat.backup.model import FORMAT, VERSION, Backup, DumpFile
from mlplat.backup.rows import Rows
from mlplat.db.migrate import head_revision

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NO_ROWS = Rows(NOW, 3, [], [], {}, [])


def backup_of(
    rows: Rows = NO_ROWS, *, points: int = 0, artifacts: int = 0, files: dict[str, DumpFile] | None = None
) -> Backup:
    """A backup in the folder ``b``."""
    return Backup(
        format=FORMAT,
        version=VERSION,
        name="b",
        schema=head_revision(),
        platform="0",
        taken_at=rows.taken_at,
        finished_at=rows.taken_at,
        transactions=rows.transactions,
        tables=rows.tables,
        sequences=rows.sequences,
        points=points,
        artifacts=artifacts,
        artifact_bytes=0,
        copied_bytes=0,
        files=rows.files | (files or {}),
    )
