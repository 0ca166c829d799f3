"""A Ceph cluster of the least size, as files: one monitor, one disk, and what the S3 gateway needs to know.

All of it is in one folder and listens on 127.0.0.1. Its daemons trust one another (no cephx): whoever can reach this
machine's loopback could read the data of tests without S3's keys.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

#: Apparent size of the disk, a sparse file. Room is used again, never given back, until the folder goes.
DISK_BYTES = 16 * 1024**3
COMMAND_TIMEOUT_S = 90
#: Parts of Ceph that would write megabytes of log.
TALKATIVE = ("bdev", "bluefs", "bluestore", "mon", "ms", "osd", "paxos", "rocksdb")

# What is not obvious:
# - cluster addr: without it the disk listens on all interfaces for other disks.
# - ms mon client mode: the gateway asks for encryption of its own, which needs cephx.
# - objecter *: after a restart, whoever still talks to a disk that is gone asks for the new one soon (10 s otherwise).
# - bdev aio poll ms: closing the disk waits that long, eight times per start.
# - watch, notify timeout: a gateway that starts waits for its killed predecessor before it makes a bucket (30 s
#   otherwise).
# - mon data avail crit: a monitor on a nearly full disk would end itself.
# - *pg log entries, cache sizes, threads: less memory.
# - rgw gc *: room of deleted objects is free after a minute, not two hours; whoever reads one has that long.
_CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr1 = false
ms mon client mode = crc
objecter tick interval = 0.3
objecter timeout = 1
admin socket =
run dir = {folder}
crash dir = {folder}
log file =
mon cluster log file =
log to stderr = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
mon allow pool size one = true
{quiet}
[mon]
mon data = {folder}/mon
mon data avail warn = 1
mon data avail crit = 1
paxos propose interval = 0.05
paxos min wait = 0.01

[osd]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = {disk_bytes}
bluestore cache autotune = false
bluestore cache size = 67108864
bdev aio poll ms = 20
osd op num shards = 2
osd op num threads per shard = 2
osd client watch timeout = 3
osd default notify timeout = 1
osd max pg log entries = 500
osd min pg log entries = 100

[client.rgw]
rgw data = {folder}
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable apis = s3
rgw thread pool size = 64
rgw rados pool pg num min = 4
rgw override bucket index max shards = 1
rgw dynamic resharding = false
rgw gc obj min wait = 60
rgw gc processor period = 30
"""


@dataclass(frozen=True)
class Ceph:
    """The files of one cluster in ``folder``, and the commands that make and use them. Methods block."""

    folder: Path
    port: int
    mon_port: int
    fsid: UUID = field(default_factory=uuid4)

    @property
    def daemons(self) -> dict[str, tuple[str, ...]]:
        """Command lines of the processes, in the order in which they start; each stays in the foreground."""
        config = ("--conf", str(self._config))
        return {
            "monitor": ("ceph-mon", "-f", "--id", "a", *config),
            "disk": ("ceph-osd", "-f", "--id", "0", *config),
            "gateway": ("radosgw", "-f", "--name", "client.rgw", *config),
        }

    @property
    def environment(self) -> dict[str, str]:
        """Of all processes: nothing of this one's reaches them."""
        return {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "HOME": str(self.folder)}

    def make(self) -> None:
        """Makes an empty monitor and an empty disk; nothing runs afterwards."""
        for name in ("mon", "osd"):
            (self.folder / name).mkdir(parents=True)
        quiet = "".join(f"debug {part} = 0/0\n" for part in TALKATIVE)
        self._config.write_text(
            _CONFIG.format(
                fsid=self.fsid, mon_port=self.mon_port, port=self.port, folder=self.folder, disk_bytes=DISK_BYTES,
                quiet=quiet,
            )
        )  # fmt: skip
        monitors, address = str(self.folder / "monitors"), f"[v2:127.0.0.1:{self.mon_port}]"
        self._run("monmaptool", "--create", "--fsid", str(self.fsid), "--addv", "a", address, monitors)
        self._run("ceph-mon", "--mkfs", "--id", "a", "--monmap", monitors)
        self._run("ceph-osd", "--mkfs", "--id", "0", "--osd-uuid", str(self.fsid), "--no-mon-config")

    def admit_disk(self) -> None:
        """Tells the monitor, once it runs, whose disk may join."""
        self._run("ceph", "--connect-timeout", "60", "osd", "new", str(self.fsid), "0")

    def create_user(self, access_key: str, secret_key: str) -> None:
        """Makes the gateway's pools, once the disk runs, and a user with these keys."""
        keys = ("--access-key", access_key, "--secret", secret_key)
        self._run(
            "radosgw-admin", "--name", "client.rgw", "user", "create", "--uid=tests", "--display-name=tests", *keys
        )

    @property
    def _config(self) -> Path:
        return self.folder / "ceph.conf"

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            [*command, "--conf", str(self._config)],
            env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=COMMAND_TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"
