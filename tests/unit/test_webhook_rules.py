"""Outgoing webhooks: where they may go, how they are signed, and when they are tried again."""

from __future__ import annotations

import hashlib
import hmac
import json
from datetime import UTC, datetime

import pytest
from mlflow.webhooks.delivery import _generate_hmac_signature

from mlplat.errors import InvalidInput, PermissionDenied
from mlplat.events.model import RegistryEvent, describe
from mlplat.webhooks.addresses import Targets
from mlplat.webhooks.model import (
    MAX_RETRY_AFTER_S,
    Answer,
    Retries,
    check_secret,
    check_url,
    delivery_id,
    event_of,
    new_secret,
    retry_after_s,
)
from mlplat.webhooks.payload import body_of
from mlplat.webhooks.signing import DELIVERY, EVENT, SIGNATURE, TIMESTAMP, TOLERANCE_S, headers, verify

SECRET = "a secret of some length".replace(" ", "-")
NOW = datetime(2026, 1, 5, 9, tzinfo=UTC)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "172.15.0.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111"]
)
def test_public_addresses_may_be_called(address: str) -> None:
    assert Targets().refusal("example.com", address) is None


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("127.0.0.1", "loopback"), ("127.255.255.254", "loopback"), ("::1", "loopback"), ("0.0.0.0", "unspecified"),
        ("::", "unspecified"), ("10.1.2.3", "private"), ("172.16.0.1", "private"), ("172.31.255.255", "private"),
        ("192.168.1.1", "private"), ("169.254.169.254", "link-local"), ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"), ("fd00:ec2::254", "private"), ("fec0::1", "private"),
        ("100.64.0.1", "carrier"), ("100.127.255.255", "carrier"), ("224.0.0.1", "multicast"), ("ff02::1", "multicast"),
        ("240.0.0.1", "reserved"), ("255.255.255.255", "reserved"), ("192.0.2.1", "reserved"),
        ("198.18.0.1", "reserved"), ("2001:db8::1", "reserved"), ("4000::1", "reserved"), ("100::1", "reserved"),
        ("::ffff:127.0.0.1", "IPv4"), ("::ffff:8.8.8.8", "IPv4"), ("64:ff9b::7f00:1", "IPv4"),
        ("64:ff9b:1::7f00:1", "IPv4"), ("2002:7f00:1::", "IPv4"), ("2001:0:7f00:1::", "reserved"),
        ("::127.0.0.1", "reserved"), ("2130706433", "can be understood"), ("", "can be understood"),
    ],
)  # fmt: skip
def test_other_addresses_may_not(address: str, what: str) -> None:
    refusal = Targets().refusal("example.com", address)
    assert refusal is not None
    assert what in refusal
    assert address not in refusal or not address, "whoever asks does not learn where an internal name is"


def test_an_installation_may_allow_hosts_addresses_and_networks() -> None:
    targets = Targets.parse(["hooks.internal", "10.0.0.0/8", "192.168.1.5", "fd00::/16"])
    for host, address, allowed in [
        ("hooks.internal", "127.0.0.1", True), ("HOOKS.internal.", "::1", True),
        ("x.hooks.internal", "127.0.0.1", False),
        ("x", "10.255.0.1", True), ("x", "11.0.0.1", True), ("x", "192.168.1.5", True), ("x", "192.168.1.6", False),
        ("x", "fd00::1", True), ("x", "fd01::1", False), ("x", "::ffff:10.0.0.1", False),
    ]:  # fmt: skip
        assert (targets.refusal(host, address) is None) is allowed, (host, address)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com", "http://example.com:8080/a?b=c", "https://example.com./x", "https://1.1.1.1/",
        "https://[2606:4700::1111]:443/x", "https://xn--mller-kva.example/", "http://localhost/", "https://a_b.example/",
        "http://3com.example/", "http://[::1%25eth0]/",
    ],
)  # fmt: skip
def test_urls_that_may_be_right(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://example.com", "must start with https://"), ("file:///etc/passwd", "must start with"),
        ("gopher://127.0.0.1:70/x", "must start with"), ("example.com/x", "must start with"),
        ("https:///x", "must name a host"), ("https://example.com:0/", "must name a host"),
        ("https://example.com:99999/", "out of range"), ("https://me:pw@example.com/", "user or a password"),
        ("https://example.com\\@127.0.0.1/", "user or a password"), ("https://example.com/#x", "fragment"),
        ("https://exa mple.com/", "visible ASCII"), ("https://example.com/\r\nX: y", "visible ASCII"),
        ("https://müller.example/", "visible ASCII"), ("", "visible ASCII"),
        ("https://" + "x" * 2_000, "visible ASCII"),
        ("http://2130706433/", "no host name"), ("http://0x7f000001/", "no host name"),
        ("http://0x7f.0.0.1/", "no host name"), ("http://017700000001/", "no host name"),
        ("http://0177.0.0.1/", "no host name"), ("http://127.1/", "no host name"),
        ("http://1.2.3.4.5/", "no host name"),
        ("http://example.123/", "no host name"), ("http://127.0.0.1./", "no host name"),
        ("http://-x.example/", "no host"),
        ("http://a..b/", "no host name"), ("http://[::1/", "url: "), ("http://%31%32%37.0.0.1/", "no host name"),
    ],
)  # fmt: skip
def test_urls_that_cannot_be_right(url: str, message: str) -> None:
    with pytest.raises(InvalidInput, match="url: ") as error:
        check_url(url)
    assert message in str(error.value)


