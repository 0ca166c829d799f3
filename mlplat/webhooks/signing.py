"""How receivers know that a delivery is genuine, and new. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping

from mlplat.errors import PermissionDenied

SIGNATURE = "X-Mlplat-Signature-256"
TIMESTAMP = "X-Mlplat-Timestamp"
DELIVERY = "X-Mlplat-Delivery"
EVENT = "X-Mlplat-Event"
#: Seconds by which a delivery's timestamp may differ from the receiver's clock.
TOLERANCE_S = 300


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """The value of ``X-Mlplat-Signature-256``: over ``timestamp.body``, so that nobody sends an old one again."""
    signed = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256)
    return f"sha256={signed.hexdigest()}"


def mlflow_signature(secret: str, delivery: str, timestamp: int, body: bytes) -> str:
    """The value of ``X-MLflow-Signature``, which receivers of MLflow's webhooks check."""
    signed = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(signed.digest()).decode()}"


def headers(secret: str, delivery: str, kind: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a delivery."""
    return {
        "Content-Type": "application/json",
        EVENT: kind,
        DELIVERY: delivery,
        TIMESTAMP: str(timestamp),
        SIGNATURE: signature(secret, timestamp, body),
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": str(timestamp),
        "X-MLflow-Signature": mlflow_signature(secret, delivery, timestamp, body),
    }


def verify(secret: str, given: Mapping[str, str], body: bytes, now: float) -> None:
    """What a receiver does, in constant time.

    Args:
        given: the request's headers, with a case-insensitive look-up.
        now: the receiver's clock, in seconds since 1970.

    Raises:
        PermissionDenied: it does not come from the platform, or is not new.
    """
    timestamp = given.get(TIMESTAMP, "")
    if not (timestamp.isascii() and timestamp.isdecimal()) or abs(int(timestamp[:15]) - now) > TOLERANCE_S:
        raise PermissionDenied(f"the header {TIMESTAMP} is missing, or too old")
    if not hmac.compare_digest(given.get(SIGNATURE, "").encode(), signature(secret, int(timestamp), body).encode()):
        raise PermissionDenied(f"the header {SIGNATURE} is missing or wrong")
