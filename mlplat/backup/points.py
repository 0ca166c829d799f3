"""Metric points in a backup: Parquet files with the points of all runs of the Postgres snapshot.

They are read through the shard, after that snapshot. A read sees every point that was acknowledged before it, and so
every point that was acknowledged before the snapshot: what lay in Postgres' metric log by then is in the metric store
when it is read, and the log itself need not be kept. Points of later moments are there, too, but only of runs that the
snapshot knows. What summarises points is made again when they are restored, and so is each run's experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from mlplat.backup.model import Backup, DumpFile, points_file
from mlplat.backup.tree import Tree
from mlplat.errors import InvalidInput
from mlplat.metrics import queries
from mlplat.metrics.model import SCHEMA, STORED_SCHEMA, concat, with_experiments
from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from mlplat.tally import Tally, no_tally

#: Rows of a read. In a page are many runs, or a part of one.
Query = Callable[[Statement], pa.Table]
PAGE_POINTS = 250_000
PAGE_RUNS = 250
FILE_POINTS = 8_000_000


def dump_points(
    query: Query, runs: Sequence[tuple[str, int]], tree: Tree, folder: str, tally: Tally = no_tally
) -> tuple[int, dict[str, DumpFile]]:
    """Writes the points of these runs (ids and experiments); returns their number and the files.

    Raises:
        Unavailable: the metric store is away, or too far behind.
    """
    experiments = dict(runs)
    files: dict[str, DumpFile] = {}
    pages = _pages(query, [run_id for run_id, _experiment in runs])
    total, page = 0, next(pages, None)
    while page is not None:
        name, in_file = points_file(len(files)), 0
        with tree.writing(f"{folder}{name}") as sink:
            with pq.ParquetWriter(sink, STORED_SCHEMA, compression="zstd") as out:
                while page is not None and in_file < FILE_POINTS:
                    out.write_table(with_experiments(page, experiments))
                    in_file += page.num_rows
                    total += page.num_rows
                    tally("points", total, None)
                    page = next(pages, None)
            files[name] = DumpFile(sink.sha256, sink.bytes)
    return total, files


def load_points(store: MetricStore, tree: Tree, backup: Backup, tally: Tally = no_tally) -> None:
    """Puts the points into an empty metric store, with its tables.

    Raises:
        InvalidInput: there are less or more than the backup says.
        Unavailable: the metric store is away.
    """
    done = 0
    for name in backup.points_files:
        with tree.open(f"{backup.name}/{name}") as source, pq.ParquetFile(source) as file:
            for number in range(file.num_row_groups):
                points = concat([file.read_row_group(number).cast(STORED_SCHEMA)])
                store.insert(points)
                done += points.num_rows
                tally("points", done, backup.points)
    if done != backup.points:
        raise InvalidInput(f"{backup.name} has {done} metric points, it says that it has {backup.points}")


def stored_points(store: MetricStore) -> int:
    """How many rows there are, of any kind."""
    counted = store.query(
        Statement(
            "SELECT sum(total_rows) AS n FROM system.tables WHERE database = currentDatabase() "
            "AND name IN ('metric_points', 'metric_latest', 'run_metrics')"
        )
    )
    return int(counted["n"][0].as_py() or 0)


def remove_points(store: MetricStore) -> None:
    """Empties the metric store."""
    store.change([Statement(f"TRUNCATE TABLE {name}") for name in ("metric_points", "metric_latest", "run_metrics")])


def _pages(query: Query, run_ids: Sequence[str]) -> Iterator[pa.Table]:
    """Tables of ``SCHEMA`` in one chunk, none of them empty."""
    for start in range(0, len(run_ids), PAGE_RUNS):
        some = run_ids[start : start + PAGE_RUNS]
        after: tuple[str, str, int, int, float] | None = None
        while True:
            page = query(queries.points_of(some, PAGE_POINTS, after))
            if page.num_rows:
                yield concat([page.select(SCHEMA.names).cast(SCHEMA)])
            if page.num_rows < PAGE_POINTS:
                break
            last = page.slice(page.num_rows - 1).to_pylist()[0]
            after = last["run_id"], last["key"], last["step"], last["timestamp"], last["value"]
