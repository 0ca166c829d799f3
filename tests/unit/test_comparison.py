"""Runs side by side: aligning, differing, code."""

from __future__ import annotations

import pytest

from mlplat.tracking.comparison import (
    MAX_DIFF_CHARACTERS,
    MAX_DIFF_LINES,
    MAX_FACTS,
    Code,
    JsonValue,
    Row,
    align,
    compare_code,
    differences,
    flatten,
    packages,
    uses_by_name,
)
from mlplat.tracking.inputs import Dataset, DatasetInput


def test_rows_are_by_key_and_values_in_the_order_of_the_runs() -> None:
    rows = align([{"b": "1", "a": "x"}, {"a": "x", "b": "2"}])
    assert rows == [Row("a", False, ["x", "x"]), Row("b", True, ["1", "2"])]
    assert differences(rows) == [rows[1]]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([{"a": "1"}, {}], Row("a", True, ["1", None])),
        ([{}, {"a": "1"}], Row("a", True, [None, "1"])),
        ([{"a": "1"}, {"a": None}], Row("a", True, ["1", None])),
        ([{"a": ""}, {}], Row("a", True, ["", None])),
        ([{"a": 0}, {}], Row("a", True, [0, None])),
        ([{"a": False}, {}], Row("a", True, [False, None])),
        ([{"a": "1"}], Row("a", False, ["1"])),
        ([{"a": ["x", 1]}, {"a": ["x", 1]}], Row("a", False, [["x", 1], ["x", 1]])),
        ([{"a": "1"}, {"a": 1}], Row("a", True, ["1", 1])),
        ([{"a": 1}, {"a": 1}, {"a": 2}], Row("a", True, [1, 1, 2])),
    ],
)
def test_a_missing_value_is_not_an_equal_one(columns: list[dict[str, JsonValue]], expected: Row) -> None:
    assert align(columns) == [expected]


def test_what_nobody_has_is_no_row() -> None:
    assert align([{}, {}]) == []
    assert align([{"a": None}, {}]) == []
    assert align([]) == []


def test_values_may_be_judged_by_a_part_of_them() -> None:
    def judged(value: JsonValue) -> object:
        assert isinstance(value, dict)
        return value["value"]

    columns: list[dict[str, JsonValue]] = [
        {"m": {"value": 1, "step": 5}, "n": {"value": 1}, "o": {"value": 1}},
        {"m": {"value": 1, "step": 9}, "n": {"value": 2}},
    ]
    assert [(row.key, row.differs) for row in align(columns, judged)] == [("m", False), ("n", True), ("o", True)]


def _use(name: str, digest: str, context: str | None = None) -> DatasetInput:
    return DatasetInput(
        Dataset(name, digest, "local", "{}"), {} if context is None else {"mlflow.data.context": context}
    )


def test_datasets_are_compared_by_name_digest_and_context() -> None:
    first = uses_by_name([_use("iris", "d1", "train"), _use("iris", "d2", "eval"), _use("wine", "w")])
    assert first == {
        "iris": [{"digest": "d2", "context": "eval"}, {"digest": "d1", "context": "train"}],
        "wine": [{"digest": "w", "context": None}],
    }
    second = uses_by_name([_use("wine", "w", "train"), _use("iris", "d2", "eval"), _use("iris", "d1", "train")])
    rows = align([first, second, uses_by_name([])])
    assert [row.values[2] for row in rows] == [None, None]
    assert [row.key for row in differences(align([first, second]))] == ["wine"]


def test_a_document_is_flattened_to_its_leaves() -> None:
    document: JsonValue = {
        "format": 1,
        "captured_at": "now",
        "python": "3.12",
        "cpu": {"count": 8, "model": None},
        "gpus": [{"name": "H100"}],
        "packages": {"numpy": "2.0", "ruamel.yaml": "1", "format": "3"},
    }
    assert flatten(document) == {
        "python": "3.12",
        "cpu.count": 8,
        "gpus": [{"name": "H100"}],
        "packages.numpy": "2.0",
        "packages.ruamel.yaml": "1",
        "packages.format": "3",
    }


@pytest.mark.parametrize("document", [None, [], "text", 5, {}])
def test_what_is_not_an_object_has_no_facts(document: JsonValue) -> None:
    assert flatten(document) == {}


def test_flattening_is_bounded_in_depth_and_number() -> None:
    deep: dict[str, JsonValue] = {"end": 1}
    for _ in range(1_000):
        deep = {"x": deep}
    assert flatten({"shallow": 1, "deep": deep}) == {"shallow": 1}
    assert len(flatten({str(number): number for number in range(MAX_FACTS + 10)})) == MAX_FACTS


def test_pinned_packages_are_read_from_a_requirements_file() -> None:
    text = (
        "# made by us\nnumpy==2.1\nray[serve]==2.0\n-e file:///x  # mine==1\nscikit-learn==1.5 ; python_version>'3'\n"
    )
    assert packages(text) == {"packages.numpy": "2.1", "packages.scikit-learn": "1.5"}
    assert packages("") == {}


CLEAN = Code("c1", "")
DIRTY = Code("c1", "-a\n+b\n")


@pytest.mark.parametrize(
    ("base", "other", "differs", "diff"),
    [
        (CLEAN, CLEAN, False, ""),
        (DIRTY, DIRTY, False, ""),
        (CLEAN, Code("c2", ""), True, ""),
        (Code("c1"), Code("c1"), False, None),
        (Code("c1"), Code("c2"), True, None),
        (Code(), Code("c1"), True, None),
        (Code("c1"), CLEAN, True, None),
        (CLEAN, Code("c1"), True, None),
        (CLEAN, Code("c1", None, too_many=True), True, None),
        (Code("c1", None, too_many=True), Code("c1", None, too_many=True), True, None),
    ],
)
def test_code_differs_by_commit_and_by_changes(base: Code, other: Code, differs: bool, diff: str | None) -> None:
    found = compare_code("r1", base, "r2", other)
    assert (found.run_id, found.base_commit, found.commit) == ("r2", base.commit, other.commit)
    assert (found.differs, found.diff) == (differs, diff)
    assert (found.note is None) == (diff is not None)


def test_changes_are_compared_line_by_line() -> None:
    found = compare_code("r1", DIRTY, "r2", Code("c1", "-a\n+c\n"))
    assert found.differs
    assert found.diff == "--- r1\n+++ r2\n@@ -1,2 +1,2 @@\n -a\n-+b\n++c"


def test_a_diff_is_bounded() -> None:
    long = Code("c1", "\n".join(str(number) for number in range(MAX_DIFF_LINES + 1)))
    found = compare_code("r1", long, "r2", CLEAN)
    assert (found.differs, found.diff) == (True, None)
    assert found.note is not None
    wide = compare_code("r1", Code("c1", "x" * MAX_DIFF_CHARACTERS), "r2", CLEAN)
    assert len(wide.diff or "") == MAX_DIFF_CHARACTERS
    assert "cut" in (wide.note or "")
