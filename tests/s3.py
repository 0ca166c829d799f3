"""An S3 for tests: Ceph's gateway over one monitor and one disk, as processes that can be killed and started again.

It is a real, durable server: what it acknowledged survives ``kill -9`` of all its processes. What tests have to know
of it, measured with Ceph 16.2:

- PUT with ``If-None-Match: *`` is atomic: of writers that race one wins, the others get 412. CompleteMultipartUpload
  *ignores* that header and overwrites, and so does DELETE with ``If-Match``: no test here can tell whether code that
  relies on either is right.
- PUT with ``If-Match`` refuses (412) the ETag in its quotes, as every answer spells it; without quotes it works.
- s3fs' ``mode="create"`` raises ``OSError(EINVAL)`` for a key that is there, not ``FileExistsError``, because the
  answer's body does not name the condition. The code is in ``error.__cause__.response["Error"]["Code"]``.
- Checksums that clients send by default (CRC32 …) are taken and never looked at; a wrong ``Content-MD5`` is refused.
  Trailing checksums, which clients send over HTTPS alone, would be refused (411): this server speaks HTTP.
- CompleteMultipartUpload answers with an empty ``ETag``; HEAD and listings have it. Doing it again is a success, too.
- GetObjectAttributes answers 500.
- The region is us-east-1: creating a bucket with an explicit location is refused, as it is everywhere for that region.
- Creating one's own bucket again is a success. A body of unknown length (chunked) is refused (411).
- Presigned URLs that are wrong or late, and wrong keys, get 403.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import botocore.session
import httpx
import psutil
from botocore.config import Config

from cluster.ports import free_port
from tests.ceph import Ceph
from tests.platform import eventually

REGION = "us-east-1"
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 10
GATEWAY = "gateway"


@dataclass
class S3Server:
    """One server on a folder of its own, which must not exist or be empty.

    ``start`` may follow ``kill`` and ``stop``; data, port and keys stay. Not thread-safe. Whoever ends with it removes
    the folder, too: the disk in it grows with what was ever written.
    """

    folder: Path
    port: int = field(default_factory=free_port)
    access_key: str = "access-key-of-tests"
    secret_key: str = "secret-key-of-tests"
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _made: bool = False

    @property
    def url(self) -> str:
        """What S3 clients take as ``endpoint_url``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which botocore, and so s3fs, finds this server and nothing of the user's own.

        fsspec keeps file systems by their arguments, not by these: ``s3fs.S3FileSystem.clear_instance_cache()`` makes
        it look again.
        """
        return self.environment_for(self.url)

    def environment_for(self, url: str) -> dict[str, str]:
        """``environment`` where clients go through something else, which has this URL."""
        return {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    @property
    def processes(self) -> list[psutil.Process]:
        """What runs now."""
        return [psutil.Process(process.pid) for process in self._processes.values() if process.poll() is None]

    def client(
        self, url: str | None = None, *, secret_key: str | None = None, attempts: int = 1, timeout_s: float = 30
    ) -> Any:  # botocore has no types
        """A client of S3's API, thread-safe, for this server or for what stands before it at ``url``."""
        return self._session.create_client(
            "s3",
            region_name=REGION,
            endpoint_url=url or self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=secret_key or self.secret_key,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": attempts},
                connect_timeout=timeout_s,
                read_timeout=timeout_s,
                max_pool_connections=32,
                proxies={},
            ),
        )

    def new_bucket(self) -> str:
        """The name of an empty bucket, nobody else's."""
        name = f"tests-{uuid.uuid4().hex[:12]}"
        self._client.create_bucket(Bucket=name)
        return name

    def start(self) -> None:
        """Starts what does not run and returns when the gateway answers."""
        if not self._made:
            self._make()
        for name in self._ceph.daemons:
            self._spawn(name)
        eventually(self._answers, START_TIMEOUT_S, "the S3 server of the tests is up")

    def start_gateway(self) -> None:
        """See ``start``, which after ``kill_gateway`` does just this."""
        self.start()

    def kill(self) -> None:
        """``kill -9`` of all of it; does nothing when it is down."""
        for process in reversed(self._processes.values()):
            process.kill()
        self._forget()

    def kill_gateway(self) -> None:
        """``kill -9`` of what speaks S3; does nothing when it is down. Connections break, new ones are refused."""
        if process := self._processes.pop(GATEWAY, None):
            process.kill()
            process.wait(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Ends all of it in good order, or else by force."""
        for process in reversed(self._processes.values()):
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._forget()

    @cached_property
    def _ceph(self) -> Ceph:
        return Ceph(self.folder, self.port, free_port())

    @cached_property
    def _session(self) -> botocore.session.Session:
        return botocore.session.Session()

    @cached_property
    def _client(self) -> Any:  # botocore has no types
        return self.client(attempts=3)

    def _make(self) -> None:
        self._ceph.make()
        try:
            self._spawn("monitor")
            self._ceph.admit_disk()
            self._spawn("disk")
            self._ceph.create_user(self.access_key, self.secret_key)
        except (AssertionError, subprocess.TimeoutExpired):
            self._check_running()  # has more to say
            raise
        self._made = True

    def _spawn(self, name: str) -> None:
        if name in self._processes and self._processes[name].poll() is None:
            return
        with self._log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._ceph.daemons[name], env=self._ceph.environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip

    def _forget(self) -> None:
        for process in self._processes.values():
            process.wait(STOP_TIMEOUT_S)
        self._processes.clear()

    def _check_running(self) -> None:
        for name, process in self._processes.items():
            assert process.poll() is None, f"{name} ended: {self._log(name).read_text(errors='replace')[-2000:]}"

    def _answers(self) -> bool:
        self._check_running()
        try:
            return httpx.get(self.url, timeout=5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"
