"""TCP ports: which are free, and who has the others."""

from __future__ import annotations

import socket

import psutil

from mlplat.errors import BringUpError


def free_port() -> int:
    """A port that is free now, outside the range that Ray gives to workers."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if not 10_002 <= port <= 19_999:
            return port


def is_listening(port: int, host: str = "127.0.0.1", timeout_s: float = 1.0) -> bool:
    """True when something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def require_free(port: int, purpose: str, setting: str) -> None:
    """Checks that a port can be bound.

    Raises:
        BringUpError: it cannot; says who has it and which setting moves it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise BringUpError(
                f"port {port} ({purpose}) is taken{_owner(port)}. "
                f"Stop that, or choose another port: {setting}={free_port()}"
            ) from error


def _owner(port: int) -> str:
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return ""
    for connection in connections:
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
            try:
                name = psutil.Process(connection.pid).name() if connection.pid else "?"
            except psutil.NoSuchProcess:
                name = "?"
            return f" by process {connection.pid} ({name})"
    return ""
