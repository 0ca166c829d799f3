"""Definitions as they arrive in JSON."""

from __future__ import annotations

import msgspec
import pytest

from mlplat.errors import InvalidPipeline
from mlplat.pipelines import parsing
from mlplat.pipelines.loader import MAX_BYTES
from mlplat.pipelines.parsing import SpecCache, parse_json
from tests.unit.playing import spec_of


def text_of(name: str = "p") -> bytes:
    inner = {"name": "inner", "steps": {"s": {"uses": "m.n:g"}, "c": {"command": "ls"}}}
    spec = spec_of(
        {"a": {}, "b": {"uses": f"pickle:{'0' * 64}:m.f"}, "sub": {"pipeline": inner}}, {"z": {"uses": "m:h"}}
    )
    return msgspec.json.encode(spec.to_json() | {"name": name})


def test_the_names_of_all_code_are_found_with_their_paths() -> None:
    parsed = parse_json(text_of())
    assert parsed.uses == (
        ("steps.a.uses", "m:f"), ("steps.sub.pipeline.steps.s.uses", "m.n:g"), ("finally.z.uses", "m:h"),
    )  # fmt: skip
    assert parsed.imports == ["m.n:g", "m:f", "m:h"]
    assert parse_json(bytes(parsed.raw)).spec == parsed.spec


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON"), (b"{", "not JSON"), (b"\xff", "not JSON"), (b"[]", "expected an object"),
        (b"null", "expected an object"), (b"[" * 100_000, "not JSON"), (b'{"name": "\\ud800"}', "not JSON"),
        (b" " * (MAX_BYTES + 1), "larger than"), (b'{"name": "p"}', "steps: required, but missing"),
        (b'{"name": NaN}', "not JSON"),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_definition_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(InvalidPipeline, match=reason):
        parse_json(text)


def test_a_definition_is_parsed_once_and_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_KNOWN", 2)
    cache = SpecCache()
    first = cache.get(text_of("a"))
    assert cache.get(text_of("a")) is first
    cache.get(text_of("b"))
    cache.get(text_of("a"))
    cache.get(text_of("c"))  # b goes, which was used least lately
    assert cache.get(text_of("a")) is first
    with pytest.raises(InvalidPipeline):
        cache.get(b"{}")
    assert len(cache._known) == 2
