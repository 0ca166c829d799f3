"""The archive of metric points: runs that ended long ago, each as a Parquet file in the artifact store.

A run's file is complete as of when it was written. What searches and compares runs, the last, least and greatest
value of each metric, stays in the metric store and has no part in this.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import ColumnElement, delete, func, literal, select, update
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.types import Text

from mlplat.artifacts.layout import ARCHIVED_METRICS
from mlplat.artifacts.store import ArtifactStore
from mlplat.db.tables import metric_archive
from mlplat.errors import Corrupted, NotFound
from mlplat.metrics.model import SCHEMA, concat

#: Points that are in memory at once, about 8 MiB; also the rows of a row group.
PAGE_POINTS = 200_000
_COPY_BYTES = 1024 * 1024


def archive_path(run_id: str) -> str:
    """Where in the artifact store the points of a run are."""
    return f"{ARCHIVED_METRICS}/{run_id[:2]}/{run_id}.parquet"


class ArchiveFiles:
    """The files. Methods block and are thread-safe. The store is opened when it is first needed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._store: ArtifactStore | None = None

    def write(self, run_id: str, pages: Iterable[pa.Table]) -> tuple[int, int]:
        """Stores the points of a run (tables of ``SCHEMA``); returns how many there are, and the file's bytes.

        Without points there is no file.

        Raises:
            StorageFull, Unavailable: nothing was changed.
        """
        points = 0
        with tempfile.TemporaryFile() as file:
            with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                for page in pages:
                    writer.write_table(page)
                    points += page.num_rows
            size = file.tell()
            if points:
                file.seek(0)
                self._open().write(archive_path(run_id), iter(partial(file.read, _COPY_BYTES), b""))
        return (points, size) if points else (0, 0)

    def read(self, run_id: str) -> Iterator[pa.Table]:
        """The points of a run, as tables of ``SCHEMA`` in one chunk.

        Raises:
            Corrupted: the file is gone or damaged.
        """
        with tempfile.TemporaryFile() as file:
            self._fetch(run_id, file)
            try:
                with pq.ParquetFile(file, read_dictionary=["run_id", "key"]) as parquet:
                    for group in range(parquet.num_row_groups):
                        yield concat([parquet.read_row_group(group).cast(SCHEMA)])
            except pa.ArrowException as error:
                raise Corrupted(f"the archived points of run {run_id} cannot be read: {error}") from error

    def delete(self, run_ids: Iterable[str]) -> None:
        """Removes the files of runs; one that is not there is fine."""
        for run_id in run_ids:
            self._open().delete(archive_path(run_id))

    def _fetch(self, run_id: str, file: IO[bytes]) -> None:
        try:
            for piece in self._open().read(archive_path(run_id)):
                file.write(piece)
        except NotFound as error:
            raise Corrupted(f"the archived points of run {run_id} are gone: {error.message}") from error
        file.seek(0)

    def _open(self) -> ArtifactStore:
        if self._store is None:
            self._store = ArtifactStore(self._url)
        return self._store


class ArchiveTable:
    """Which runs are archived. A run whose points may be in the metric store as well is ``hot``."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def is_empty(self) -> bool:
        """Whether nothing was ever archived."""
        async with self._engine.connect() as connection:
            return (await connection.execute(select(metric_archive.c.run_id).limit(1))).first() is None

    async def archived(self, run_ids: Sequence[str]) -> dict[str, int]:
        """Those of the runs that have a file, with its bytes."""
        query = select(metric_archive.c.run_id, metric_archive.c.bytes).where(_is_one_of(run_ids))
        async with self._engine.connect() as connection:
            rows = await connection.execute(query.where(metric_archive.c.points > 0).order_by(metric_archive.c.run_id))
            return {row.run_id: row.bytes for row in rows}

    async def record(self, run_id: str, points: int, size: int) -> None:
        """A run's file was written; its points are still in the metric store, if there are any."""
        values = {
            "points": points, "bytes": size, "archived_at": func.clock_timestamp(),
            "hot_since": func.clock_timestamp() if points else None,
        }  # fmt: skip
        statement = insert(metric_archive).values(run_id=run_id, **values)
        async with self._engine.begin() as connection:
            await connection.execute(statement.on_conflict_do_update(index_elements=["run_id"], set_=values))

    async def set_hot(self, run_ids: Sequence[str], is_hot: bool) -> None:
        """The points of these runs come back into the metric store, or have left it."""
        statement = update(metric_archive).where(_is_one_of(run_ids))
        async with self._engine.begin() as connection:
            await connection.execute(statement.values(hot_since=func.clock_timestamp() if is_hot else None))

    async def forget(self, run_ids: Sequence[str]) -> None:
        """The files of these runs are gone."""
        async with self._engine.begin() as connection:
            await connection.execute(delete(metric_archive).where(_is_one_of(run_ids)))


def _is_one_of(run_ids: Sequence[str]) -> ColumnElement[bool]:
    return metric_archive.c.run_id == func.any(literal(list(run_ids), ARRAY(Text)))
