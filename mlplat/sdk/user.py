"""Whose process this is."""

from __future__ import annotations

import getpass
import os


def user_name() -> str:
    """The user's name; in containers, where users may have none, the number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
