"""Definitions from text: each problem comes with its line, its path and its reason."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.loader import MAX_BYTES, build_spec, load_file, parse_yaml

GOOD = """\
name: digits
description: Trains.
parameters:
  seed: {type: int, default: 7, min: 0}
  kind:
    type: str
    default: svm
    choices: [svm, tree]
steps:
  load:
    uses: pkg.mod:load
    with: {seed: "${{ params.seed }}"}
  train:
    uses: pkg.mod:train
    foreach: ${{ steps.load.output.parts }}
    with:
      part: ${{ item }}
      kind: ${{ params.kind }}
    retry: {max_attempts: 3, initial_s: 0.5}
    resources: {cpus: 2, memory_mb: 512}
  report:
    uses: pkg.mod:report
    needs: [train]
"""
STEPS = "steps:\n  a:\n    uses: m:f\n"


def problems(text: str) -> list[str]:
    with pytest.raises(InvalidPipeline) as caught:
        parse_yaml(text, "p.yaml")
    return caught.value.message.splitlines()


def test_a_good_definition_is_read_whole() -> None:
    spec = parse_yaml(GOOD)
    assert (spec.name, spec.description, list(spec.steps)) == ("digits", "Trains.", ["load", "train", "report"])
    assert spec.parameters["seed"].default == 7
    assert spec.parameters["kind"].choices == ["svm", "tree"]
    assert spec.steps["load"].with_ == {"seed": "${{ params.seed }}"}
    assert spec.steps["train"].foreach == "${{ steps.load.output.parts }}"
    assert spec.steps["train"].retry.max_attempts == 3
    assert spec.steps["train"].resources.memory_mb == 512
    assert spec.steps["report"].needs == ["train"]


def test_what_was_read_can_be_built_again_from_its_json() -> None:
    spec = parse_yaml(GOOD)
    assert build_spec(spec.to_json()) == spec


def test_a_definition_that_is_no_text_has_no_lines_in_its_problems() -> None:
    with pytest.raises(InvalidPipeline) as caught:
        build_spec({"name": "p", "steps": {"a": {"uses": "m:f", "needs": ["b"]}}})
    assert caught.value.message == "definition: steps.a.needs.0: unknown step 'b'; there is a"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "${{ params.seed }}",
            "${{ params.sed }}",
            "p.yaml:12: steps.load.with.seed: unknown parameter 'sed'; did you mean 'seed'?",
        ),
        (
            "steps.load.output",
            "steps.laod.output",
            "p.yaml:15: steps.train.foreach: unknown step 'laod'; did you mean 'load'?",
        ),
        ("[train]", "[trian]", "p.yaml:23: steps.report.needs.0: unknown step 'trian'; did you mean 'train'?"),
        (
            "    uses: pkg.mod:load\n",
            "    uses: pkg.mod:load\n    needs: [report]\n",
            "p.yaml:10: steps.load: the steps wait for one another: load → report → train → load",
        ),
        (
            "    needs: [train]",
            "    need: [train]",
            "p.yaml:23: steps.report.need: unknown field; did you mean 'needs'?",
        ),
        ("name: digits\n", "name: digits\nversion: 2\n", "p.yaml:2: version: unknown field"),
        (
            "max_attempts: 3",
            "max_attempts: three",
            "p.yaml:19: steps.train.retry.max_attempts: Input should be a valid integer, "
            "unable to parse string as an integer",
        ),
        ("needs: [train]", "needs: train", "p.yaml:23: steps.report.needs: Input should be a valid list"),
        (
            "cpus: 2",
            "cpus: -1",
            "p.yaml:20: steps.train.resources.cpus: Input should be greater than or equal to 0",
        ),
        (
            "name: digits",
            "name: my digits",
            "p.yaml:1: name: not a valid name: 'my digits' (letters, digits and underscores, a letter first)",
        ),
        (
            "  report:",
            "  my report:",
            "p.yaml:21: steps.my report: not a valid name: 'my report' "
            "(letters, digits and underscores, a letter first)",
        ),
        (
            "pkg.mod:report",
            "pkg.mod.report",
            "p.yaml:22: steps.report.uses: expected module:function, got 'pkg.mod.report'",
        ),
        (
            "    uses: pkg.mod:report\n",
            "",
            "p.yaml:21: steps.report: needs exactly one of uses, command, notebook, pipeline, approval; it has none",
        ),
        (
            "with: {seed: ",
            "with: {x: '${{ item }}', seed: ",
            "p.yaml:12: steps.load.with.x: item exists only in the arguments of a step with foreach",
        ),
        (
            "default: 7",
            "default: -7",
            "p.yaml:4: parameters.seed: the default -7 does not fit: must be at least 0, got -7",
        ),
        ("name: digits\n", "name: digits\nname: again\n", "p.yaml:2: not readable as YAML: duplicate key 'name'"),
        (
            "    uses: pkg.mod:report\n",
            "    uses: pkg.mod:report\n    uses: pkg.mod:x\n",
            "p.yaml:23: not readable as YAML: duplicate key 'uses'",
        ),
        (
            "needs: [train]",
            "needs: &again [train]\n    with: {x: *again}",
            "p.yaml:24: not readable as YAML: aliases (*name) are not allowed",
        ),
        (
            "Trains.",
            "!!python/object/apply:os.system ['true']",
            "p.yaml:2: not readable as YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("[train]", "[train", "p.yaml:24: not readable as YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_a_problem_is_told_with_line_path_and_reason(old: str, new: str, problem: str) -> None:
    assert GOOD.count(old) == 1
    assert problems(GOOD.replace(old, new)) == [problem]


@pytest.mark.parametrize("text", ["", "   \n", "# only a comment\n", "just text", "- a\n- b\n", "null\n", "7\n"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    assert problems(text) == ["p.yaml:1: expected a mapping with 'name' and 'steps'"]


def test_missing_fields_are_told() -> None:
    assert problems("description: x\n") == [
        "p.yaml:1: name: required, but missing",
        "p.yaml:1: steps: required, but missing",
    ]


def test_a_pipeline_without_steps_is_refused() -> None:
    (problem,) = problems("name: p\nsteps: {}\n")
    assert problem.startswith("p.yaml:2: steps: ")


def test_several_problems_come_on_several_lines() -> None:
    text = "name: p\nsteps:\n  a:\n    uses: m\n    need: [b]\n"
    assert problems(text) == [
        "p.yaml:4: steps.a.uses: expected module:function, got 'm'",
        "p.yaml:5: steps.a.need: unknown field; did you mean 'needs'?",
    ]


def test_a_problem_in_a_list_is_told_with_the_line_of_the_element() -> None:
    text = "name: p\n" + STEPS + "    with:\n      x:\n        - 1\n        - ${{ params.y }}\n"
    assert problems(text) == ["p.yaml:8: steps.a.with.x.1: unknown parameter 'y'; there is none"]


@pytest.mark.parametrize("tag", ["!!python/object:os.system", "!!python/name:os.system", "!mine", "!!python/tuple"])
def test_no_tag_constructs_a_python_object(tag: str) -> None:
    (problem,) = problems(f"name: p\n{STEPS}    with: {{x: {tag} [1]}}\n")
    assert problem.startswith("p.yaml:5: not readable as YAML: could not determine a constructor for the tag")


@pytest.mark.parametrize(
    "text",
    [
        "a: b: c",
        "a: 'open",
        "\tname: p",
        "{",
        "a: [1, 2",
        "%bad\n---\n",
        "? ",
        "a: @b",
        "--- a\n--- b",
        "a: 2020-13-45",
    ],
)
def test_broken_yaml_is_refused(text: str) -> None:
    problems(text)


def test_nesting_without_end_is_refused() -> None:
    problems("name: " + "[" * 50_000)
    problems("name: " + "{a: " * 50_000)


def test_a_bomb_of_aliases_is_refused_before_it_expands() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert problems("\n".join(lines)) == ["p.yaml:2: not readable as YAML: aliases (*name) are not allowed"]


def test_a_text_that_is_too_large_is_refused() -> None:
    filling = GOOD + "#" * (MAX_BYTES - len(GOOD.encode()))
    assert parse_yaml(filling).name == "digits"
    assert problems(filling + "#") == [f"p.yaml: larger than {MAX_BYTES} bytes"]


def test_a_file_is_read_with_its_path_in_the_problems(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(GOOD)
    assert load_file(file).spec.name == "digits"
    file.write_text(GOOD.replace("[train]", "[nobody]"))
    with pytest.raises(InvalidPipeline) as caught:
        load_file(file)
    assert caught.value.message.startswith(f"{file}:23: steps.report.needs.0: unknown step 'nobody'")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for file, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(InvalidPipeline) as caught:
            load_file(file)
        assert caught.value.message == f"{file}: cannot be read: {reason}"


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("name: größe\n".encode("latin-1"))
    with pytest.raises(InvalidPipeline) as caught:
        load_file(file)
    assert caught.value.message == f"{file}: not UTF-8 text"


plain = "ab1:-,'\"#|> \n%.~=_"


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from(plain), max_size=40))
def test_any_text_is_a_pipeline_or_refused(text: str) -> None:
    with suppress(InvalidPipeline):
        parse_yaml(text)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 12), st.text(st.sampled_from(plain), max_size=4))
def test_a_damaged_definition_is_a_pipeline_or_refused_with_its_source(start: int, length: int, patch: str) -> None:
    message = ""
    try:
        parse_yaml(GOOD[:start] + patch + GOOD[start + length :], "p.yaml")
    except InvalidPipeline as error:
        message = error.message
    assert all(line.startswith("p.yaml:") for line in message.splitlines())


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ('    description: "a\\0b"', "steps.a.description"),
        ('    with: {x: ["\\0"]}', "steps.a.with.x.0"),
        ('    with: {"k\\0": 1}', "steps.a.with"),
        ('    command: "x\\0"', "steps.a.command"),
    ],
)
def test_nul_characters_are_refused(line: str, path: str) -> None:
    assert problems(f"name: p\n{STEPS}{line}\n") == [f"p.yaml:5: {path}: may not contain NUL characters"]
