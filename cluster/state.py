"""What bring-up remembers in the state folder: one small file, written whole."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

STATE_FILE = "platform.json"


@dataclass(frozen=True)
class ClusterRecord:
    """The Ray cluster that this state folder's platform runs in."""

    ray_address: str
    dashboard_url: str | None
    http_url: str
    #: Processes of the head that bring-up started; empty when it joined a cluster.
    head_pids: list[int]
    #: ``starting`` until every part answered once.
    phase: str


def read_record(state_dir: Path) -> ClusterRecord | None:
    """The last record, or None when there is none (or only an unreadable one)."""
    try:
        return ClusterRecord(**json.loads((state_dir / STATE_FILE).read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def write_record(state_dir: Path, record: ClusterRecord) -> None:
    """Replaces the record at once."""
    partial = state_dir / f"{STATE_FILE}.partial"
    with partial.open("w") as out:
        json.dump(asdict(record), out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(state_dir / STATE_FILE)


def remove_record(state_dir: Path) -> None:
    """Forgets the cluster."""
    (state_dir / STATE_FILE).unlink(missing_ok=True)