def test_secrets_are_long_and_not_repeated_in_errors() -> None:
    assert check_secret(SECRET) == SECRET
    assert check_secret(new_secret()) != new_secret()
    for secret in ("too-short", "x" * 201, "with spaces in between", "ünïcödé-ünïcödé-ü"):
        with pytest.raises(InvalidInput, match="secret: expected 16 to 200") as error:
            check_secret(secret)
        assert secret not in str(error.value)


# -- signatures ----------------------------------------------------------------------------------


def test_a_receiver_verifies_what_was_signed() -> None:
    body = b'{"kind":"alias_set"}'
    given = headers(SECRET, "d-1", "alias_set", 1_000, body)
    assert (given[EVENT], given[DELIVERY], given[TIMESTAMP]) == ("alias_set", "d-1", "1000")
    signed = hmac.new(SECRET.encode(), b'1000.{"kind":"alias_set"}', hashlib.sha256).hexdigest()
    assert given[SIGNATURE] == f"sha256={signed}"
    assert SECRET not in str(given)
    verify(SECRET, given, body, 1_000 + TOLERANCE_S)
    for secret, changed, sent, now in [
        (SECRET[1:], {}, body, 1_000), (SECRET, {}, body + b" ", 1_000), (SECRET, {SIGNATURE: ""}, body, 1_000),
        (SECRET, {TIMESTAMP: "1001"}, body, 1_000), (SECRET, {}, body, 1_001 + TOLERANCE_S),
        (SECRET, {TIMESTAMP: "x"}, body, 1_000), (SECRET, {SIGNATURE: "ü"}, body, 1_000),
    ]:  # fmt: skip
        with pytest.raises(PermissionDenied):
            verify(secret, {**given, **changed}, sent, now)


def test_receivers_of_mlflows_webhooks_verify_it_too() -> None:
    body = '{"kind":"alias_set"}'
    given = headers(SECRET, "d-1", "alias_set", 1_000, body.encode())
    assert given["X-MLflow-Signature"] == _generate_hmac_signature(
        SECRET, given["X-MLflow-Delivery-Id"], given["X-MLflow-Timestamp"], body
    )


def _body(kind: str, **fields: object) -> dict[str, object]:
    told = describe(7, kind, "m", "2026-01-05T09:00:00+00:00", "ann", "why", fields)
    found: dict[str, object] = json.loads(body_of(RegistryEvent(7, 1, 1, told)))
    return found


def test_the_body_is_the_event_and_in_mlflows_form_too() -> None:
    assert _body("SetAlias", alias="champion", version=2) == {
        "id": 7, "kind": "alias_set", "model": "m", "alias": "champion", "version": 2, "by": "ann", "reason": "why",
        "at": "2026-01-05T09:00:00+00:00", "entity": "model_version_alias", "action": "created",
        "timestamp": "2026-01-05T09:00:00+00:00", "data": {"name": "m", "alias": "champion", "version": "2"},
    }  # fmt: skip
    removed = _body("SetVersionTag", version=2, key="k", value=None)
    assert (removed["action"], removed["data"]) == ("deleted", {"name": "m", "version": "2", "key": "k"})
    assert "entity" not in _body("SetStage", version=2, stage="Production")


def test_delivery_ids_name_the_event() -> None:
    webhook_id = "0123456789abcdef" * 2
    assert event_of(delivery_id(webhook_id, 17)) == 17
    for text in ("", "17", f"{webhook_id}-", f"{webhook_id}-x", f"{webhook_id}-{'9' * 19}", f"{webhook_id}-١"):
        assert event_of(text) is None


# -- retries -------------------------------------------------------------------------------------


def test_eight_attempts_take_about_a_day() -> None:
    retries = Retries()
    for luck, low, high in ((0.0, 12, 18), (0.5, 18, 24), (1.0, 24, 30)):
        delays = [retries.delay_s(attempts, luck) for attempts in range(1, retries.max_attempts)]
        assert delays == sorted(delays)
        assert 7 < delays[0] < 13
        assert low < sum(delays) / 3_600 < high


def test_a_receiver_may_ask_for_more_time_within_bounds() -> None:
    retries = Retries()
    assert retries.delay_s(1, 0.5, 100.0) == 100
    assert retries.delay_s(1, 0.5, 0.0) == retries.delay_s(1, 0.5) == 10
    assert retries.delay_s(1, 0.5, 1e9) == MAX_RETRY_AFTER_S


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120), (" 0 ", 0), ("9" * 400, MAX_RETRY_AFTER_S), ("Mon, 05 Jan 2026 09:01:00 GMT", 60),
        ("Mon, 05 Jan 2026 08:00:00 GMT", 0), ("Mon, 05 Jan 2099 08:00:00 GMT", MAX_RETRY_AFTER_S), ("", None),
        ("soon", None), ("-5", None), ("١٢", None), ("Mon, 05 Jan 2026 09:01:00", None),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_time(header: str, seconds: float | None) -> None:
    assert retry_after_s(header, NOW) == seconds


def test_a_delivery_is_given_up_after_the_last_attempt_or_when_the_receiver_is_gone() -> None:
    retries = Retries(max_attempts=3)
    assert [retries.is_over(n, Answer(500, "x")) for n in (1, 2, 3, 4)] == [False, False, True, True]
    assert retries.is_over(1, Answer(410, "gone"))
    assert not retries.is_over(1, Answer(404, "x"))
    assert not retries.is_over(1, Answer(None, "no answer"))
