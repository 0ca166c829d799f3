"""Signatures read from MLmodel files, what breaks callers, and which number grows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow.models import ModelSignature, infer_signature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

from mlplat.registry.bumps import MAX_REASON_LENGTH, UNKNOWN, Facts, derive_bump, facts_from_json, facts_to_json
from mlplat.registry.semver import Bump
from mlplat.registry.signature import Signature, incompatibilities, read_signature

LONG, DOUBLE, STRING = DataType.long, DataType.double, DataType.string


def written(signature: ModelSignature) -> Signature:
    """As MLflow writes it, and the registry reads it."""
    found = read_signature(yaml.safe_dump({"flavors": {}, "signature": signature.to_dict()}))
    assert found is not None
    return found


def columns(*specs: ColSpec) -> Signature:
    return written(ModelSignature(inputs=Schema(list(specs))))


def outputs(*specs: ColSpec) -> Signature:
    return written(ModelSignature(outputs=Schema(list(specs))))


def params(*specs: ParamSpec) -> Signature:
    return written(ModelSignature(inputs=Schema([ColSpec(LONG, "a")]), params=ParamSchema(list(specs))))


def tensor(shape: tuple[int, ...], dtype: str = "float32", *, output: bool = False) -> Signature:
    schema = Schema([TensorSpec(np.dtype(dtype), shape)])
    return written(ModelSignature(outputs=schema) if output else ModelSignature(inputs=schema))


def test_a_signature_is_read_as_mlflow_wrote_it() -> None:
    frame = pd.DataFrame({"age": [1, 2], "name": ["a", "b"]})
    found = written(infer_signature(frame, np.array([0.5, 1.5]), params={"top_k": 3}))
    assert [(spec["name"], spec["type"]) for spec in found["inputs"] or ()] == [("age", "long"), ("name", "string")]
    assert [spec["type"] for spec in found["outputs"] or ()] == ["tensor"]
    assert [spec["name"] for spec in found["params"] or ()] == ["top_k"]


@pytest.mark.parametrize(
    "text",
    [
        "", "a: [", "[1]", "signature: 7", "signature: {inputs: 7}", "signature: {inputs: 'nonsense'}",
        "signature: {inputs: '{}'}", "signature: {inputs: '[7]'}", "signature: {inputs: '[{\"a\": NaN}]'}",
        "signature: {inputs: '[{\"a\": \"\\ud800\"}]'}", "signature: {inputs: '[{\"a\": \"\\u0000\"}]'}",
        "signature: {inputs: '" + "[" * 50_000 + "'}", "x: !!python/object/apply:os.system ['false']", "\x00",
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_no_signature(text: str) -> None:
    assert read_signature(text) is None


@given(st.text(max_size=60))
def test_any_text_is_read_or_not_understood(text: str) -> None:
    for mlmodel in (text, f"signature: {{inputs: {json.dumps(text)}}}"):
        found = read_signature(mlmodel)
        assert found is None or any(specs is not None for specs in found.values())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (columns(ColSpec(LONG, "a")), columns(ColSpec(LONG, "a"))),
        (columns(ColSpec(LONG, "a"), ColSpec(LONG, "b")), columns(ColSpec(LONG, "b"))),
        (columns(ColSpec(LONG, "a")), columns(ColSpec(LONG, "a"), ColSpec(STRING, "b", required=False))),
        (columns(ColSpec(LONG, "a")), columns(ColSpec(LONG, "a", required=False))),
        (columns(ColSpec(LONG, "a")), columns(ColSpec(DOUBLE, "a"))),
        (columns(ColSpec(DataType.integer, "a")), columns(ColSpec(LONG, "a"))),
        (outputs(ColSpec(LONG, "a")), outputs(ColSpec(LONG, "a"), ColSpec(LONG, "b"))),
        (outputs(ColSpec(LONG, "a")), written(ModelSignature(Schema([ColSpec(LONG)]), Schema([ColSpec(LONG, "a")])))),
        (tensor((-1, 4)), tensor((-1, 4))),
        (tensor((8, 4)), tensor((-1, 4))),
        (tensor((-1, 4), output=True), tensor((8, 4), output=True)),
        (params(), params(ParamSpec("k", LONG, 3))),
        (params(ParamSpec("k", LONG, 3)), params(ParamSpec("k", LONG, 5))),
    ],
)
def test_callers_can_go_on(before: Signature, after: Signature) -> None:
    assert list(incompatibilities(before, after)) == []
    bump, _reason = derive_bump(Facts(before), Facts(after))
    assert bump == (Bump.PATCH if before == after else Bump.MINOR)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (columns(ColSpec(LONG, "a")), columns(ColSpec(LONG, "a"), ColSpec(LONG, "b")), "input b is new and required"),
        (columns(ColSpec(LONG, "a")), columns(ColSpec(STRING, "a")), "input a was long and is string"),
        (columns(ColSpec(DOUBLE, "a")), columns(ColSpec(LONG, "a")), "input a was double and is long"),
        (columns(ColSpec(LONG, "a", required=False)), columns(ColSpec(LONG, "a")), "input a is required now"),
        (columns(ColSpec(LONG, "a")), outputs(ColSpec(LONG, "a")), "the inputs are not told any more"),
        (outputs(ColSpec(LONG, "a")), outputs(ColSpec(LONG, "b")), "output a is gone"),
        (outputs(ColSpec(LONG, "a")), outputs(ColSpec(DOUBLE, "a")), "output a was long and is double"),
        (outputs(ColSpec(LONG, "a")), columns(ColSpec(LONG, "a")), "the outputs are not told any more"),
        (tensor((-1, 4)), tensor((8, 4)), "input 0 was"),
        (tensor((-1, 4)), tensor((-1, 5)), "input 0 was"),
        (tensor((-1, 4)), tensor((-1, 4, 1)), "input 0 was"),
        (tensor((-1, 4)), tensor((-1, 4), "float64"), "input 0 was"),
        (tensor((8, 4), output=True), tensor((-1, 4), output=True), "output 0 was"),
        (params(ParamSpec("k", LONG, 3)), params(), "param k is gone"),
        (params(ParamSpec("k", LONG, 3)), params(ParamSpec("k", STRING, "3")), "param k was long and is string"),
    ],
)  # fmt: skip
def test_callers_are_broken(before: Signature, after: Signature, reason: str) -> None:
    assert any(reason in told for told in incompatibilities(before, after))
    bump, told = derive_bump(Facts(before), Facts(after))
    assert bump == Bump.MAJOR
    assert reason in told


KNOWN = Facts(columns(ColSpec(LONG, "a")), "c0ffee", False, "train.py", ("digits 1f",))


@pytest.mark.parametrize(
    ("after", "bump", "reason"),
    [
        (KNOWN, Bump.PATCH, "no other signature, data or code is known"),
        (UNKNOWN, Bump.MAJOR, "it has no signature any more"),
        (replace(KNOWN, data=("digits 2e",)), Bump.MINOR, "other data"),
        (replace(KNOWN, commit="decaf"), Bump.MINOR, "other code: commit c0ffee became decaf"),
        (replace(KNOWN, dirty=True), Bump.MINOR, "the code had changes that were not committed"),
        (replace(KNOWN, entry_point="fit.py"), Bump.MINOR, "another entry point: train.py became fit.py"),
        (replace(KNOWN, commit="decaf", data=()), Bump.MINOR, "other data; other code: commit c0ffee became decaf"),
        (
            replace(KNOWN, commit=None, entry_point=None, data=None),
            Bump.PATCH,
            "no other signature, data or code is known",
        ),
    ],
)
def test_what_changed_says_which_number_grows(after: Facts, bump: Bump, reason: str) -> None:
    assert derive_bump(KNOWN, after) == (bump, reason)


def test_a_first_signature_breaks_nobody() -> None:
    assert derive_bump(UNKNOWN, KNOWN) == (Bump.MINOR, "the signature changed so that callers can go on")


def test_reasons_are_short() -> None:
    many = columns(*(ColSpec(LONG, f"{number}-{'x' * 300}") for number in range(100)))
    bump, reason = derive_bump(Facts(columns(ColSpec(LONG, "a"))), Facts(many))
    assert bump == Bump.MAJOR
    assert len(reason) == MAX_REASON_LENGTH


@pytest.mark.parametrize("facts", [UNKNOWN, KNOWN, replace(KNOWN, dirty=True, data=())])
def test_facts_are_read_as_they_were_written(facts: Facts) -> None:
    stored: dict[str, Any] = json.loads(json.dumps(facts_to_json(facts)))
    assert facts_from_json(stored) == facts
