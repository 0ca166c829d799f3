"""Commands that need Ray or the embedded engines."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn


def become_cluster(*arguments: str) -> NoReturn:
    """Becomes ``python -P -m cluster``, which knows Ray; this package does not depend on it."""
    sys.stdout.flush()
    code = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, (code, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-P", "-m", "cluster", *arguments]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})  # noqa: S606
