"""Steps that write down when they run: a line as an attempt begins, another as it ends. Shipped to workers by value."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlplat.sdk.context import StepContext

#: Stands on the command line of children that steps leave behind.
CHILD_MARK = "left-behind-by-a-step"


def note(log: str, what: str, ctx: StepContext) -> None:
    """Appends a line in one write, which concurrent processes do not tear."""
    line = {"what": what, "label": ctx.label, "pid": os.getpid(), "at": time.time()}
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def numbers(count: int, log: str, ctx: StepContext) -> list[int]:
    """0 … count - 1."""
    note(log, "begin", ctx)
    note(log, "end", ctx)
    return list(range(count))


def piece(number: int, pause_s: float, failing: float, gate: str, log: str, ctx: StepContext) -> int:
    """The number again, after a while and once the file ``gate`` is there; the fraction ``failing`` fails instead."""
    note(log, "begin", ctx)
    deadline = time.monotonic() + pause_s
    while time.monotonic() < deadline or (gate and not Path(gate).exists()):
        time.sleep(0.05)
    if random.Random(ctx.label).random() < failing:
        note(log, "fail", ctx)
        raise RuntimeError("fails on purpose")
    note(log, "end", ctx)
    return number


def total(values: list[int], log: str, ctx: StepContext) -> int:
    """Their sum."""
    note(log, "begin", ctx)
    note(log, "end", ctx)
    return sum(values)


def raise_import_error() -> None:
    """Needs what is not there."""
    __import__("no_such_module_anywhere")


def exit_at_once() -> None:
    """The worker is gone without a word."""
    os._exit(3)


def spin() -> None:
    """Never ends by itself."""
    while True:
        pass


def spin_deaf() -> None:
    """Never ends by itself, and does not care to be asked to."""
    while True:
        try:
            spin()
        except BaseException:
            continue


def print_much(megabytes: int) -> None:
    """Prints lines until so much is printed."""
    block = ("x" * 1023 + "\n") * 1024
    for _ in range(megabytes):
        sys.stdout.write(block)


def return_much(megabytes: int) -> bytes:
    """A large output."""
    return bytes(megabytes * 1024 * 1024)


def multiply(children: int) -> None:
    """Starts children that each start another, in sessions of their own, and never ends."""
    code = (
        "import subprocess, sys, time\n"
        "if len(sys.argv) > 2: subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]])\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, CHILD_MARK, "import time; time.sleep(600)"]
    for _ in range(children):
        subprocess.Popen(command, start_new_session=True)
    while True:
        time.sleep(1)


def swallow(megabytes: int) -> int:
    """Fills memory until so much is taken, and holds it."""
    held: list[Any] = []
    for _ in range(megabytes):
        held.append(bytearray(os.urandom(1024) * 1024))
    time.sleep(30)
    return len(held)
