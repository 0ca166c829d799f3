"""Which platform of the tests runs: one at a time, for each takes a fifth of a core and a gigabyte when idle."""

from __future__ import annotations

from pathlib import Path

from tests.platform import Platform


class Platforms:
    """The running platform, if there is one."""

    def __init__(self) -> None:
        self._running: Platform | None = None

    def run(self, platform: Platform, cwd: Path | None = None) -> None:
        """Makes ``platform`` the running one: stops another, and starts this one from the folder ``cwd``."""
        if self._running is platform:
            return
        self.stop()
        self._running = platform
        try:
            platform.mlplat("up", cwd=cwd)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stops the running one; nothing of it is left but its data."""
        running, self._running = self._running, None
        if running is not None:
            running.mlplat("down")
            assert not running.left_over()
