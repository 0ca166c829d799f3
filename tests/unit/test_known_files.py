"""What is remembered of files that were not touched since."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlplat.sdk import known_files
from mlplat.sdk.known_files import KnownFile, KnownFiles

FOUND = KnownFile(5, "a" * 64, [("b" * 64, 3), ("c" * 64, 2)])
OTHER = KnownFile(0, "d" * 64, [])
#: Nobody can set the time at which an inode changed: files are old enough when they are read later.
LATER_S = time.time() + 86_400.0
LONG_AGO_NS = 1_000_000_000_000_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "deep"


@pytest.fixture
def known(folder: Path) -> KnownFiles:
    return KnownFiles(folder)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    return file


def test_a_file_is_known_once_it_was_added(known: KnownFiles, folder: Path, file: Path) -> None:
    assert known.find(file.stat()) is None
    known.add(file.stat(), FOUND, LATER_S)
    assert known.find(file.stat()) == FOUND
    assert KnownFiles(folder).find(file.stat()) == FOUND
    known.add(file.stat(), OTHER, LATER_S)
    assert known.find(file.stat()) == OTHER


def _written(file: Path) -> None:
    file.write_bytes(b"54321")


def _longer(file: Path) -> None:
    file.write_bytes(b"123456")


def _written_with_the_old_time(file: Path) -> None:
    before = file.stat()
    file.write_bytes(b"54321")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _dated_back(file: Path) -> None:
    os.utime(file, ns=(LONG_AGO_NS, LONG_AGO_NS))


def _replaced(file: Path) -> None:
    before = file.stat()
    new = file.with_name("new")
    new.write_bytes(b"54321")
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(file)


@pytest.mark.parametrize("change", [_written, _longer, _written_with_the_old_time, _dated_back, _replaced])
def test_a_file_that_was_touched_is_not_known(known: KnownFiles, file: Path, change: Callable[[Path], None]) -> None:
    before = file.stat()
    known.add(before, FOUND, LATER_S)
    while time.time_ns() <= before.st_ctime_ns + 20_000_000:  # the clock of the file system has gone on
        pass
    change(file)
    assert known.find(file.stat()) is None
    assert known.find(before) == FOUND


def test_a_file_that_was_just_written_when_it_was_read_is_not_remembered(known: KnownFiles, file: Path) -> None:
    written_s = max(file.stat().st_mtime, file.stat().st_ctime)
    for began_s in (written_s - 10.0, written_s, written_s + known_files.MIN_AGE_S - 0.1):
        known.add(file.stat(), FOUND, began_s)
        assert known.find(file.stat()) is None
    known.add(file.stat(), FOUND, written_s + known_files.MIN_AGE_S + 0.1)
    assert known.find(file.stat()) == FOUND


def test_another_file_is_not_known(known: KnownFiles, file: Path, tmp_path: Path) -> None:
    known.add(file.stat(), FOUND, LATER_S)
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert known.find(copy.stat()) is None
    link = tmp_path / "link"
    link.symlink_to(file)
    assert known.find(link.stat()) == FOUND


def _damaged(database: Path) -> None:
    database.write_bytes(b"no database" * 500)


def _cut(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def _other_schema(database: Path) -> None:
    database.unlink()
    with sqlite3.connect(database) as other:
        other.execute("CREATE TABLE file (number INTEGER PRIMARY KEY, other TEXT)")
    other.close()


def _no_json(database: Path) -> None:
    with sqlite3.connect(database) as other:
        other.execute("UPDATE file SET found = ?", (b"f" * 64 + b"{",))
    other.close()


def _number(database: Path) -> None:
    with sqlite3.connect(database) as other:
        other.execute("UPDATE file SET found = 17")
    other.close()


def _folder(database: Path) -> None:
    database.unlink()
    database.mkdir()


def _no_folder(database: Path) -> None:
    database.unlink()
    database.parent.rmdir()
    database.parent.write_bytes(b"a file")


@pytest.mark.parametrize("harm", [_damaged, _cut, _other_schema, _no_json, _number, _folder, _no_folder])
def test_a_database_that_cannot_be_used_knows_nothing(
    known: KnownFiles, folder: Path, file: Path, harm: Callable[[Path], None]
) -> None:
    known.add(file.stat(), FOUND, LATER_S)
    harm(folder / "files.sqlite")
    assert known.find(file.stat()) is None
    known.add(file.stat(), OTHER, LATER_S)
    assert KnownFiles(folder).find(file.stat()) in (None, OTHER)


def test_a_flipped_byte_is_never_believed(known: KnownFiles, folder: Path, file: Path) -> None:
    known.add(file.stat(), FOUND, LATER_S)
    database = folder / "files.sqlite"
    whole = database.read_bytes()
    for position in [index for index, byte in enumerate(whole) if byte]:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        database.write_bytes(damaged)
        assert known.find(file.stat()) in (None, FOUND), position
    database.write_bytes(whole)
    assert known.find(file.stat()) == FOUND


def test_a_locked_database_knows_nothing_for_now(
    known: KnownFiles, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known.add(file.stat(), FOUND, LATER_S)
    monkeypatch.setattr(known_files, "BUSY_TIMEOUT_S", 0.01)
    other = sqlite3.connect(folder / "files.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert known.find(file.stat()) is None
    known.add(file.stat(), OTHER, LATER_S)
    other.execute("ROLLBACK")
    other.close()
    assert known.find(file.stat()) == FOUND


#: Adds files and finds its own and, at last, all others.
_PROCESS = """
import os, sys, time
from pathlib import Path
from mlplat.sdk.known_files import KnownFile, KnownFiles
folder, files = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
known = KnownFiles(folder)
for number, file in enumerate(files):
    known.add(file.stat(), KnownFile(number, "a" * 64, []), time.time() + 1000)
    assert known.find(file.stat()).size == number
"""


def test_two_processes_share_what_they_know(known: KnownFiles, folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}" for number in range(40)]
    for file in files:
        file.write_bytes(b"x")
    processes = [subprocess.Popen([sys.executable, "-c", _PROCESS, folder, *half]) for half in (files[:20], files[20:])]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [known.find(file.stat()) for file in files] == [KnownFile(number % 20, "a" * 64, []) for number in range(40)]


def test_threads_share_what_they_know(known: KnownFiles, tmp_path: Path) -> None:
    files = [tmp_path / f"{number}" for number in range(30)]
    for file in files:
        file.write_bytes(b"x")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda file: known.add(file.stat(), FOUND, LATER_S), files))
    assert [known.find(file.stat()) for file in files] == [FOUND] * 30


def test_those_that_were_added_first_are_forgotten(
    known: KnownFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "MAX_FILES", 5)
    files = [tmp_path / f"{number}" for number in range(9)]
    for file in files:
        file.write_bytes(b"x")
        known.add(file.stat(), FOUND, LATER_S)
    assert [number for number, file in enumerate(files) if known.find(file.stat()) is not None] == [4, 5, 6, 7, 8]
    known.add(files[4].stat(), FOUND, LATER_S)
    known.add(files[0].stat(), FOUND, LATER_S)
    assert [number for number, file in enumerate(files) if known.find(file.stat()) is not None] == [0, 4, 6, 7, 8]
