"""The token that guards a platform's Ray cluster. Imports no Ray: Ray reads its environment when it is imported."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def token_file(state_dir: Path) -> Path:
    """Where the token lies (Ray's own daemons listen on every interface; only the token protects them)."""
    return state_dir / "ray-token"


def client_environment(state_dir: Path) -> dict[str, str]:
    """What a process needs in its environment, before it imports Ray, to join the cluster."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file(state_dir))}


def ensure_token(state_dir: Path) -> None:
    """Creates the state folder and its token on the first call of an installation."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o711 if os.geteuid() == 0 else 0o700)
    path = token_file(state_dir)
    if path.exists() and path.stat().st_size:
        return
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as out:
        out.write(secrets.token_hex(32))
    partial.replace(path)
