"""Page tokens: where a page ended, as the sort values of its last row. New rows do not move it."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import msgspec

from mlplat.errors import InvalidInput

SortValue = float | str | datetime | None
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
#: Longer than any token of ours: a few sort values, of which a tag's can have 8,000 characters.
MAX_TOKEN_LENGTH = 200_000


class Kind(StrEnum):
    """What a sort value is."""

    NUMBER = "number"
    TEXT = "text"
    TIME = "time"


class _Token(msgspec.Struct):
    #: Digest of the query that the token belongs to.
    q: str
    #: The last row's sort values, as text: JSON has neither NaN nor infinities.
    v: list[str | None]


def digest(*parts: object) -> str:
    """Tells queries apart."""
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def encode_token(query: str, values: Sequence[SortValue]) -> str:
    """The token of the page after a row with these sort values."""
    body = msgspec.json.encode(_Token(query, [_text(value) for value in values]))
    return base64.urlsafe_b64encode(body).decode()


def decode_token(token: str, query: str, kinds: Sequence[Kind]) -> list[SortValue]:
    """The sort values in a token.

    Raises:
        InvalidInput: not a token of ours, or one of another query.
    """
    try:
        if len(token) > MAX_TOKEN_LENGTH:
            raise ValueError
        found = msgspec.json.decode(base64.b64decode(token, altchars=b"-_", validate=True), type=_Token)
        if found.q == query:
            return [_value(text, kind) for text, kind in zip(found.v, kinds, strict=True)]
    except (ValueError, OverflowError, binascii.Error, msgspec.DecodeError) as error:
        raise InvalidInput(f"Invalid page token: {token[:100]!r}") from error
    raise InvalidInput("Invalid page token: it belongs to a search with another filter, order, view or experiments.")


def _text(value: SortValue) -> str | None:
    if value is None:
        return None
    if isinstance(value, datetime):
        return str((value - _EPOCH) // _MICROSECOND)
    return value if isinstance(value, str) else repr(value)


def _value(text: str | None, kind: Kind) -> SortValue:
    if text is None:
        return None
    if kind is Kind.TIME:
        return _EPOCH + timedelta(microseconds=int(text))
    if kind is Kind.NUMBER:
        return int(text) if len(text) < 20 and text.lstrip("-").isdecimal() else float(text)
    if "\0" in text:
        raise ValueError("NUL")
    return text
