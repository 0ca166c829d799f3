"""Secrets stay out of what is recorded."""

from __future__ import annotations

import pytest

from mlplat.sdk.capture.redact import HIDDEN, is_secret_name, redact_arguments, strip_credentials


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--password", "x"], ["--password", HIDDEN]),
        (["--password=x"], [f"--password={HIDDEN}"]),
        (["-token", "x", "y"], ["-token", HIDDEN, "y"]),
        (["--api-key", "x"], ["--api-key", HIDDEN]),
        (["--key", "x"], ["--key", HIDDEN]),
        (["--apiKey=x"], [f"--apiKey={HIDDEN}"]),
        (["--AWS_SECRET_ACCESS_KEY=x=y"], [f"--AWS_SECRET_ACCESS_KEY={HIDDEN}"]),
        (["db.password=x"], [f"db.password={HIDDEN}"]),
        (["+wandb.api_key=x"], [f"+wandb.api_key={HIDDEN}"]),
        (["HF_TOKEN=x"], [f"HF_TOKEN={HIDDEN}"]),
        (["-H", "Authorization: Bearer abc.def"], ["-H", f"Authorization:{HIDDEN}"]),
        (["--token", "--verbose", "x"], ["--token", "--verbose", "x"]),
        (["--data", "https://me:pw@host/x?sig=1"], ["--data", "https://host/x"]),
        (["--note", "see https://me:pw@host/x now"], ["--note", "see https://host/x now"]),
        (["hf_abcdefghijklmnop"], [HIDDEN]),
        (["--token"], ["--token"]),
        ([], []),
    ],
)
def test_secrets_are_hidden(arguments: list[str], expected: list[str]) -> None:
    assert redact_arguments(arguments) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["python", "train.py", "--lr", "0.1", "--max-tokens=5", "--tokenizer", "bert", "data:train", "x=1"],
        ["--keyboard", "us", "--monkey=1", "-p", "3", "--author", "me", "C:/x"],
        ["/path/with:colon", "a b", "ü", "file:///tmp/x", "s3://bucket/key"],
    ],
)
def test_everything_else_stays(arguments: list[str]) -> None:
    assert redact_arguments(arguments) == arguments


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:token@github.com/o/r.git", "https://github.com/o/r.git"),
        ("https://token@github.com:8443/o/r.git", "https://github.com:8443/o/r.git"),
        ("https://host/o/r?access_token=x#frag", "https://host/o/r"),
        ("ssh://git@host/o/r", "ssh://host/o/r"),
        ("git@github.com:o/r.git", "git@github.com:o/r.git"),
        ("/srv/git/r", "/srv/git/r"),
        ("https://a@b@host/x", "https://host/x"),
        ("http://[bad", HIDDEN),
    ],
)
def test_urls_lose_their_credentials(url: str, expected: str) -> None:
    assert strip_credentials(url) == expected


def test_names() -> None:
    assert is_secret_name("--ssh-key")
    assert not is_secret_name("--key-size")
    assert not is_secret_name("--")
