"""Which ports are free, and who has the others."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator

import pytest

from cluster.ports import free_port, is_listening, require_free
from mlplat.errors import BringUpError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as every server does
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def test_a_free_port_can_be_bound_and_is_not_rays() -> None:
    for _attempt in range(20):
        port = free_port()
        assert not 10_002 <= port <= 19_999
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_a_listener_is_seen_until_it_closes(listener: socket.socket) -> None:
    port = port_of(listener)
    assert is_listening(port)
    listener.close()
    assert not is_listening(port)


def test_a_bound_port_without_a_listener_is_not_listening() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        assert not is_listening(port_of(server))


def test_a_host_that_does_not_exist_is_not_listening() -> None:
    assert not is_listening(80, host="256.256.256.256")


def test_a_free_port_is_accepted_and_stays_free() -> None:
    port = free_port()
    require_free(port, "HTTP", "MLPLAT_HTTP_PORT")
    require_free(port, "HTTP", "MLPLAT_HTTP_PORT")


def test_a_taken_port_is_refused_with_its_owner_and_a_way_out(listener: socket.socket) -> None:
    port = port_of(listener)
    with pytest.raises(BringUpError) as caught:
        require_free(port, "HTTP API", "MLPLAT_HTTP_PORT")
    message = caught.value.message
    assert message.startswith(f"port {port} (HTTP API) is taken by process {os.getpid()} (")
    advice = re.search(r"choose another port: MLPLAT_HTTP_PORT=(\d+)$", message)
    assert advice is not None
    assert int(advice[1]) != port


def test_a_port_that_a_connection_has_left_is_free(listener: socket.socket) -> None:
    port = port_of(listener)
    with socket.create_connection(("127.0.0.1", port)) as client:
        accepted, _address = listener.accept()
        accepted.close()
        assert client.recv(1) == b""
    listener.close()
    require_free(port, "HTTP", "MLPLAT_HTTP_PORT")
