"""Keeping secrets out of what is recorded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit, urlunsplit

HIDDEN = "[hidden]"
#: What is longer is cut: `python -c` may hold a whole program.
MAX_ARGUMENT = 4_000
#: A name with one of these words, or that ends in "key", holds a secret: ``--api-key``, ``db.password``.
_SECRET_WORDS = frozenset(
    {
        "password", "passwd", "passphrase", "pwd", "secret", "secrets", "token", "apikey", "apitoken", "auth",
        "authorization", "bearer", "credential", "credentials", "cookie", "jwt", "pat",
    }
)  # fmt: skip
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NAME = r"[\w.\-+/@]+"
_FLAG = re.compile(rf"-{{1,2}}{_NAME}\Z")
_ASSIGNMENT = re.compile(rf"(-{{0,2}}\+{{0,2}}{_NAME})([=:])(.*)\Z", re.DOTALL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{0,20}://[^\s'\"<>]+")
#: Tokens that are known by their form, wherever they stand.
_KNOWN_TOKENS = re.compile(
    r"\b(?:sk-|gh[opsur]_|github_pat_|glpat-|hf_|xox[abpr]-|AKIA|ASIA)[A-Za-z0-9_\-]{12,}|\bBearer\s+[\w.\-~+/]+=*"
)


def is_secret_name(name: str) -> bool:
    """Whether a flag or variable of this name holds a secret."""
    words = [word.lower() for word in _WORDS.findall(name)]
    return bool(words) and (words[-1] == "key" or not _SECRET_WORDS.isdisjoint(words))


def redact_text(text: str) -> str:
    """Text without the credentials in URLs and without tokens of known form."""
    return _KNOWN_TOKENS.sub(HIDDEN, _URL.sub(lambda found: strip_credentials(found[0]), text))


def redact_arguments(arguments: Iterable[str]) -> list[str]:
    """A command line without secrets: ``--token x``, ``--token=x``, ``db.password=x``, ``https://me:x@host``."""
    return list(_redacted(arguments))


def _redacted(arguments: Iterable[str]) -> Iterator[str]:
    hide_next = False
    for argument in (whole[:MAX_ARGUMENT] for whole in arguments):
        if hide_next and not _FLAG.match(argument):
            hide_next = False
            yield HIDDEN
            continue
        assignment = _ASSIGNMENT.match(argument)
        hide_next = bool(_FLAG.match(argument)) and is_secret_name(argument)
        if assignment and is_secret_name(assignment[1]) and not assignment[3].startswith("//"):
            yield f"{assignment[1]}{assignment[2]}{HIDDEN}"
        else:
            yield redact_text(argument)


def strip_credentials(url: str) -> str:
    """A URL without user, password, query and fragment; ``git@host:path`` stays."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return HIDDEN
    if not parts.scheme or not parts.netloc:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
