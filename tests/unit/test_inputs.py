"""Rules of datasets, run histories and logged models that need no store."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlplat.errors import InvalidInput
from mlplat.tracking.inputs import MAX_INPUTS, Dataset, DatasetInput, unique_inputs
from mlplat.tracking.logged_model import FORBIDDEN_IN_NAMES, ModelMetric, NewModel, check_new
from mlplat.tracking.model import MAX_MODEL_HISTORY, append_model

DATASET = Dataset("d", "1", "local", "here")
METRIC = ModelMetric("m-1", "run", "loss", 0.5, 10, 1)


def test_of_equal_datasets_the_first_counts() -> None:
    first, again = DatasetInput(DATASET, {"a": "1"}), DatasetInput(replace(DATASET, schema="new"), {"a": "2"})
    other = DatasetInput(replace(DATASET, digest="2"))
    assert unique_inputs([first, again, other]) == [first, other]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "'name'"),
        ({"digest": "x" * 37}, "'digest' exceeds the maximum length of 36 characters: it has 37"),
        ({"source_type": ""}, "'source_type'"),
        ({"source": "x" * 65_536}, "'source' exceeds"),
    ],
)
def test_a_malformed_dataset_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        unique_inputs([DatasetInput(DATASET), DatasetInput(replace(DATASET, **fields))])


def test_a_request_has_a_bounded_number_of_datasets() -> None:
    inputs = [DatasetInput(replace(DATASET, name=str(number))) for number in range(MAX_INPUTS + 1)]
    assert len(unique_inputs(inputs[:-1])) == MAX_INPUTS
    with pytest.raises(InvalidInput, match=r"at most 1000 datasets\. Got 1001"):
        unique_inputs(inputs)


def test_a_history_grows_at_its_end_and_forgets_its_start() -> None:
    history: str | None = None
    for number in range(MAX_MODEL_HISTORY + 3):
        history = append_model(history, {"n": number})
    assert [entry["n"] for entry in json.loads(history or "")] == list(range(3, MAX_MODEL_HISTORY + 3))


@pytest.mark.parametrize("history", ["mine", "{}", "1", '"x"'])
def test_a_history_that_is_no_list_is_refused(history: str) -> None:
    with pytest.raises(InvalidInput, match="not a JSON list"):
        append_model(history, {})


def test_points_that_differ_in_anything_have_identities_of_their_own() -> None:
    others = [
        replace(METRIC, run_id="other"), replace(METRIC, key="other"), replace(METRIC, value=0.25),
        replace(METRIC, value=float("nan")), replace(METRIC, timestamp=11), replace(METRIC, step=2),
        replace(METRIC, dataset_name="d"), replace(METRIC, dataset_digest="d"),
    ]  # fmt: skip
    assert len({point.identity for point in [METRIC, *others]}) == len(others) + 1
    assert replace(METRIC).identity == METRIC.identity
    nan = replace(METRIC, value=float("nan"))
    assert nan.identity == replace(nan, value=float("nan")).identity


@pytest.mark.parametrize("character", FORBIDDEN_IN_NAMES)
def test_names_of_models_have_no_special_characters(character: str) -> None:
    with pytest.raises(InvalidInput, match="cannot contain"):
        check_new(NewModel(0, f"a{character}b"))
