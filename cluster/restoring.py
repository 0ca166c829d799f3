"""``restore``: makes an empty installation that is down the one of a backup. May be interrupted and repeated.

Order: artifacts, metric points, then Postgres in one transaction, which makes it a platform. A marker in the state
folder keeps ``up`` out from the first write to the last.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cluster.connection import exclusive, living_record, plain_errors
from cluster.disk import require_space
from cluster.postgres import EmbeddedPostgres
from cluster.ray_head import find_processes, temp_dir
from cluster.unfinished import Unfinished, begin, read_marker, remove_marker, write_marker
from mlplat.backup.artifacts import load_artifacts
from mlplat.backup.catalog import open_place, pick, require_sound_files
from mlplat.backup.connection import connected
from mlplat.backup.model import UPLOADS, Backup
from mlplat.backup.points import load_points, remove_points, stored_points
from mlplat.backup.rows import has_rows, load_rows, marked, pass_transactions
from mlplat.backup.tree import Tree
from mlplat.backup.tree import plain_errors as plain_storage_errors
from mlplat.db.migrate import migrate, require_known
from mlplat.errors import BringUpError
from mlplat.metrics.store import MetricStore
from mlplat.settings import PlatformConfig, Settings
from mlplat.tally import Tally, no_tally


def restore(
    settings: Settings, source: str, at: datetime | str | None, *, skip_damaged: bool, tally: Tally = no_tally
) -> tuple[Backup, list[str]]:
    """Restores the backup that ``at`` chooses; returns it, and what is wrong with artifacts that were left out.

    Raises:
        BringUpError: the platform is up, or a store is not empty, or the backup is of a newer version.
        InvalidInput: there is no such backup, or it is incomplete.
        Corrupted: an artifact is not what it was, and damaged ones are not to be skipped.
        Unavailable: a store is away.
    """
    config, place = settings.config, open_place(source)
    with exclusive(settings), plain_errors(settings), plain_storage_errors(source):
        unfinished = read_marker(settings.state_dir)
        _require_down(settings, unfinished)
        backup = pick(place, at)
        require_known(backup.schema)
        require_sound_files(place, backup, tally)
        if unfinished is None:
            _require_empty(settings)
            unfinished = begin(config, source, backup.name)
        else:
            _require_same(unfinished, begin(config, source, backup.name))
            unfinished = unfinished.of(backup.name, source)
        require_space(settings.state_dir)
        write_marker(settings.state_dir, unfinished)
        problems = _fill(settings, place, backup, unfinished, skip_damaged=skip_damaged, tally=tally)
        remove_marker(settings.state_dir)
        return backup, problems


def _require_down(settings: Settings, unfinished: Unfinished | None) -> None:
    server = settings.postgres_url is None and EmbeddedPostgres(settings.state_dir)
    is_up = living_record(settings) is not None or find_processes(temp_dir(settings.state_dir))
    # A restore that was killed leaves its server running.
    if is_up or (unfinished is None and server and server.is_running()):
        raise BringUpError("the platform is running; a backup is restored into an empty one that is down: mlplat down")


def _require_empty(settings: Settings) -> None:
    for check in (_postgres_in_use, _metrics_in_use, _artifacts_in_use):
        found = check(settings)
        if found is not None:
            raise BringUpError(
                f"a backup is restored into an empty installation, and {found}. "
                "MLPLAT_STATE_DIR names another state folder."
            )


def _postgres_in_use(settings: Settings) -> str | None:
    if settings.postgres_url is None:
        data = EmbeddedPostgres(settings.state_dir).data
        return f"{data} has a database" if (data / "PG_VERSION").exists() else None
    with connected(settings.postgres_url, "restore") as connection:
        table = has_rows(connection)
    return None if table is None else f"the database of MLPLAT_POSTGRES_URL has rows in {table}"


def _metrics_in_use(settings: Settings) -> str | None:
    if settings.clickhouse_url is None:
        folder = _chdb_folder(settings)
        return f"{folder} has metric points" if folder.is_dir() and any(folder.iterdir()) else None
    with _metric_store(settings.config) as store:
        store.create_tables()  # and their database
        return "the database of MLPLAT_CLICKHOUSE_URL has metric points" if stored_points(store) else None


def _artifacts_in_use(settings: Settings) -> str | None:
    url = settings.config.artifacts_url
    with plain_storage_errors(url):
        return None if _artifact_tree(settings.config).is_empty() else f"there are artifacts at {url}"


def _require_same(unfinished: Unfinished, now: Unfinished) -> None:
    for before, after in zip(unfinished.stores, now.stores, strict=True):
        if before != after:
            raise BringUpError(f"a restore into {before} has not been finished, and the settings say {after} now")


def _fill(
    settings: Settings, place: Tree, backup: Backup, restore: Unfinished, *, skip_damaged: bool, tally: Tally
) -> list[str]:
    config = settings.config
    with _postgres(settings, backup):
        if _is_filled(config, restore):  # all that was left to do was to remove the marker
            return []
        with plain_storage_errors(config.artifacts_url):
            artifacts = _artifact_tree(config)
            problems = load_artifacts(place, backup, artifacts, skip_damaged=skip_damaged, tally=tally)
            artifacts.settle()
        _fill_metrics(settings, place, backup, tally)
        migrate(config.postgres_url, backup.schema)
        with connected(config.postgres_url, "restore") as connection:
            pass_transactions(connection, backup.transactions, tally)
            load_rows(connection, place, backup, restore.id, tally)
    return problems


@contextmanager
def _postgres(settings: Settings, backup: Backup) -> Iterator[None]:
    """An embedded server runs meanwhile: a new one, whatever an earlier attempt left."""
    if settings.postgres_url is not None:
        yield
        return
    server = EmbeddedPostgres(settings.state_dir)
    server.destroy()
    server.create(backup.transactions)
    server.start()
    try:
        yield
    finally:
        server.stop()


def _is_filled(config: PlatformConfig, restore: Unfinished) -> bool:
    with connected(config.postgres_url, "restore") as connection:
        return marked(connection) == restore.id


def _fill_metrics(settings: Settings, place: Tree, backup: Backup, tally: Tally) -> None:
    if settings.clickhouse_url is None:
        shutil.rmtree(_chdb_folder(settings), ignore_errors=True)
    with _metric_store(settings.config) as store:
        store.create_tables()
        if settings.clickhouse_url is not None:
            remove_points(store)  # of an attempt that broke off
        load_points(store, place, backup, tally)


@contextmanager
def _metric_store(config: PlatformConfig) -> Iterator[MetricStore]:
    store = MetricStore(config.clickhouse_url)
    try:
        yield store
    finally:
        store.close()


def _artifact_tree(config: PlatformConfig) -> Tree:
    return Tree(config.artifacts_url, scratch=UPLOADS)


def _chdb_folder(settings: Settings) -> Path:
    return Path(settings.config.clickhouse_url.removeprefix("chdb://"))
