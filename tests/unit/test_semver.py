"""Semantic versions, their order, and ranges of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.registry.semver import (
    EVERY,
    MAX_NUMBER,
    Bump,
    SemanticVersion,
    bumped,
    is_range,
    parse_range,
    parse_semantic_version,
)

#: Small numbers meet one another's borders.
VERSIONS = st.builds(SemanticVersion, *[st.integers(0, 3)] * 3)


@given(st.builds(SemanticVersion, *[st.integers(0, MAX_NUMBER)] * 3))
def test_a_version_is_read_as_it_was_written(version: SemanticVersion) -> None:
    assert parse_semantic_version(str(version)) == version
    assert parse_range(str(version)).lower == version


@pytest.mark.parametrize(
    "text", ["", "1", "1.2", "1.2.3.4", "v1.2.3", "01.2.3", "1.2.3-beta", "1.2.x", "1.2.3\n", "1.2.٣", "1.2.2147483647"]
)
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid semantic version"):
        parse_semantic_version(text)


@given(VERSIONS, st.sampled_from(Bump))
def test_a_bump_raises_one_number_and_clears_those_behind_it(version: SemanticVersion, bump: Bump) -> None:
    after = bumped(version, bump)
    place = list(Bump).index(bump)
    assert after > version
    assert after[:place] == version[:place]
    assert after[place] == version[place] + 1
    assert not any(after[place + 1 :])


@pytest.mark.parametrize("bump", list(Bump))
def test_numbers_end(bump: Bump) -> None:
    with pytest.raises(InvalidInput, match="give a semantic version"):
        bumped(SemanticVersion(MAX_NUMBER, MAX_NUMBER, MAX_NUMBER), bump)


@pytest.mark.parametrize(
    ("text", "lower", "upper"),
    [
        ("1.2.3", "1.2.3", "1.2.4"), ("=1.2.3", "1.2.3", "1.2.4"), ("1.2", "1.2.0", "1.3.0"),
        ("1.2.x", "1.2.0", "1.3.0"), ("1", "1.0.0", "2.0.0"), ("1.X", "1.0.0", "2.0.0"), ("1.*.7", "1.0.0", "2.0.0"),
        ("^1.2.3", "1.2.3", "2.0.0"), ("^1.2", "1.2.0", "2.0.0"), ("^1", "1.0.0", "2.0.0"), ("^ 1.2", "1.2.0", "2.0.0"),
        ("^0.2.3", "0.2.3", "0.3.0"), ("^0.0.3", "0.0.3", "0.0.4"), ("^0.0", "0.0.0", "0.1.0"),
        ("^0", "0.0.0", "1.0.0"),
        ("~1.2.3", "1.2.3", "1.3.0"), ("~1.2", "1.2.0", "1.3.0"), ("~1", "1.0.0", "2.0.0"),
        (">=1.2 <3", "1.2.0", "3.0.0"), (">=1.2,<3", "1.2.0", "3.0.0"), (" >= 1.2.3 , < 1.2.5 ", "1.2.3", "1.2.5"),
        (">1.2 <=1.4", "1.3.0", "1.5.0"), (">1.2.3 <=1.2.5", "1.2.4", "1.2.6"), ("^1.2 ~1.4", "1.4.0", "1.5.0"),
        ("<2", "0.0.0", "2.0.0"),
    ],
)  # fmt: skip
def test_ranges_as_npm_reads_them(text: str, lower: str, upper: str) -> None:
    found = parse_range(text)
    assert (str(found.lower), str(found.upper)) == (lower, upper)


@pytest.mark.parametrize("text", ["*", "x", "^*", ">=0"])
def test_every_version_is_in_the_widest_range(text: str) -> None:
    assert parse_range(text) == EVERY
    assert SemanticVersion(MAX_NUMBER, MAX_NUMBER, MAX_NUMBER) < EVERY.upper


@given(VERSIONS, VERSIONS)
def test_comparisons_of_whole_versions_are_those_of_their_order(
    bound: SemanticVersion, version: SemanticVersion
) -> None:
    for operator, inside in (
        (">", version > bound), (">=", version >= bound), ("<=", version <= bound), ("", version == bound),
    ):  # fmt: skip
        found = parse_range(f"{operator}{bound}")
        assert (found.lower <= version < found.upper) == inside
    compatible = version >= bound and version[: _place(bound)] == bound[: _place(bound)]
    found = parse_range(f"^{bound}")
    assert (found.lower <= version < found.upper) == compatible


def _place(version: SemanticVersion) -> int:
    return next((place for place, number in enumerate(version, 1) if number), 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Invalid version range: ''"), ("  ", "Expected for instance"), ("a", "Expected"), ("1.2.3.4", "Expected"),
        ("1.2-beta", "Expected"), ("1..2", "Expected"), ("01.2", "Expected"), ("^", "Expected"), ("1 || 2", "Expected"),
        ("=>1", "Expected"), ("1.2;DROP TABLE", "Expected"), ("^9999999999", "Numbers go up to"),
        ("^99999999999", "Expected"), (">1 <1", "No version can be in it"), ("1 2", "No version"), ("<*", "No version"),
        ("<0.0.0", "No version"), (" ".join([">=1"] * 60), "Expected"),
    ],
)  # fmt: skip
def test_malformed_ranges_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_range(text)
    assert message in caught.value.message
    assert len(caught.value.message) < 300


@given(st.text(max_size=30))
def test_any_text_is_a_range_or_refused(text: str) -> None:
    try:
        found = parse_range(text)
    except InvalidInput:
        return
    assert found.lower < found.upper


@pytest.mark.parametrize("text", ["1.2", "^1", ">=1 <2", "1.x", "*", " ~1"])
def test_what_looks_like_a_range(text: str) -> None:
    assert is_range(text)


@pytest.mark.parametrize("text", ["3", "latest", "Production", "@champion", "v1.2", "", "x"])
def test_what_does_not_look_like_a_range(text: str) -> None:
    assert not is_range(text)
