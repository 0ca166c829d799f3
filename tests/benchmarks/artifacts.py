"""Area ``artifacts``: large and small files through the gateway."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from mlplat.sdk.client import ARTIFACTS, Client
from tests.benchmarks.result import Result
from tests.platform import Platform

LARGE_MB = 500
SMALL = 200


def run(platform: Platform) -> Iterator[Result]:
    """Yields the figures, on a running platform."""
    client = Client(platform.url)
    with tempfile.TemporaryDirectory(dir=platform.state_dir) as folder:
        large = Path(folder) / "large"
        with large.open("wb") as out:
            for _ in range(LARGE_MB):
                out.write(os.urandom(1_000_000))
        floor = LARGE_MB / _copy_and_hash(large)
        began = time.perf_counter()
        client.upload(f"{ARTIFACTS}/bench/large", large)
        yield Result(f"upload of {LARGE_MB} MB", LARGE_MB / (time.perf_counter() - began), "MB/s", floor)
        began = time.perf_counter()
        received = 0
        with httpx.stream("GET", f"{platform.url}{ARTIFACTS}/bench/large", timeout=60, trust_env=False) as answer:
            for chunk in answer.iter_raw():
                received += len(chunk)
        assert received == LARGE_MB * 1_000_000
        yield Result(f"download of {LARGE_MB} MB", LARGE_MB / (time.perf_counter() - began), "MB/s", floor)
        small = Path(folder) / "small"
        small.write_bytes(b"x" * 1000)
        began = time.perf_counter()
        for number in range(SMALL):
            client.upload(f"{ARTIFACTS}/bench/small/{number}", small)
        yield Result(f"{SMALL} uploads of 1 kB", time.perf_counter() - began, "s")


def _copy_and_hash(file: Path) -> float:
    """Seconds of a durable copy and a SHA-256 of the same file."""
    began = time.perf_counter()
    copy = file.with_suffix(".copy")
    shutil.copyfile(file, copy)
    with copy.open("rb+") as written:
        os.fsync(written.fileno())
    with file.open("rb") as source:
        hashlib.file_digest(source, "sha256")
    seconds = time.perf_counter() - began
    copy.unlink()
    return seconds
