"""``backup``: of the platform that is up, without a pause."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pyarrow as pa
import ray

from actors.handles import MetricShardClient
from cluster.connection import connect, living_record, plain_errors
from cluster.unfinished import require_finished
from mlplat import __version__
from mlplat.backup.catalog import open_place
from mlplat.backup.model import SHARED, Backup
from mlplat.backup.taking import take_backup
from mlplat.backup.tree import Tree
from mlplat.backup.tree import plain_errors as plain_storage_errors
from mlplat.errors import BringUpError, InvalidInput
from mlplat.metrics.queries import Statement
from mlplat.settings import PlatformConfig, Settings
from mlplat.tally import Tally, no_tally


def back_up(settings: Settings, target: str, tally: Tally = no_tally) -> Backup:
    """Adds a backup to those at ``target`` and returns it.

    Raises:
        BringUpError: the platform is not running.
        InvalidInput: the target lies in what is to be backed up.
        Overloaded: a purge or another backup is under way.
        Unavailable: a store is away.
    """
    require_finished(settings.state_dir)
    place = open_place(target)
    _require_apart(settings.config, place)
    record = living_record(settings)
    if record is None:
        raise BringUpError("the platform is not running; start it with: mlplat up")
    connect(record)
    try:
        with asyncio.Runner() as runner, plain_errors(settings), plain_storage_errors(target):
            shard = MetricShardClient()

            def query(statement: Statement) -> pa.Table:
                return runner.run(shard.query(statement))

            return take_backup(settings.config, __version__, query, place, tally)
    finally:
        ray.shutdown()


def _require_apart(config: PlatformConfig, place: Tree) -> None:
    folder = place.folder
    if folder is None:
        target, artifacts = f"{place.url.rstrip('/')}/", f"{config.artifacts_url.rstrip('/')}/"
        overlap = target.startswith(artifacts) or artifacts.startswith(f"{target}{SHARED}")
    else:
        local = config.artifacts_url.removeprefix("file://") if config.artifacts_url.startswith("file://") else None
        sources = [Path(source).resolve() for source in (config.state_dir, local) if source is not None]
        target_folder = folder.resolve()
        overlap = any(
            target_folder.is_relative_to(source) or source.is_relative_to(target_folder / SHARED) for source in sources
        )
    if overlap:
        raise InvalidInput(
            f"{place.url.removeprefix('file://')} lies in what is to be backed up, or the other way round: "
            "one would go into the other"
        )
