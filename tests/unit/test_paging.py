"""Page tokens: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import base64
import math
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.tracking.paging import Kind, SortValue, decode_token, digest, encode_token

KINDS = [Kind.NUMBER, Kind.TEXT, Kind.TIME]
numbers = st.none() | st.integers(-(2**60), 2**60) | st.floats()
texts = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
times = st.none() | st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1), timezones=st.just(UTC))


@settings(deadline=None)
@given(numbers, texts, times)
def test_a_token_gives_back_the_sort_values(number: SortValue, text: SortValue, time: SortValue) -> None:
    found = decode_token(encode_token("q", [number, text, time]), "q", KINDS)
    if isinstance(number, float) and math.isnan(number):
        assert isinstance(found[0], float)
        assert math.isnan(found[0])
        number = found[0]
    assert found == [number, text, time]


@settings(deadline=None)
@given(
    st.text(max_size=60)
    | st.text(max_size=60).map(lambda text: base64.urlsafe_b64encode(text.encode(errors="ignore")).decode())
)
def test_any_other_text_is_refused(token: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid page token"):
        decode_token(token, "q", KINDS)


@pytest.mark.parametrize(
    "body",
    [
        '{"q":"q","v":["1","x"]}',
        '{"q":"q","v":["1","x","1","1"]}',
        '{"q":"q","v":["one","x","1"]}',
        '{"q":"q","v":["1","x","soon"]}',
        '{"q":"q","v":["1","x","999999999999999999999999"]}',
        '{"q":"q","v":["1","a\\u0000","1"]}',
        '{"q":"q","v":[1,"x","1"]}',
        '{"q":"q"}',
        '{"offset":5}',
    ],
)
def test_a_forged_token_is_refused(body: str) -> None:
    with pytest.raises(InvalidInput, match="Invalid page token"):
        decode_token(base64.urlsafe_b64encode(body.encode()).decode(), "q", KINDS)


def test_a_token_of_another_query_is_refused() -> None:
    token = encode_token(digest("runs", [1], "a"), [1.0, "x", None])
    with pytest.raises(InvalidInput, match="another filter"):
        decode_token(token, digest("runs", [1], "b"), KINDS)


def test_a_number_in_a_token_stays_in_bounds() -> None:
    body = b'{"q":"q","v":["' + b"9" * 4_000 + b'"]}'
    assert decode_token(base64.urlsafe_b64encode(body).decode(), "q", [Kind.NUMBER]) == [math.inf]


def test_a_huge_token_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Invalid page token"):
        decode_token("A" * 1_000_000, "q", KINDS)
