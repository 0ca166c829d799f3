"""Taking a backup of an installation that is in use.

Postgres first, from one snapshot; then the points, then the artifacts. Both are later than the snapshot and have all
that it refers to: points are read with all that was acknowledged before, and nothing is purged meanwhile.
"""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from mlplat.backup.artifacts import dump_artifacts
from mlplat.backup.connection import connected
from mlplat.backup.model import FORMAT, INDEX, MANIFEST, UPLOADS, VERSION, Backup, backup_name
from mlplat.backup.points import Query, dump_points
from mlplat.backup.rows import dump_rows, lock_removals, require_connected
from mlplat.backup.tree import Tree
from mlplat.db.migrate import head_revision
from mlplat.settings import PlatformConfig
from mlplat.tally import Tally, no_tally


def take_backup(config: PlatformConfig, version: str, query: Query, place: Tree, tally: Tally = no_tally) -> Backup:
    """Adds a backup to those of the place, and returns it when it is complete.

    Args:
        version: of mlplat.
        query: reads points, see ``points.dump_points``.

    Raises:
        Overloaded: a purge or another backup is under way.
        Unavailable: a store is away; what was written is no backup.
    """
    artifacts = Tree(config.artifacts_url, scratch=UPLOADS)
    with connected(config.postgres_url, "backup") as connection:
        lock_removals(connection)
        place.clear_scratch()
        begun_at = connection.execute("SELECT clock_timestamp()").fetchone()
        assert begun_at is not None
        name = backup_name(begun_at[0])
        rows = dump_rows(connection, place, f"{name}/", tally)
        points, points_files = dump_points(query, rows.runs, place, f"{name}/", tally)
        copied, index = dump_artifacts(artifacts, place, f"{name}/", tally)
        require_connected(connection)
    backup = Backup(
        format=FORMAT,
        version=VERSION,
        name=name,
        schema=head_revision(),
        platform=version,
        taken_at=rows.taken_at,
        finished_at=datetime.now(UTC),
        transactions=rows.transactions,
        tables=rows.tables,
        sequences=rows.sequences,
        points=points,
        artifacts=copied.artifacts,
        artifact_bytes=copied.bytes,
        copied_bytes=copied.copied_bytes,
        files={**rows.files, **points_files, INDEX: index},
    )
    place.settle()
    with place.writing(f"{name}/{MANIFEST}") as out:
        out.write(msgspec.json.format(msgspec.json.encode(backup), indent=1))
    place.settle()
    return backup
