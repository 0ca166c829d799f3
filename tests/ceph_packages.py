"""Debian's packages of Ceph, of which the S3 server of the tests is made: looks for them, and installs them as root.

``python3 -P tests/ceph_packages.py`` does so on a machine where nothing else is installed yet.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common")
PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool")
INSTALL = ("install", "--yes", "--no-install-recommends")
#: Arguments of apt-get, seconds, and whether the rest can go on without. Packages come first and are unpacked then:
#: a download may be broken off, dpkg should not be.
STEPS = (
    (("update",), 120, True),
    ((*INSTALL, "--download-only", *PACKAGES), 240, False),
    ((*INSTALL, "--no-download", *PACKAGES), 240, False),
)
LOCK = Path("/var/cache/apt/mlplat-tests.lock")
LOCK_TIMEOUT_S = 300
#: Asked by packages before they start a service; 101 forbids it.
POLICY = Path("/usr/sbin/policy-rc.d")


def ensure_ceph() -> str:
    """Installs the packages where they are missing and that can be done; returns why they are missing still, or ''."""
    if not _missing():
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return _sentence("that takes root and apt")
    try:
        with _lock():
            return _install() if _missing() else ""
    except (OSError, subprocess.SubprocessError) as error:
        return _sentence(str(error))


def _missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


def _sentence(reason: str) -> str:
    packages = " ".join(PACKAGES)
    return f"no S3 server; 'apt-get install --no-install-recommends {packages}' brings it. It was not done: {reason}"


def _install() -> str:
    with _no_services():
        for arguments, timeout_s, optional in STEPS:
            done = subprocess.run(
                ["apt-get", "--quiet", *arguments],
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s,
                check=False,
            )  # fmt: skip
            if done.returncode != 0 and not optional:
                said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
                return _sentence(said[-1])
    return _sentence(f"{', '.join(_missing())} is not in them") if _missing() else ""


@contextmanager
def _lock() -> Iterator[None]:
    """Two test runs that start together install once."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    with LOCK.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has been installing for {LOCK_TIMEOUT_S} s") from None
                time.sleep(0.2)
        yield


@contextmanager
def _no_services() -> Iterator[None]:
    if POLICY.exists():  # the machine's own
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


if __name__ == "__main__":
    sys.exit(ensure_ceph() or 0)
