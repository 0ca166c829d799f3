"""Steps that are commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlplat.errors import InvalidInput
from mlplat.pipelines.expressions import OutputRef
from mlplat.steps.commands import CommandFailed, run_command


def test_a_command_gets_its_arguments_and_gives_its_output() -> None:
    program = 'printf \'{"a": "%s", "b": %s, "step": "%s"}\' "$A" "$B" "$MLPLAT_STEP" > "$MLPLAT_OUTPUT"'
    assert run_command(program, {"A": "x y", "B": [1, None]}, "r/s/-1/1") == {
        "a": "x y", "b": [1, None], "step": "r/s/-1/1",
    }  # fmt: skip


def test_a_program_is_run_without_a_shell(tmp_path: Path) -> None:
    marker = tmp_path / "$(touch pwned)"
    assert run_command(["touch", str(marker)], {}, "label") is None
    assert [path.name for path in tmp_path.iterdir()] == ["$(touch pwned)"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("exit 3", "ended with exit code 3"), ("false; true", "ended with exit code 1"),
        ("kill -9 $$", "was killed by signal 9"), (["false"], "ended with exit code 1"),
    ],
)  # fmt: skip
def test_a_failing_command_fails(command: Any, reason: str) -> None:
    with pytest.raises(CommandFailed, match=reason):
        run_command(command, {}, "label")


@pytest.mark.parametrize("text", ["", "{", "\\\\377", "[1] [2]"])
def test_an_output_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="not JSON"):
        run_command(f"printf '{text}' > $MLPLAT_OUTPUT", {}, "label")


def test_bad_programs_and_arguments_are_told() -> None:
    with pytest.raises(InvalidInput, match="cannot run 'no-such-program-here': No such file"):
        run_command(["no-such-program-here"], {}, "label")
    with pytest.raises(InvalidInput, match=r"with\.A: a Model cannot be given to a command"):
        run_command("true", {"A": OutputRef("d", "Model")}, "label")
    with pytest.raises(InvalidInput, match=r"with\.A"):
        run_command("true", {"A": [OutputRef("d", "Model")]}, "label")


def test_what_a_stopped_command_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = tmp_path / "pids"
    wait = subprocess.Popen.wait

    def interrupted(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None:  # the wait for the command's end
            while not pids.exists() or len(pids.read_text().split()) < 2:
                os.sched_yield()
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    program = f"sleep 100 & echo $! >> {pids}; echo $$ >> {pids}; wait; true"
    with pytest.raises(KeyboardInterrupt):
        run_command(program, {}, "label")
    _gone, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid)], timeout=10
    )
    assert alive == []
