"""Without authentication, only this machine's own programs may come in."""

from __future__ import annotations

import httpx
import pytest

from mlplat.http.app import LocalOnly


async def _app(scope: dict[str, object], receive: object, send: object) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"in"})  # type: ignore[operator]


async def _status(peer: str, headers: dict[str, str]) -> int:
    transport = httpx.ASGITransport(app=LocalOnly(_app), client=(peer, 1234))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return (await client.get("/", headers=headers)).status_code


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["localhost", "localhost:8700", "127.0.0.1:8700", "[::1]:8700"])
async def test_this_machine_comes_in(peer: str, host: str) -> None:
    assert await _status(peer, {"Host": host}) == 200
    assert await _status(peer, {"Host": host, "Origin": f"http://{host}"}) == 200


@pytest.mark.parametrize("peer", ["10.0.0.8", "192.168.1.5", "8.8.8.8", "fe80::1", "::ffff:10.0.0.1"])
async def test_other_machines_do_not(peer: str) -> None:
    assert await _status(peer, {}) == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8700", ""])
async def test_a_rebound_name_does_not(host: str) -> None:
    assert await _status("127.0.0.1", {"Host": host}) == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "https://127.0.0.1.evil.example", "null"])
async def test_a_page_from_elsewhere_does_not(origin: str) -> None:
    assert await _status("127.0.0.1", {"Origin": origin}) == 403
