"""SHA-256 digests, in hex as they are kept and in Base64 as they travel."""

from __future__ import annotations

import base64
import hashlib


def sha256(body: bytes | bytearray | memoryview) -> str:
    """The SHA-256 of bytes, in hex."""
    return hashlib.sha256(body).hexdigest()


def in_base64(digest: str) -> str:
    """A digest in hex, in Base64."""
    return base64.b64encode(bytes.fromhex(digest)).decode()


def content_digest(digest: str) -> str:
    """The value of ``Content-Digest`` or ``Repr-Digest`` (RFC 9530) for a SHA-256 in hex."""
    return f"sha-256=:{in_base64(digest)}:"


def s3_checksum(digest: str) -> dict[str, str]:
    """The header of a PUT to S3 of bytes with this SHA-256 in hex."""
    return {"x-amz-checksum-sha256": in_base64(digest)}
