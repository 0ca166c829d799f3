"""A ClickHouse for tests: ``tests.clickhouse_http`` as a process that can be killed, frozen and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from cluster.ports import free_port, is_listening
from tests.faults.proxy import FaultProxy
from tests.platform import ROOT, eventually


@dataclass
class ClickHouse:
    """One server on a folder of its own. ``start`` may follow ``kill``; the data and the port stay."""

    folder: Path
    port: int = field(default_factory=free_port)
    login: str | None = None
    certificate: Path | None = None
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What ``MLPLAT_CLICKHOUSE_URL`` takes, without login and TLS."""
        return f"clickhouse://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts the server and returns when it accepts connections."""
        assert self._process is None
        command = [sys.executable, "-m", "tests.clickhouse_http", f"--port={self.port}", f"--path={self.folder}"]
        command += [f"--login={self.login}"] if self.login else []
        command += [f"--certificate={self.certificate}"] if self.certificate else []
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log,
            )  # fmt: skip
        eventually(self._answers, 60, "the ClickHouse of the tests is up")

    def kill(self) -> None:
        """``kill -9``; does nothing when it is down."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def freeze(self) -> None:
        """Stops every thread of it; connections stay open and nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
        if self.certificate:
            return is_listening(self.port)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@dataclass(frozen=True)
class RemoteStore:
    """A ClickHouse server and the proxy through which a platform reaches it."""

    server: ClickHouse
    proxy: FaultProxy

    @property
    def url(self) -> str:
        """What the platform is given."""
        return f"clickhouse://{self.server.login}@127.0.0.1:{self.proxy.port}/mlplat"
