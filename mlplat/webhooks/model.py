"""Webhooks, their deliveries, and when a delivery is tried again. Pure."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from urllib.parse import urlsplit

from mlplat.db.snapshots import Snapshot
from mlplat.errors import InvalidInput
from mlplat.events.model import EventFilter
from mlplat.webhooks.addresses import check_host

MIN_SECRET_LENGTH = 16
MAX_SECRET_LENGTH = 200
MAX_URL_LENGTH = 2_000
MAX_ERROR = 1_000
#: MLflow's rule.
NAME_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._\-]{0,61}[A-Za-z0-9])?$"
GONE = 410
#: Attempts are not put off for longer by ``Retry-After``.
MAX_RETRY_AFTER_S = 6 * 3_600.0
_PLAIN = re.compile(r"[\x21-\x7e]+\Z")
_DELIVERY_ID = re.compile(r"[0-9a-f]{32}-([0-9]{1,18})\Z")


class Status(StrEnum):
    """DISABLED: events are not noted for it, and those that were noted wait."""

    ACTIVE = "ACTIVE"
    DISABLED = "DISABLED"


class DeliveryState(StrEnum):
    """DEAD: given up, until somebody asks for it again."""

    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    DEAD = "DEAD"


@dataclass(frozen=True)
class Webhook:
    """Where events go. Its secret is not part of it, so that it is never shown.

    Args:
        kinds: of events; none named: of all.
        model: a name or pattern.
        since: the transactions that were over before it was there, or was enabled: none of its events.
        status_reason: why it is disabled, if the platform has done that.
    """

    webhook_id: str
    name: str
    url: str
    kinds: frozenset[str]
    model: str
    status: Status
    status_reason: str
    description: str
    since: Snapshot
    created_at: datetime
    updated_at: datetime

    @property
    def filter(self) -> EventFilter:
        """The events that it wants."""
        return EventFilter(self.kinds, self.model)


@dataclass(frozen=True)
class Delivery:
    """What became of an event for a webhook. ``delivery_id`` is the same for all attempts."""

    number: int
    delivery_id: str
    event_id: int
    kind: str
    model: str
    state: DeliveryState
    attempts: int
    next_attempt_at: datetime | None
    last_status: int | None
    last_error: str
    created_at: datetime
    attempted_at: datetime | None
    delivered_at: datetime | None


@dataclass(frozen=True)
class Answer:
    """What a receiver said; ``error`` is empty when it took the delivery, and ``status`` None when it said nothing."""

    status: int | None
    error: str = ""
    retry_after_s: float | None = None
    body: str = ""


@dataclass(frozen=True)
class Retries:
    """After the first attempts seconds, after the last ones hours: eight attempts within about a day."""

    max_attempts: int = 8
    first_s: float = 10.0
    factor: float = 4.2

    def delay_s(self, attempts: int, luck: float, retry_after_s: float | None = None) -> float:
        """Seconds until the next attempt after so many.

        Args:
            luck: a random number below 1, so that receivers which were away do not get everything at one moment.
            retry_after_s: what the receiver asked for.
        """
        delay = self.first_s * self.factor ** (attempts - 1) * (0.75 + luck / 2)
        return max(delay, min(retry_after_s or 0.0, MAX_RETRY_AFTER_S))

    def is_over(self, attempts: int, answer: Answer) -> bool:
        """Whether a delivery that failed is given up."""
        return attempts >= self.max_attempts or answer.status == GONE


def retry_after_s(header: str, now: datetime) -> float | None:
    """Seconds that ``Retry-After`` asks for: a number, or a time. None: nothing that makes sense."""
    text = header.strip()
    if text.isascii() and text.isdecimal():
        return min(float(text[:12]), MAX_RETRY_AFTER_S)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        return None
    return min(max((moment - now).total_seconds(), 0.0), MAX_RETRY_AFTER_S)


def check_url(url: str) -> str:
    """A URL that events may be sent to, as far as that can be told without looking its host up.

    Raises:
        InvalidInput: what is wrong with it.
    """
    if not _PLAIN.match(url) or len(url) > MAX_URL_LENGTH:
        raise InvalidInput(f"url: expected 1 to {MAX_URL_LENGTH} visible ASCII characters (percent-encoded)")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidInput(f"url: {error}") from error
    if parts.scheme not in {"http", "https"}:
        raise InvalidInput(f"url: must start with https:// or http://, not {parts.scheme[:20]}:")
    if not parts.hostname or port == 0:
        raise InvalidInput("url: must name a host, and a port from 1 to 65535 if any")
    if "@" in parts.netloc or "\\" in url:
        raise InvalidInput("url: may not have a user or a password; receivers check the signature")
    if parts.fragment:
        raise InvalidInput("url: may not have a fragment (#…), which would not be sent")
    check_host(parts.hostname)
    return url


def check_secret(secret: str) -> str:
    """A secret as somebody chose it.

    Raises:
        InvalidInput: it is too short to be one, too long, or no plain text. It is not repeated.
    """
    if not MIN_SECRET_LENGTH <= len(secret) <= MAX_SECRET_LENGTH or not _PLAIN.match(secret):
        raise InvalidInput(
            f"secret: expected {MIN_SECRET_LENGTH} to {MAX_SECRET_LENGTH} visible ASCII characters without spaces"
        )
    return secret


def new_secret() -> str:
    """A secret that nobody guesses."""
    return secrets.token_urlsafe(32)


def delivery_id(webhook_id: str, event_id: int) -> str:
    """The id of a delivery: the same for all attempts, and everywhere."""
    return f"{webhook_id}-{event_id}"


def event_of(text: str) -> int | None:
    """The event of a delivery, by its id; None if it is none."""
    match = _DELIVERY_ID.match(text)
    return None if match is None else int(match[1])
