"""The marker of a restore that has begun: until it is gone, the stores are not a platform's."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sqlalchemy import make_url

from mlplat.durable import sync_folder
from mlplat.errors import BringUpError
from mlplat.metrics.store import MetricStore
from mlplat.settings import PlatformConfig

MARKER = "restore.json"


@dataclass(frozen=True)
class Unfinished:
    """A restore.

    Args:
        id: of this restore and no other.
        source, backup: what is restored.
        postgres, metrics, artifacts: the stores that it fills, which were empty; no passwords.
    """

    id: str
    source: str
    backup: str
    postgres: str
    metrics: str
    artifacts: str

    @property
    def stores(self) -> tuple[str, str, str]:
        """What it fills."""
        return self.postgres, self.metrics, self.artifacts

    def of(self, backup: str, source: str) -> Unfinished:
        """The same restore, now of this backup."""
        return self if self.backup == backup else replace(self, id=uuid.uuid4().hex, backup=backup, source=source)


def begin(config: PlatformConfig, source: str, backup: str) -> Unfinished:
    """A restore into these stores."""
    return Unfinished(
        id=uuid.uuid4().hex,
        source=source,
        backup=backup,
        postgres=make_url(config.postgres_url).render_as_string(hide_password=True),
        metrics=MetricStore(config.clickhouse_url).where,
        artifacts=config.artifacts_url,
    )


def read_marker(state_dir: Path) -> Unfinished | None:
    """The restore that has begun, if one has.

    Raises:
        BringUpError: the marker cannot be read.
    """
    path = state_dir / MARKER
    try:
        return Unfinished(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError) as error:
        raise BringUpError(f"{path} is damaged: a restore has begun here, and nobody knows which") from error


def write_marker(state_dir: Path, restore: Unfinished) -> None:
    """From now on the stores are not a platform's."""
    partial = state_dir / f"{MARKER}.partial"
    with partial.open("w") as out:
        json.dump(asdict(restore), out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(state_dir / MARKER)
    sync_folder(state_dir)


def remove_marker(state_dir: Path) -> None:
    """From now on they are."""
    (state_dir / MARKER).unlink(missing_ok=True)
    sync_folder(state_dir)


def require_finished(state_dir: Path) -> None:
    """Checks that no restore is under way or broke off.

    Raises:
        BringUpError: one is, or did.
    """
    restore = read_marker(state_dir)
    if restore is not None:
        raise BringUpError(
            "a restore has begun and has not been finished; run it again: "
            f"mlplat restore {restore.source} --at {restore.backup}"
        )
