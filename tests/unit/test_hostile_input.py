"""Input that once led to a wrong result, a lost file or a raw exception."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from sqlalchemy import make_url
from sqlalchemy.dialects.postgresql import psycopg

from mlplat import pipeline, step
from mlplat.artifacts.model import safe_path
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput, InvalidPipeline
from mlplat.metrics.model import decode, encode
from mlplat.pipelines.expressions import OutputRef, find_expressions, references, render, render_command
from mlplat.pipelines.loader import build_spec, parse_yaml
from mlplat.pipelines.outputs import store_output
from mlplat.pipelines.spec import PipelineSpec
from mlplat.settings import embedded_postgres_url
from mlplat.tracking.filters import FilterCompiler
from mlplat.tracking.search import parse_filter
from mlplat.tracking.search_tables import RUNS

STEPS = "name: p\nsteps:\n  a:\n    uses: m:f\n"
NESTED = "(tags.a='b' AND (tags.a='b' OR "


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """An empty store."""
    return ArtifactStore(f"file://{tmp_path}")


@pytest.mark.parametrize("path", ["./", "././", "./.", "", "."])
def test_the_root_cannot_be_deleted(path: str, store: ArtifactStore) -> None:
    assert safe_path(path) == ""
    store.write("a", [b"x"])
    with pytest.raises(InvalidInput):
        store.delete(path)
    assert store.size("a") == 1


def test_two_expressions_in_one_text() -> None:
    assert render("${{ params.a }}-${{ params.b }}", {"params": {"a": 1, "b": 2}}) == "1-2"


@pytest.mark.parametrize("text", ["steps.[load.output, train.output]", "steps.{a: load.output, b: train.output}"])
def test_a_multi_select_reads_every_step_it_names(text: str) -> None:
    assert references(text) == {("steps", "load", "output"), ("steps", "train", "output")}


@pytest.mark.parametrize("text", ["@.steps.load.output", "@", "*.x", "keys(@)", "(" * 3000 + "params.a" + ")" * 3000])
def test_an_expression_must_name_what_it_reads(text: str) -> None:
    with pytest.raises(InvalidInput):
        references(text)


def test_openings_without_end_are_plain_text() -> None:
    """A search for the end from each of them would take hours."""
    text = "${{" * 300_000
    assert list(find_expressions(text)) == []
    assert render(text, {}) == text
    assert render_command(text[:200_000], {}) == text[:200_000]


def test_a_definition_is_refused_where_its_nesting_ends_the_stack() -> None:
    for depth in range(900, 1_000):
        document: dict[str, object] = {}
        for _ in range(depth):
            document = {"steps": document}
        with pytest.raises(InvalidPipeline):
            build_spec(document)


def test_a_pickled_output_in_a_list_is_no_text() -> None:
    with pytest.raises(InvalidInput):
        render("x ${{ steps.f.output }}", {"steps": {"f": {"output": [OutputRef("d", "Frame")]}}})


@pytest.mark.parametrize(
    "value", ["a\x00b", "a\ud800b", ["x", {"k": "\x00"}], {"\x00": 1}, pytest.param(10**5000, id="long")]
)
def test_what_postgres_or_json_refuses_is_pickled(value: object, store: ArtifactStore) -> None:
    assert store_output(value, store)["kind"] == "blob"


def test_a_list_that_contains_itself_is_pickled(store: ArtifactStore) -> None:
    value: list[object] = []
    value.append(value)
    assert store_output(value, store)["kind"] == "blob"


@pytest.mark.parametrize(
    "text",
    [
        "description: 'a\x00b'",
        "? [a, b]\n: c\n",
        "[]: c\n",
        'x: !!int ""',
        'x: !!float ""',
        "x: !!bool maybe",
        "x: !!timestamp x",
        "d: \ud800",
        "    with: {x: .nan}",
    ],
)
def test_odd_yaml_is_refused_as_a_definition(text: str) -> None:
    with pytest.raises(InvalidPipeline):
        parse_yaml(STEPS + text)


def test_a_step_may_be_named_like_a_type() -> None:
    with pytest.raises(InvalidPipeline, match=r"4: steps\.str\.uses"):
        parse_yaml("name: p\nsteps:\n  str:\n    uses: 1\n", "f")


def test_a_number_beyond_every_float_is_refused() -> None:
    spec = PipelineSpec.model_validate(
        {"name": "p", "parameters": {"x": {"type": "float"}}, "steps": {"a": {"uses": "m:f"}}}
    )
    with pytest.raises(InvalidPipeline):
        spec.resolve_params({"x": 10**400})


@pytest.mark.parametrize(
    "text",
    [
        "start_time > 1e999",
        "NOT " * 250 + "tags.a='b'",
        NESTED * 80 + "tags.a='b'" + "))" * 80,
        NESTED * 300 + "tags.a='b'" + "))" * 300,
    ],
)
def test_an_endless_filter_is_refused_or_works(text: str) -> None:
    with suppress(InvalidInput):
        dialect = psycopg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves its dialects untyped
        FilterCompiler(RUNS).compile(parse_filter(text)).compile(dialect=dialect)


@pytest.mark.parametrize("folder", ["/srv/a+b", "/srv/a&b", "/srv/a%20b"])
def test_a_state_folder_may_have_any_name(folder: str) -> None:
    assert make_url(embedded_postgres_url(Path(folder))).query["host"] == f"{folder}/postgres/socket"


@pytest.mark.parametrize(
    "keys",
    [pa.array(["k" * 100_000]), pa.DictionaryArray.from_arrays(pa.array([0]), pa.array([None], pa.string()))],
    ids=["too long", "null behind a dictionary"],
)
def test_a_bad_metric_key_is_refused(keys: pa.Array) -> None:
    columns = {"experiment_id": [1], "run_id": ["r"], "key": keys, "step": [0], "timestamp": [1], "value": [0.5]}
    with pytest.raises(InvalidInput):
        decode(encode(pa.table(columns)))


def _stored(_body: bytes) -> str:
    return "0" * 64


def test_keyword_arguments_keep_their_names_and_positional_ones_need_some() -> None:
    @step
    def gather(*values: int, **options: int) -> int:
        return len(values) + len(options)

    @pipeline
    def named(count: int) -> None:
        gather(first=count, second=2)

    @pipeline
    def unnamed(count: int) -> None:
        gather(count, 2)

    assert named.build(_stored).steps["gather"].with_ == {"first": "${{ params.count }}", "second": 2}
    with pytest.raises(InvalidPipeline, match="names only"):
        unnamed.build(_stored)


def test_a_placeholder_in_an_f_string_stays_an_expression() -> None:
    @step
    def name(text: str) -> str:
        return text

    @pipeline
    def named(seed: int) -> None:
        name(f"run-{seed}")

    assert named.build(_stored).steps["name"].with_ == {"text": "run-${{ params.seed }}"}
