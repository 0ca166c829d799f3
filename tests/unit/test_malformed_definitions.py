"""Malformed definitions, thousands of them: each is refused with one problem a line, or is good all through."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import yaml

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.driver import RunDriver
from mlplat.pipelines.loader import MAX_BYTES, build_spec, parse_yaml
from mlplat.pipelines.locations import MAX_PROBLEMS
from mlplat.pipelines.parsing import parse_json
from mlplat.pipelines.spec import PipelineSpec
from tests.unit.driving import FakeWorld, Rows, driver_of
from tests.unit.mutations import GOOD, WRONG, mutated

SEEDS = 800
YAML_SEEDS = 150
MAX_LINE = 6_000
_LINE = re.compile(r"(definition|p\.yaml(:\d+)?): \S.*")
#: What only whoever wrote the platform would understand.
_FOREIGN = re.compile(r"pydantic|Traceback|<class|object at 0x|JsonValue|Value error|function-|tagged-union")
_HOSTILE = (
    "!!python/object/apply:os.system ['true']", "*a", "&a ", "<<: *a", "\t", "\x00", "\u2028", "\ud800", "? ", "- ",
    "---\n",
    "%TAG ! x\n",
    "[" * 2_000, "{a: " * 500, ".nan", ".inf", "0x", "1e999", "1" * 5_000, "!!int ''", "!!binary x", ": ", "\n",
    "'", '"', "|\n", ">\n", "name: q\n", "# x\n", "2020-13-45", "!!set {a}", "\ufeff", "\x85", "🦙",
)  # fmt: skip


def refusal(text: bytes) -> str | None:
    """What a JSON definition is refused with; None when it is accepted, and then everything takes it."""
    try:
        parsed = parse_json(text)
    except InvalidPipeline as error:
        return error.message
    assert build_spec(parsed.spec.to_json()) == parsed.spec
    can_begin(parsed.spec)
    return None


def can_begin(spec: PipelineSpec) -> RunDriver:
    """A run of an accepted definition can be driven."""
    rows = Rows(spec)
    driver = driver_of(rows, FakeWorld(rows))
    assert driver.active_attempts == 0
    return driver


def check_refusal(message: str, what: str) -> None:
    """One problem a line, for people, and no longer than people read."""
    lines = message.split("\n")
    assert lines == message.splitlines(), what
    assert 1 <= len(lines) <= MAX_PROBLEMS + 1, what
    for line in lines:
        assert _LINE.fullmatch(line), (what, line)
        assert len(line) <= MAX_LINE, (what, len(line))
        assert line.isprintable(), (what, line)
        assert not _FOREIGN.search(line), (what, line)


def refuse_all(seeds: range) -> tuple[int, int]:
    """Returns how many were accepted and how many refused."""
    refused = 0
    for seed in seeds:
        document, what, must_be_refused = mutated(seed)
        message = refusal(json.dumps(document).encode())
        assert message is not None or not must_be_refused, what
        if message is not None:
            check_refusal(message, what)
            refused += 1
    return len(seeds) - refused, refused


@pytest.mark.parametrize("document", GOOD, ids=[document["name"] for document in GOOD])
def test_what_is_made_wrong_was_good(document: dict[str, Any]) -> None:
    assert refusal(json.dumps(document).encode()) is None


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.__name__.strip("_") for wrong in WRONG])
@pytest.mark.parametrize("document", GOOD, ids=[document["name"] for document in GOOD])
def test_each_way_to_be_wrong_is_refused(document: dict[str, Any], wrong: Any) -> None:
    for seed in range(8):
        made = wrong(json.loads(json.dumps(document)), random.Random(seed))
        message = refusal(json.dumps(made).encode())
        assert message is not None, made
        check_refusal(message, wrong.__name__)


def test_mutated_definitions_are_refused_clearly_or_good() -> None:
    accepted, refused = refuse_all(range(SEEDS))
    assert accepted > SEEDS / 50, "some are odd and good"
    assert refused > SEEDS / 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_thousands_of_mutated_definitions() -> None:
    refuse_all(range(SEEDS, 100_000))


def test_damaged_yaml_is_refused_clearly_or_good() -> None:
    texts = [yaml.safe_dump(document, sort_keys=False) for document in GOOD]
    for seed in range(YAML_SEEDS):
        chance = random.Random(seed)
        text = chance.choice(texts)
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(text))
            text = text[:start] + chance.choice(_HOSTILE) + text[start + chance.choice((0, 0, 1, 5)) :]
        try:
            spec = parse_yaml(text, "p.yaml")
        except InvalidPipeline as error:
            check_refusal(error.message, f"yaml {seed}")
        else:
            can_begin(spec)


def test_nesting_of_any_depth_is_refused_or_good() -> None:
    """What reads the text, what looks through it and what checks it each end at a depth of their own."""
    for depth in [*range(240, 270, 3), *range(920, 1_010)]:
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            value = opening * depth + b"1" + closing * depth
            refusal(b'{"name":"p","steps":{"a":{"uses":"m:f","with":{"x":%s}}}}' % value)
            assert refusal(b'{"name":"p","steps":%s}' % value)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"\xff", b'"p"', b'{"name":"p","steps":{"a":{"uses":"m:f","with":{"x":NaN}}}}',
        b'{"name":"p","steps":{"a":{"uses":"m:f","with":{"x":1e999}}}}',
        b'{"name":"p","steps":{"a":{"uses":"\\ud800"}}}',
        b'{"name":"p","steps":{"a":{"uses":"m:f","with":{"x":%s}}}}' % (b"1" * 5_000),
        b"[" * 500_000, b" " * (MAX_BYTES + 1),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_is_no_definition_at_all_is_refused(text: bytes) -> None:
    message = refusal(text)
    assert message
    assert "\n" not in message


def test_of_many_problems_the_first_are_told() -> None:
    steps = {f"s{number}": {"uses": "x"} for number in range(9_000)}
    message = refusal(json.dumps({"name": "p", "steps": steps}).encode())
    assert message is not None
    lines = message.splitlines()
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[0] == "definition: steps.s0.uses: expected module:function, got 'x'"
    assert lines[-1] == "definition: pipeline: there are more problems"


def test_a_name_cannot_break_a_line_nor_fill_a_page() -> None:
    steps = {"a\nb": {"uses": "m:f"}, "x" * 10_000: {"uses": "m:f"}}
    message = refusal(json.dumps({"name": "p", "steps": steps}).encode())
    assert message is not None
    first, second = message.splitlines()
    assert first.startswith("definition: steps.a\\nb: not a valid name: 'a\\nb'")
    assert len(second) < 1_500
