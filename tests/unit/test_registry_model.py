"""Rules for the names, aliases and versions of models."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.registry.model import (
    MAX_ALIAS_LENGTH,
    MAX_NAME_LENGTH,
    check_alias,
    check_model_name,
    parse_version,
)


@pytest.mark.parametrize("name", ["digits", "my model", "a.b-c_d", "größe", "x" * MAX_NAME_LENGTH])
def test_good_model_names(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize("name", ["", "x" * (MAX_NAME_LENGTH + 1)])
def test_a_name_that_is_empty_or_too_long_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be empty or longer than 250"):
        check_model_name(name)


@pytest.mark.parametrize("name", ["a/b", "a:b", "/", ":"])
def test_a_name_with_a_character_of_model_uris_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="may not contain '/' or ':'"):
        check_model_name(name)


@pytest.mark.parametrize("alias", ["champion", "a-b_c", "1", "v", "va1", "version1", "latest2", "x" * MAX_ALIAS_LENGTH])
def test_good_aliases(alias: str) -> None:
    check_alias(alias)


@pytest.mark.parametrize(
    "alias", ["", "a b", "a.b", "a/b", "a@b", "ä", "champion\n", "x" * (MAX_ALIAS_LENGTH + 1), "v١"]
)
def test_malformed_aliases_are_refused(alias: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid alias name") as caught:
        check_alias(alias)
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("alias", ["latest", "LATEST", "Latest", "v1", "V12", "v0"])
def test_reserved_aliases_are_refused(alias: str) -> None:
    with pytest.raises(InvalidInput, match="reserved"):
        check_alias(alias)


@pytest.mark.parametrize(("text", "version"), [("1", 1), ("12", 12), ("007", 7), ("9" * 18, 10**18 - 1)])
def test_versions(text: str, version: int) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize(
    "text", ["", "0", "00", "-1", "+1", "1.0", "v1", " 1", "1 ", "٣", "²", "9" * 19, "1\n", "latest"]
)
def test_what_is_no_counting_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="must be a positive integer"):
        parse_version(text)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=30))
def test_any_text_is_accepted_or_refused(text: str) -> None:
    for check in (check_model_name, check_alias, parse_version):
        try:
            check(text)
        except InvalidInput:
            continue
        assert text


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10**18 - 1))
def test_every_number_is_a_version(number: int) -> None:
    assert parse_version(str(number)) == number
