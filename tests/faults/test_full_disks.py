"""Disks that fill up: what was acknowledged stays, reads go on, and service is back once there is room.

Each fault prints a line: fault → what fired → acknowledged, lost, twice, longest gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import short_folder
from tests.faults import full_disks as faults
from tests.faults.disks import MIB, small_disk
from tests.faults.rounds import strike
from tests.faults.stage import Disks
from tests.platform import Platform
from tests.platforms import Platforms

POSTGRES_BYTES, METRICS_BYTES = 640 * MIB, 256 * MIB


@dataclass(frozen=True)
class Cramped:
    """A platform on small disks."""

    platform: Platform
    disks: Disks


@pytest.fixture(scope="module")
def cramped(platforms: Platforms) -> Iterator[Cramped]:
    """The module's platform."""
    with (
        short_folder() as folder,
        small_disk(folder / "postgres" / "data", POSTGRES_BYTES) as postgres,
        small_disk(folder / "chdb", METRICS_BYTES) as metrics,
    ):
        platform = Platform(folder)
        platforms.run(platform)
        yield Cramped(platform, Disks(postgres, metrics))
        platforms.stop()


def test_full_disks_lose_nothing(cramped: Cramped, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequence = [faults.postgres_disk_fills_up, faults.metrics_disk_full, faults.postgres_disk_full_at_once]
    strike(cramped.platform, sequence, tmp_path, capsys, disks=cramped.disks)
