"""Step outputs: what stays JSON, what is pickled, and how both are opened."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import Corrupted, InvalidInput
from mlplat.pipelines.expressions import OutputRef
from mlplat.pipelines.outputs import MAX_INLINE_BYTES, load_arguments, store_output
from mlplat.pipelines.stored import canonical_form, open_for_expressions, stored_form


class Colour(str):
    """A subclass, which JSON would lose."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path_factory.mktemp('artifacts')}")


@pytest.mark.parametrize("value", [None, True, 0, -1.5, "", "ä", [], {}, {"a": [1, {"b": None}]}, [[1.0], "x"]])
def test_json_values_stay_inline(value: Any, artifacts: ArtifactStore) -> None:
    stored = store_output(value, artifacts)
    assert stored == {"kind": "json", "value": value}
    assert open_for_expressions(stored) == value


@pytest.mark.parametrize(
    "value",
    [(1, 2), {1: "a"}, {"a": (1,)}, {1, 2}, b"x", math.inf, [math.inf], Colour("red"), {Colour("red"): 1}, 1j],
)
def test_what_json_would_change_is_pickled(value: Any, artifacts: ArtifactStore) -> None:
    stored = store_output(value, artifacts)
    assert stored["kind"] == "blob"
    assert stored["type"] == type(value).__name__
    opened = load_arguments(open_for_expressions(stored), artifacts)
    assert opened == value
    assert type(opened) is type(value)


def test_nan_survives_as_a_pickle(artifacts: ArtifactStore) -> None:
    stored = store_output({"loss": math.nan}, artifacts)
    assert stored["kind"] == "blob"
    assert math.isnan(load_arguments(open_for_expressions(stored), artifacts)["loss"])


def test_large_json_moves_to_the_artifact_store(artifacts: ArtifactStore) -> None:
    fits = "x" * (MAX_INLINE_BYTES - 2)
    assert store_output(fits, artifacts)["kind"] == "json"
    stored = store_output(fits + "x", artifacts)
    assert stored["kind"] == "blob"
    assert load_arguments(open_for_expressions(stored), artifacts) == fits + "x"


def test_an_output_that_cannot_be_pickled_is_refused(artifacts: ArtifactStore) -> None:
    with pytest.raises(InvalidInput, match=r"the output, a generator, cannot be pickled"):
        store_output((number for number in range(3)), artifacts)


def test_the_pickle_of_a_function_of_this_file_works(artifacts: ArtifactStore) -> None:
    stored = store_output(lambda number: number + 1, artifacts)
    assert load_arguments(open_for_expressions(stored), artifacts)(1) == 2


def test_no_output_opens_as_none() -> None:
    assert open_for_expressions(None) is None


def test_a_fan_out_opens_as_the_list_of_its_outputs() -> None:
    blob = {"kind": "blob", "digest": "d" * 64, "type": "DataFrame"}
    stored = {"kind": "list", "outputs": [{"kind": "json", "value": 1}, None, blob, {"kind": "list", "outputs": []}]}
    assert open_for_expressions(stored) == [1, None, OutputRef("d" * 64, "DataFrame"), []]


def test_arguments_are_opened_at_every_depth(artifacts: ArtifactStore) -> None:
    stored = store_output((1, 2), artifacts)
    reference = open_for_expressions(stored)
    arguments = {"a": reference, "b": [{"c": reference}], "d": "text", "e": None}
    assert load_arguments(arguments, artifacts) == {"a": (1, 2), "b": [{"c": (1, 2)}], "d": "text", "e": None}


def test_a_changed_blob_is_not_unpickled(tmp_path: Path) -> None:
    artifacts = ArtifactStore(f"file://{tmp_path}")
    reference = open_for_expressions(store_output((1, 2), artifacts))
    (file,) = [path for path in tmp_path.rglob("*") if path.name == reference.digest]
    file.write_bytes(b"something else")
    with pytest.raises(Corrupted, match="corrupt"):
        load_arguments(reference, artifacts)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(value=values)
def test_every_value_comes_back_equal_and_of_its_type(value: Any, artifacts: ArtifactStore) -> None:
    stored = json.loads(json.dumps(store_output(value, artifacts)))
    opened = load_arguments(open_for_expressions(stored), artifacts)
    assert opened == value
    assert repr(opened) == repr(value)


REF = OutputRef("d" * 64, "Model")


@pytest.mark.parametrize(
    "value", [1, "x", None, [], {}, [1, {"a": REF}], {"a": [REF, 1]}, REF, [REF, [REF]], {"a": {"b": {"c": REF}}}]
)
def test_what_expressions_give_is_stored_and_opened_again(value: Any) -> None:
    assert open_for_expressions(stored_form(value)) == value


def test_equal_arguments_have_equal_forms() -> None:
    assert canonical_form({"a": REF, "b": [1, REF]}) == {"a": {"digest": "d" * 64}, "b": [1, {"digest": "d" * 64}]}
    assert canonical_form(OutputRef("d" * 64, "Other")) == canonical_form(REF)


@pytest.mark.parametrize(
    "value", [2**70, -(2**70), "a\x00b", "\ud800", {"k\x00": 1}, {1: 2}, (1, 2), float("nan"), float("-inf"), {1, 2}]
)
def test_what_json_would_change_is_kept_exactly(value: Any, tmp_path: Path) -> None:
    artifacts = ArtifactStore(f"file://{tmp_path}")
    stored = store_output(value, artifacts)
    opened = load_arguments(open_for_expressions(json.loads(json.dumps(stored))), artifacts)
    assert repr(opened) == repr(value)
