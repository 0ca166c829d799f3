"""Paths of artifacts: what passes stays below the root."""

from __future__ import annotations

import posixpath
from contextlib import suppress
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.artifacts.model import MAX_DEPTH, MAX_PATH_BYTES, MAX_SEGMENT_BYTES, safe_path
from mlplat.errors import InvalidInput


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("", ""),
        (".", ""),
        ("a", "a"),
        ("a/b.txt", "a/b.txt"),
        ("a/", "a"),
        ("a//b", "a/b"),
        ("./a", "a"),
        ("a/./b", "a/b"),
        ("a b/ü.txt", "a b/ü.txt"),
        ("..a/b..", "..a/b.."),
        ("...", "..."),
        ("100%", "100%"),
        ("a%20b", "a%20b"),
        (".hidden", ".hidden"),
        ("ab:c", "ab:c"),
    ],
)
def test_good_paths_come_out_in_normal_form(path: str, normal: str) -> None:
    assert safe_path(path) == normal


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc/passwd", "relative"),
        ("//host/share", "relative"),
        ("..", "'..'"),
        ("../a", "'..'"),
        ("a/../../b", "'..'"),
        ("a/..", "'..'"),
        ("a\\b", "forward slashes"),
        ("..\\a", "forward slashes"),
        ("C:/windows", "relative"),
        ("c:", "relative"),
        ("a\x00b", "control characters"),
        ("a\nb", "control characters"),
        ("a\x7f", "control characters"),
        ("x" * (MAX_SEGMENT_BYTES + 1), "longer than 255 bytes"),
        ("ü" * 128, "longer than 255 bytes"),
        ("/".join(["abcdefg"] * 200), "at most 1024 bytes"),
        ("/".join(["a"] * (MAX_DEPTH + 1)), "64 levels"),
    ],
)
def test_bad_paths_are_refused_with_the_reason(path: str, reason: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        safe_path(path)
    assert reason in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("bad", ["../a", "/a", "..", "a\\b", "a\x00", "C:/a"])
@pytest.mark.parametrize("layers", [1, 2])
def test_encoding_hides_nothing(bad: str, layers: int) -> None:
    path = bad
    for _layer in range(layers):
        path = "".join(f"%{byte:02x}" for byte in path.encode())
    with pytest.raises(InvalidInput):
        safe_path(path)


@pytest.mark.parametrize("path", ["%2e%2e/a", "%2E%2E%2Fa", ".%2e/a", "%252e%252e/a", "%2fetc", "a%5c..%5cb", "a%00"])
def test_common_encoded_attacks_are_refused(path: str) -> None:
    with pytest.raises(InvalidInput):
        safe_path(path)


def test_the_greatest_lengths_pass() -> None:
    assert safe_path("x" * MAX_SEGMENT_BYTES)
    assert safe_path("/".join(["a"] * MAX_DEPTH))
    longest = "/".join(["x" * 127] * 8)
    assert len(longest) == MAX_PATH_BYTES - 1
    assert safe_path(longest) == longest


pieces = st.sampled_from(["a", "b.txt", ".", "..", "/", "//", "\\", "%2e", "%2f", "%252e", "%", "\x00", " ", "é", "C:"])


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30) | st.lists(pieces, max_size=10).map("".join))
def test_what_passes_stays_below_the_root(path: str) -> None:
    with suppress(InvalidInput):
        safe = safe_path(path)
        joined = posixpath.normpath(posixpath.join("/root", safe))
        assert joined == "/root" or joined.startswith("/root/")
        assert ".." not in safe.split("/")
        assert safe_path(safe) in {safe, ""}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=10), min_size=1, max_size=5))
def test_plain_names_pass_unchanged_plain_and_encoded(parts: list[str]) -> None:
    path = "/".join(parts)
    assert safe_path(path) == path
    assert safe_path(quote(path)) == quote(path)
