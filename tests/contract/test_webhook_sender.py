"""Where webhooks go, and where they do not: a canary sees who connects."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mlplat.errors import InvalidInput
from mlplat.webhooks.addresses import Targets
from mlplat.webhooks.model import Answer
from mlplat.webhooks.sender import KEPT_BYTES, Sender
from mlplat.webhooks.signing import headers
from tests.receiver import SECRET, Receiver

BODY = b'{"kind":"test"}'
LOOPBACK = Targets.parse(["127.0.0.0/8"])


class Names:
    """A resolver whose answers are given beforehand, the last one for good."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """The next answer."""
        self.asked.append((host, port))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


async def post(sender: Sender, url: str) -> Answer:
    signed = headers(SECRET, "d-1", "test", int(time.time()), BODY)
    answer = await sender.post(url, signed, BODY)
    await sender.close()
    return answer


@pytest.fixture
async def canary() -> AsyncIterator[Receiver]:
    """A server on this machine that nobody should reach."""
    canary = await Receiver().start()
    yield canary
    await canary.stop()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "0.0.0.0", "127.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001",
        "0177.0.0.1", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::1]", "[::]", "127.0.0.1.",
    ],
)  # fmt: skip
async def test_nothing_reaches_this_machine(canary: Receiver, host: str) -> None:
    answer = await post(Sender(Targets(), timeout_s=5), f"http://{host}:{canary.port}/")
    assert answer.status is None
    assert answer.error
    assert canary.connections == 0
    with pytest.raises(InvalidInput, match="has a loopback address"):
        await Sender(Targets()).check(f"http://127.0.0.1:{canary.port}/")


async def test_a_name_that_moves_here_after_it_was_checked_is_refused(canary: Receiver) -> None:
    names = Names(["93.184.216.34"], ["127.0.0.1"])
    sender = Sender(Targets(), names)
    url = f"http://rebinding.example:{canary.port}/"
    await sender.check(url)
    answer = await post(sender, url)
    assert answer.error == "rebinding.example has a loopback address; MLPLAT_WEBHOOK_PRIVATE_TARGETS may allow such"
    assert canary.connections == 0


async def test_a_name_is_looked_up_once_for_a_request_and_called_where_it_was_checked() -> None:
    canary = await Receiver().start()
    receiver = await Receiver(port=canary.port).start("127.0.0.2")
    names = Names(["127.0.0.2"], ["127.0.0.1"])
    answer = await post(Sender(Targets.parse(["127.0.0.2"]), names), f"http://hooks.example:{canary.port}/")
    assert (answer.status, answer.error) == (200, "")
    assert names.asked == [("hooks.example", canary.port)]
    assert receiver.received[0].headers["host"] == f"hooks.example:{canary.port}"
    assert canary.connections == 0
    await canary.stop()
    await receiver.stop()


async def test_a_name_with_one_address_that_is_refused_is_refused(canary: Receiver) -> None:
    names = Names(["93.184.216.34", "127.0.0.1"])
    answer = await post(Sender(Targets(), names), f"http://both.example:{canary.port}/")
    assert "loopback" in answer.error
    assert canary.connections == 0


async def test_redirects_and_proxies_lead_nowhere(canary: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    receiver = await Receiver(answers=[307], headers=f"Location: {canary.url}\r\n").start()
    answer = await post(Sender(LOOPBACK), receiver.url)
    assert (answer.status, answer.error) == (307, "answered 307; redirects are not followed")
    assert (len(receiver.received), canary.connections) == (1, 0)
    await receiver.stop()


async def test_another_address_is_tried_when_the_first_one_does_not_answer(canary: Receiver) -> None:
    names = Names(["127.0.0.2", "127.0.0.1"])
    assert (await post(Sender(LOOPBACK, names), f"http://two.example:{canary.port}/")).status == 200
    answer = await post(Sender(LOOPBACK, Names(["127.0.0.2"])), f"http://one.example:{canary.port}/")
    assert answer.error.startswith("ConnectError")


async def test_a_host_without_an_address_is_an_error_that_says_so() -> None:
    sender = Sender(Targets())
    await sender.check("https://nobody.invalid/")
    assert (await post(sender, "https://nobody.invalid/")).error.startswith("the host cannot be looked up")
    assert (await post(Sender(Targets(), Names([])), "https://empty.example/")).error == "ConnectError: no address"


async def test_only_the_beginning_of_an_answer_is_read(canary: Receiver) -> None:
    canary.extra, canary.answers = b"\x00\xff" * 20_000_000, [500]
    answer = await post(Sender(LOOPBACK), canary.url)
    assert answer.status == 500
    assert answer.error.startswith("answered 500: said so")
    assert len(answer.error) < 300
    assert len(answer.body) < 2 * KEPT_BYTES
    assert "\x00" not in answer.body + answer.error


async def test_something_that_does_not_speak_http_is_an_error(canary: Receiver) -> None:
    canary.headers = "this is no header\r\n"
    answer = await post(Sender(LOOPBACK), canary.url)
    assert (answer.status, answer.error[:19]) == (None, "RemoteProtocolError")


def _certificate(folder: Path, *names: str) -> Path:
    """A certificate of its own for names and addresses, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    subjects: list[x509.GeneralName] = [
        x509.IPAddress(ip_address(item)) if item[0].isdigit() else x509.DNSName(item) for item in names
    ]
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1)).add_extension(x509.SubjectAlternativeName(subjects), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    file = folder / "certificate.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


async def test_tls_is_with_the_name_and_not_with_the_address(tmp_path: Path) -> None:
    file = _certificate(tmp_path, "hooks.example")
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(file)
    asked = []
    server.sni_callback = lambda _socket, name, _context: asked.append(name)
    receiver = await Receiver().start(context=server)
    trusting = ssl.create_default_context(cafile=file)
    url = f"https://hooks.example:{receiver.port}/x"
    answer = await post(Sender(LOOPBACK, Names(["127.0.0.1"]), context=trusting), url)
    assert (answer.status, answer.error) == (200, "")
    assert asked == ["hooks.example"]
    for sender, address in [
        (Sender(LOOPBACK, Names(["127.0.0.1"]), context=trusting), url.replace("hooks", "others")),
        (Sender(LOOPBACK, context=trusting), f"https://127.0.0.1:{receiver.port}/"),
        (Sender(LOOPBACK, Names(["127.0.0.1"])), url),
    ]:
        answer = await post(sender, address)
        assert answer.status is None
        assert "CERTIFICATE_VERIFY_FAILED" in answer.error
    assert len(receiver.received) == 1
    await receiver.stop()
