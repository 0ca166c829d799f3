"""Logs of attempts: everything a process prints, in the store while it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlplat.artifacts.segments import Place
from mlplat.artifacts.store import ArtifactStore
from mlplat.artifacts.texts import read_text
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
