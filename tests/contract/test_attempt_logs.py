"""Logs of attempts: everything a process prints, in the store while it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlplat.artifacts.segments import Place
from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.texts import read_text, tail_start
from mlplat.execution.capture import log_folder

PROGRAM = """
import os, subprocess, sys, time
from mlplat.artifacts.segments import Place
from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.texts import read_text
from mlplat.execution import capture
artifacts = ArtifactStore(sys.argv[1])
folder = capture.log_folder("run", "step", -1, 1)
with capture.captured_output(artifacts, folder) as log:
    print("python")
    subprocess.run(["echo", "child"])
    os.write(2, b"raw\\n")
    deadline = time.monotonic() + 60
    while "raw" not in read_text(artifacts, folder, Place(), 1000).text and time.monotonic() < deadline:
        log.ship()
    print("last words")
    if sys.argv[2] == "dies":
        os._exit(7)
print("elsewhere")
"""


@pytest.mark.parametrize(
    ("end", "code", "log", "stdout"),
    [("ends", 0, "python\nchild\nraw\nlast words\n", "elsewhere\n"), ("dies", 7, "python\nchild\nraw\n", "")],
)
def test_the_log_has_what_was_printed(end: str, code: int, log: str, stdout: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, url, end],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, stdout, "")
    store = ArtifactStore(url)
    text = read_text(store, log_folder("run", "step", -1, 1), Place(), 1000, is_over=True).text
    assert text.startswith(log)
    assert text in {log, f"{log}last words\n"}
    assert len(store.list(log_folder("run", "step", -1, 1))) == 1


def _segments(folder: Path, bodies: list[bytes]) -> ArtifactStore:
    store = ArtifactStore(f"file://{folder}")
    for number, body in enumerate(bodies, start=1):
        store.write(f"log/{number:06d}.log", [body])
    return store


@pytest.mark.parametrize("limit", [4, 5, 7, 100])
def test_parts_of_any_size_join_to_the_whole(limit: int, tmp_path: Path) -> None:
    whole = "aä\u20ac\U0001f600" * 9
    body = whole.encode()
    store = _segments(tmp_path, [body[:13], body[13:14], body[14:50], body[50:]])  # characters cut by segments
    texts, place = [], Place()
    while True:
        part = read_text(store, "log", place, limit)
        if part.next == place:
            break
        texts.append(part.text)
        place = part.next
    assert "".join(texts).replace("\ufffd", "") != ""
    assert read_text(store, "log", Place(), 1_000).text == whole
    if limit == 100:
        assert "".join(texts) == whole


def test_a_cut_character_waits_for_its_rest_or_for_the_end(tmp_path: Path) -> None:
    store = _segments(tmp_path, [b"ab\xe2\x82"])
    part = read_text(store, "log", Place(), 100)
    assert (part.text, part.next) == ("ab", Place(1, 2))
    over = read_text(store, "log", Place(), 100, is_over=True)
    assert (over.text, over.next) == ("ab\ufffd", Place(1, 4))
    _segments(tmp_path, ["ab\u20ac!".encode()])
    assert read_text(store, "log", part.next, 100).text == "\u20ac!"


def test_the_tail_begins_so_many_bytes_before_the_end(tmp_path: Path) -> None:
    store = _segments(tmp_path, [b"0123", b"45", b"6789"])
    entries = store.list("log")
    for after, limit, expected in (
        (Place(), 3, "789"),
        (Place(), 5, "56789"),
        (Place(), 10, "0123456789"),
        (Place(), 99, "0123456789"),
        (Place(2, 1), 99, "56789"),
        (Place(2, 1), 2, "89"),
        (Place(3, 4), 2, ""),
    ):
        assert read_text(store, "log", tail_start(entries, after, limit), 99).text == expected
