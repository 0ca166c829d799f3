"""Steps that are shell commands or programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlplat.errors import InvalidInput
from mlplat.pipelines.expressions import OutputRef

#: How long a command may take to end after it was asked to; shorter than the grace of its attempt.
GRACE_S = 5.0


class CommandFailed(Exception):
    """The command ended with another exit code than 0."""


def run_command(command: str | list[str], arguments: Mapping[str, Any], step: str) -> Any:
    """Runs the command to its end and returns its output, or None.

    Arguments are environment variables, texts as they are and everything else as JSON. The output is the JSON that the
    command writes to the file named by ``MLPLAT_OUTPUT``. What it prints is the attempt's log.

    Raises:
        InvalidInput: an argument is not JSON, or the output is none.
        CommandFailed: the exit code is not 0.
    """
    with tempfile.TemporaryDirectory(prefix="mlplat-step-") as folder:
        output = Path(folder) / "output.json"
        environment = {name: _text(name, value) for name, value in arguments.items()}
        environment |= {"MLPLAT_OUTPUT": str(output), "MLPLAT_STEP": step}
        program = ["/bin/sh", "-ec", command] if isinstance(command, str) else command
        try:
            process = subprocess.Popen(program, env=os.environ | environment, start_new_session=True)
        except OSError as error:
            raise InvalidInput(f"cannot run {program[0]!r}: {error.strerror}") from error
        try:
            code = process.wait()
        except BaseException:  # cancelled: the command goes first, with all that it has started
            _end(process)
            raise
        if code:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise CommandFailed(f"the command {how}")
        return _read_output(output)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with suppress(ProcessLookupError):  # what is left of the group
        os.killpg(process.pid, signal.SIGKILL)


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, OutputRef):
        raise InvalidInput(f"with.{name}: a {value.type_name} cannot be given to a command")
    try:
        return json.dumps(value)
    except TypeError as error:  # an OutputRef or an object inside of something
        raise InvalidInput(f"with.{name}: {error}") from error


def _read_output(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InvalidInput(f"the command wrote to MLPLAT_OUTPUT what is not JSON: {error}") from error
