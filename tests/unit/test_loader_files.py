"""Definitions that name other files: what is read in, and where its problems are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.loader import MAX_BYTES, load_file, parse_yaml
from mlplat.pipelines.spec import MAX_DEPTH

OUTER = """\
name: outer
steps:
  first:
    pipeline: parts/inner.yaml
    with: {n: 1}
finally:
  last:
    pipeline: parts/inner.yaml
    with: {n: 2}
"""
INNER = """\
name: inner
parameters:
  n: {type: int}
steps:
  work:
    uses: pkg.mod:work
    with: {n: "${{ params.n }}"}
"""


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder / "outer.yaml"


def problems(path: Path) -> list[str]:
    with pytest.raises(InvalidPipeline) as caught:
        load_file(path)
    return caught.value.message.replace(f"{path.parent}/", "").splitlines()


def test_a_file_is_read_in_relative_to_the_one_that_names_it(tmp_path: Path) -> None:
    deep = INNER.replace("uses: pkg.mod:work", "pipeline: deepest.yaml")
    loaded = load_file(write(tmp_path, outer=OUTER, parts__inner=deep, parts__deepest=INNER))
    first = loaded.spec.steps["first"].pipeline
    assert first is not None
    assert first.steps["work"].pipeline is not None
    assert first.steps["work"].pipeline.name == "inner"
    assert loaded.spec.finally_["last"].pipeline == first
    assert set(loaded.folders.values()) == {tmp_path, tmp_path / "parts"}
    assert loaded.folders["steps", "first", "pipeline"] == tmp_path / "parts"


def test_a_file_inside_an_inline_pipeline(tmp_path: Path) -> None:
    step = "{pipeline: {name: b, steps: {c: {pipeline: parts/inner.yaml, with: {n: 1}}}}}"
    text = f"name: outer\nsteps:\n  a: {step}\n"
    loaded = load_file(write(tmp_path, outer=text, parts__inner=INNER))
    assert loaded.folders["steps", "a", "pipeline", "steps", "c", "pipeline"] == tmp_path / "parts"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "params.n",
            "params.m",
            [
                f"parts/inner.yaml:7: {section}.pipeline.steps.work.with.n: unknown parameter 'm'; there is n"
                for section in ("steps.first", "finally.last")
            ],
        ),
        (
            "    uses:",
            "    usess:",
            [
                f"parts/inner.yaml:6: {section}.pipeline.steps.work.usess: unknown field; did you mean 'uses'?"
                for section in ("steps.first", "finally.last")
            ],
        ),
        (
            "work:\n",
            "work:\n    command: ls\n",
            [
                f"parts/inner.yaml:5: {section}.pipeline.steps.work: needs exactly one of uses, command, notebook, "
                "pipeline, approval; it has uses and command"
                for section in ("steps.first", "finally.last")
            ],
        ),
        ("name: inner", "name: [", ["parts/inner.yaml:3: not readable as YAML: expected ',' or ']', but got ':'"]),
        ("name: inner", "- x", None),
    ],
)
def test_problems_are_told_where_they_are(tmp_path: Path, old: str, new: str, expected: list[str] | None) -> None:
    found = problems(write(tmp_path, outer=OUTER, parts__inner=INNER.replace(old, new)))
    if expected is None:
        assert found[0].startswith("parts/inner.yaml:")
    else:
        assert found == expected


def test_what_a_sub_pipeline_needs_is_told_where_it_is_named(tmp_path: Path) -> None:
    outer = OUTER.replace("    with: {n: 1}\n", "")
    assert problems(write(tmp_path, outer=outer, parts__inner=INNER)) == [
        "outer.yaml:3: steps.first.with: the sub-pipeline's parameter 'n' is required, and has no value"
    ]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert problems(write(tmp_path, outer=OUTER)) == [
        "outer.yaml:4: steps.first.pipeline: parts/inner.yaml: cannot be read: No such file or directory"
    ]


def test_files_that_name_one_another(tmp_path: Path) -> None:
    inner = INNER.replace("uses: pkg.mod:work", "pipeline: ../outer.yaml")
    assert problems(write(tmp_path, outer=OUTER, parts__inner=inner)) == [
        "parts/inner.yaml:6: steps.first.pipeline.steps.work.pipeline: the files name one another: "
        "outer.yaml → inner.yaml → outer.yaml"
    ]


def test_depth_and_size_have_bounds(tmp_path: Path) -> None:
    def file(number: int) -> str:
        step = f"pipeline: f{number + 1}.yaml" if number <= MAX_DEPTH else "uses: m:f"
        return f"name: p\nsteps:\n  a: {{{step}}}\n"

    files = {f"f{number}": file(number) for number in range(MAX_DEPTH + 3)}
    path = write(tmp_path, outer=OUTER, **files).with_name("f0.yaml")
    assert f"sub-pipelines are nested more than {MAX_DEPTH} deep" in problems(path)[0]

    comment = "#" * (MAX_BYTES // 2)
    big = write(tmp_path, outer=OUTER + comment, parts__inner=INNER + comment)
    assert problems(big)[0].endswith(f"all files together are larger than {MAX_BYTES} bytes")


def test_a_text_cannot_name_files() -> None:
    with pytest.raises(InvalidPipeline) as caught:
        parse_yaml(OUTER, "p.yaml")
    assert caught.value.message.splitlines()[0] == (
        "p.yaml:4: steps.first.pipeline: expected a definition; only a YAML file may name another file"
    )


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("cache: {ttl: 3}", "steps.a.cache.ttl: unknown field; did you mean 'ttl_s'?"),
        ("cache: 3.5", "steps.a.cache: Input should be a valid boolean or expected a mapping"),
        ("retry: {max_atempts: 3}", "steps.a.retry.max_atempts: unknown field; did you mean 'max_attempts'?"),
        ("env: {package: [x]}", "steps.a.env.package: unknown field; did you mean 'packages'?"),
        ("resources: {gpu: 1}", "steps.a.resources.gpu: unknown field; did you mean 'gpus'?"),
        ("timeout: 3", "steps.a.timeout: unknown field; did you mean 'timeout_s'?"),
        ("retry: {on: [Connection Error]}", None),
        ("with: {str: {list: [1, 2020-01-01]}}", "steps.a.with.str.list.1: input was not a valid JSON value"),
        ("env: {variables: {1A: x}}", None),
        ("durable: maybe", None),
        ("max_parallel: 3", "steps.a: max_parallel needs foreach"),
        ("command: ls", None),
    ],
)
def test_new_fields_are_checked_with_line_and_path(step: str, problem: str | None) -> None:
    with pytest.raises(InvalidPipeline) as caught:
        parse_yaml(f"name: p\nsteps:\n  a:\n    uses: m:f\n    {step}\n", "p.yaml")
    (line,) = caught.value.message.splitlines()
    assert line.startswith(("p.yaml:5: steps.a.", "p.yaml:3: steps.a: "))
    if problem is not None:
        assert line.endswith(f" {problem}")


def test_on_is_a_name_and_no_boolean() -> None:
    spec = parse_yaml("name: p\nsteps:\n  a: {uses: 'm:f', retry: {on: [OSError]}, with: {yes: 1, off: true}}\n")
    assert spec.steps["a"].retry.on == ["OSError"]
    assert spec.steps["a"].with_ == {"yes": 1, "off": True}
