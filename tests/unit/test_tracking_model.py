"""Rules for experiments, runs and their parts."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.keys import MAX_KEY_LENGTH, check_key
from mlplat.tracking.model import (
    MAX_NAME_LENGTH,
    MAX_PARAM_LENGTH,
    MAX_TAG_LENGTH,
    check_name,
    cut_param,
    cut_tag,
    from_ms,
    parse_experiment_id,
    random_run_name,
    to_ms,
    unique_params,
)


@pytest.mark.parametrize("key", ["a", "loss", "val/loss", "a b", "a.b-c_d:e", ".hidden", "größe", "a/..b", "x" * 250])
def test_good_keys(key: str) -> None:
    check_key("metric", key)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "this has 0"),
        ("x" * (MAX_KEY_LENGTH + 1), "this has 251"),
        ("a,b", "may only contain"),
        ("a\n", "may only contain"),
        ("a\x00", "may only contain"),
        ("a'b", "may only contain"),
        ("a\\b", "may only contain"),
        ("/a", "plain path"),
        ("a/", "plain path"),
        ("a//b", "plain path"),
        ("..", "plain path"),
        ("../a", "plain path"),
        ("a/../b", "plain path"),
        ("a/./b", "plain path"),
        (".", "plain path"),
        ("/", "plain path"),
    ],
)
def test_bad_keys_are_refused_with_the_reason(key: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(reason)) as caught:
        check_key("tag", key)
    assert caught.value.message.startswith("Invalid tag name: ")
    assert len(caught.value.message) < 1_000


def test_what_is_too_long_is_cut() -> None:
    assert cut_param("x" * 7_000) == "x" * MAX_PARAM_LENGTH
    assert cut_tag("x" * 9_000) == "x" * MAX_TAG_LENGTH
    assert cut_param("short") == cut_tag("short") == "short"


@pytest.mark.parametrize("name", ["", " ", "\t\n", "x" * (MAX_NAME_LENGTH + 1)])
def test_bad_experiment_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid experiment name"):
        check_name("experiment", name)


@pytest.mark.parametrize("name", ["a", " a ", "x" * MAX_NAME_LENGTH, "a/b:c"])
def test_good_experiment_names(name: str) -> None:
    check_name("experiment", name)


def test_the_params_of_a_batch_are_cut_and_keep_their_order() -> None:
    batch = unique_params([("b", "1"), ("a", "x" * 7_000)])
    assert list(batch) == ["b", "a"]
    assert batch["a"] == "x" * MAX_PARAM_LENGTH


def test_a_param_twice_in_a_batch_is_refused_even_with_the_same_value() -> None:
    with pytest.raises(InvalidInput, match="Duplicate parameter keys have been submitted: 'a'"):
        unique_params([("a", "1"), ("a", "1")])


def test_a_malformed_key_in_a_batch_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Invalid param name"):
        unique_params([("a", "1"), ("../b", "1")])


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("7", 7), ("007", 7), ("9" * 18, 10**18 - 1)])
def test_experiment_ids(text: str, number: int) -> None:
    assert parse_experiment_id(text) == number


@pytest.mark.parametrize("text", ["", "-1", "+1", " 1", "1.0", "1e3", "abc", "9" * 19, "٣", "²", "1_000", "1\n"])
def test_bad_experiment_ids_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid experiment ID"):
        parse_experiment_id(text)


def test_wire_times() -> None:
    assert from_ms(0) == datetime(1970, 1, 1, tzinfo=UTC)
    assert from_ms(1_700_000_000_123) == datetime(2023, 11, 14, 22, 13, 20, 123_000, tzinfo=UTC)
    assert to_ms(datetime(2023, 11, 14, 22, 13, 20, 123_999, tzinfo=UTC)) == 1_700_000_000_123


@pytest.mark.parametrize("value", [-1, 253_402_300_800_000, 2**63, 10**30])
def test_times_outside_of_the_calendar_are_refused(value: int) -> None:
    with pytest.raises(InvalidInput, match="expected milliseconds since 1970"):
        from_ms(value)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 253_402_300_799_999))
def test_a_wire_time_survives_the_round_trip(value: int) -> None:
    assert to_ms(from_ms(value)) == value


def test_random_run_names_are_valid_keys_and_differ() -> None:
    names = {random_run_name() for _ in range(50)}
    assert len(names) > 40
    assert all(re.fullmatch(r"[a-z]+-[a-z]+-\d{1,3}", name) for name in names)
