"""Who may fire a webhook: whoever knows its secret, sent along or used to sign the body."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from enum import StrEnum

from mlplat.errors import InvalidInput, PermissionDenied

MAX_BODY_BYTES = 64 * 1024
MIN_SECRET_LENGTH = 16
MAX_SECRET_LENGTH = 200
#: The second one is what GitHub and its kin send.
SIGNATURE_HEADERS = ("x-mlplat-signature-256", "x-hub-signature-256")


class Auth(StrEnum):
    """BEARER: the secret comes with the request, and only its hash is kept. SIGNATURE: an HMAC-SHA256 of the body;
    the secret stays with the sender, and here, where the signature has to be computed."""

    BEARER = "bearer"
    SIGNATURE = "signature"


def stored_secret(auth: Auth, secret: str) -> bytes:
    """What is kept of a secret.

    Raises:
        InvalidInput: it is too short to be one, or too long.
    """
    if not MIN_SECRET_LENGTH <= len(secret) <= MAX_SECRET_LENGTH:
        raise InvalidInput(f"secret: has {len(secret)} characters, expected {MIN_SECRET_LENGTH} to {MAX_SECRET_LENGTH}")
    return secret.encode() if auth is Auth.SIGNATURE else hashlib.sha256(secret.encode()).digest()


def signature(secret: str | bytes, body: bytes) -> str:
    """The value of the signature header."""
    key = secret.encode() if isinstance(secret, str) else secret
    return f"sha256={hmac.new(key, body, hashlib.sha256).hexdigest()}"


def verify(auth: Auth, stored: bytes, headers: Mapping[str, str], body: bytes) -> None:
    """Checks a request, in constant time.

    Args:
        headers: with names in lower case, or with a case-insensitive look-up.

    Raises:
        PermissionDenied: it does not come from somebody who knows the secret.
    """
    if auth is Auth.BEARER:
        scheme, _space, secret = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(secret.strip().encode()).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, stored):
            raise PermissionDenied("the header Authorization: Bearer <secret> is missing or wrong")
        return
    signed = next((headers[name] for name in SIGNATURE_HEADERS if name in headers), "")
    if not hmac.compare_digest(signed.encode(), signature(stored, body).encode()):
        raise PermissionDenied(
            f"the header {SIGNATURE_HEADERS[0].title()}: sha256=<HMAC of the body> is missing or wrong"
        )
