"""Expressions: what they read, and what they become."""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlplat.errors import InvalidInput
from mlplat.pipelines.expressions import OutputRef, find_expressions, references, render, render_command

FRAME = OutputRef("d" * 64, "DataFrame")
SCOPE: dict[str, Any] = {
    "params": {"n": 3, "rate": 0.5, "name": "digits", "on": True},
    "steps": {"load": {"output": {"rows": [{"x": 1}, {"x": 2}], "none": None}}, "frame": {"output": FRAME}},
    "item": ["a", "b"],
}


@pytest.mark.parametrize(
    ("expression", "paths"),
    [
        ("params.n", {("params", "n")}),
        ("steps.load.output", {("steps", "load", "output")}),
        ("steps.load.output.rows[0].x", {("steps", "load", "output", "rows")}),
        ("steps.load.output[0].name", {("steps", "load", "output")}),
        ("steps.load.output[*].name", {("steps", "load", "output")}),
        ("steps.load.output[].name", {("steps", "load", "output")}),
        ("steps.load.output[?x > `1`].y", {("steps", "load", "output")}),
        ("steps.load.output | [0].params", {("steps", "load", "output")}),
        ("item", {("item",)}),
        ("item.key", {("item", "key")}),
        ("length(steps.load.output)", {("steps", "load", "output")}),
        ("sort_by(steps.load.output, &x)", {("steps", "load", "output")}),
        ("params.n || steps.load.output", {("params", "n"), ("steps", "load", "output")}),
        ("params.n && !(params.on)", {("params", "n"), ("params", "on")}),
        ("params.n == `3`", {("params", "n")}),
        ("[params.n, steps.load.output]", {("params", "n"), ("steps", "load", "output")}),
        ("{a: params.n, b: params.rate}", {("params", "n"), ("params", "rate")}),
        ("join('-', [params.name, 'x'])", {("params", "name")}),
        ('params."n"', {("params", "n")}),
        ("steps.load.state == 'SKIPPED'", {("steps", "load", "state")}),
        ("run.id", {("run", "id")}),
        ("steps.load.[output, state]", {("steps", "load", "output"), ("steps", "load", "state")}),
        ("`[1, 2]`", set()),
        ("'text'", set()),
    ],
)
def test_references_are_the_paths_that_start_at_the_root(expression: str, paths: set[tuple[str, ...]]) -> None:
    assert references(expression) == paths


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "not an expression: ''"),
        ("params.", "not an expression"),
        ("params.n +", "not an expression"),
        ("os.system", "'os.system' refers to os.system"),
        ("seed", "'seed' refers to seed"),
        ("params", "name the parameter"),
        ("params[0]", "name the parameter"),
        ("params.*", "name the parameter"),
        ("keys(params)", "name the parameter"),
        ("steps", "name a step's output"),
        ("steps.load", "name a step's output"),
        ("steps.load.error", "name a step's output"),
        ("steps.*.output", "name a step's output"),
    ],
)
def test_what_cannot_be_read_is_refused(expression: str, reason: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        references(expression)
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


def test_expressions_are_found_with_their_paths() -> None:
    value = {"a": "${{ params.n }}", "b": ["x", "${{params.rate}} and ${{ item }}"], "c": 1, "d": None}
    assert list(find_expressions(value)) == [
        (("a",), "params.n"),
        (("b", 1), "params.rate"),
        (("b", 1), "item"),
    ]


@pytest.mark.parametrize("text", ["plain", "$params.n", "${params.n}", "{{ params.n }}", "${{ open", ""])
def test_other_texts_are_no_expressions(text: str) -> None:
    assert list(find_expressions(text)) == []
    assert render(text, SCOPE) == text


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("${{ params.n }}", 3),
        ("  ${{params.rate}}\n", 0.5),
        ("${{ params.on }}", True),
        ("${{ params.name }}", "digits"),
        ("${{ params.missing }}", None),
        ("${{ steps.load.output.rows[*].x }}", [1, 2]),
        ("${{ item[1] }}", "b"),
        ("${{\n  params.n\n}}", 3),
    ],
)
def test_one_expression_becomes_its_value(template: str, value: object) -> None:
    rendered = render(template, SCOPE)
    assert rendered == value
    assert type(rendered) is type(value)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("n=${{ params.n }}", "n=3"),
        ("${{ params.name }}.csv", "digits.csv"),
        ("run ${{ params.name }} with ${{ params.n }}.", "run digits with 3."),
        ("on: ${{ params.on }}", "on: true"),
        ("none: ${{ params.missing }}", "none: null"),
        ("rows: ${{ steps.load.output.rows }}", 'rows: [{"x": 1}, {"x": 2}]'),
    ],
)
def test_expressions_inside_a_text_are_spliced_in(template: str, text: str) -> None:
    assert render(template, SCOPE) == text


def test_containers_are_rendered_throughout_and_the_rest_is_kept() -> None:
    template = {"a": ["${{ params.n }}", {"b": "${{ item }}"}], "c": 1.5, "d": None, "e": True}
    assert render(template, SCOPE) == {"a": [3, {"b": ["a", "b"]}], "c": 1.5, "d": None, "e": True}


def test_what_a_value_contains_is_not_rendered_again() -> None:
    assert render("${{ params.x }}", {"params": {"x": "${{ params.x }}"}}) == "${{ params.x }}"
    assert render("got ${{ params.x }}", {"params": {"x": "${{ params.x }}"}}) == "got ${{ params.x }}"


@pytest.mark.parametrize("template", ["${{ length(params.n) }}", "x ${{ length(params.n) }}", "${{ nothing(`1`) }}"])
def test_an_expression_that_fails_says_which(template: str) -> None:
    with pytest.raises(InvalidInput, match="failed"):
        render(template, SCOPE)


def test_a_pickled_output_is_passed_on_whole() -> None:
    assert render("${{ steps.frame.output }}", SCOPE) is FRAME
    assert render({"x": ["${{ [steps.frame.output] }}"]}, SCOPE) == {"x": [[FRAME]]}


def test_a_pickled_output_cannot_be_taken_apart() -> None:
    with pytest.raises(InvalidInput, match="cannot look for 'shape' inside a DataFrame"):
        render("${{ steps.frame.output.shape }}", SCOPE)


def test_a_pickled_output_cannot_be_part_of_a_text() -> None:
    with pytest.raises(InvalidInput, match="a DataFrame cannot be part of a text"):
        render("frame: ${{ steps.frame.output }}", SCOPE)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    try:
        paths = references(text)
    except InvalidInput:
        return
    assert all(path[0] in {"params", "steps", "item", "run"} for path in paths)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(json_values)
def test_a_value_without_expressions_renders_to_itself(value: Any) -> None:
    if not list(find_expressions(value)):
        assert render(value, SCOPE) == value


@settings(deadline=None, max_examples=100)
@given(json_values)
def test_a_parameter_arrives_unchanged(value: Any) -> None:
    assert render("${{ params.x }}", {"params": {"x": value}}) == value


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("x[?n > `1`]", [{"n": "text"}]),
        ("max_by(x, &n)", [{"n": 1}, {"n": "text"}]),
        ("x[::0]", [1]),
        ("floor(x)", float("inf")),
        ("avg(x)", [10**400, 1.5]),
        ("merge(x, `{}`)", None),
        ("contains(x, `1`)", "text"),
    ],
)
def test_values_that_an_expression_cannot_take_are_told(expression: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match="failed"):
        render(f"${{{{ {expression.replace('x', 'item', 1)} }}}}", {"item": value})


# -- shell commands --------------------------------------------------------------------------------

X = "${{ params.x }}"
COMMANDS = {
    f"printf %s {X}": "{}",
    f'printf %s "{X}"': "{}",
    f"printf %s '{X}'": "{}",
    f"printf %s a{X}b": "a{}b",
    f'printf %s "a {X} b"': "a {} b",
    f"printf %s 'a # {X} b'": "a # {} b",
    f"printf %s 'a\\' {X}": "a\\{}",
    f'printf %s \\"{X}': '"{}',
    f'printf %s "$(printf %s {X}.)"': "{}.",
    f'printf %s "$(printf %s "{X}.")"': "{}.",
    f"(printf %s {X})": "{}",
    f"f() {{ printf %s {X}; }}; f": "{}",
    f"case x in x) printf %s {X};; esac": "{}",
    f"# don't {X}\nprintf %s {X}": "{}",
    f"sh -c 'printf %s \"$1\"' x {X}": "{}",
    f"x='it'\"'\"'s'; printf %s {X}": "{}",
    f"printf %s%s {X} '{X}'": "{}{}",
}
NASTY = [
    "plain", "two  words", "", "*", "$HOME", "${x}", "a\nb\n", "\\", "'", '"', "-n", "ü", "# x", "$(touch pwned)",
    "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "$(touch pwned", "'\"$(touch pwned)",
    "\n; touch pwned\n",
]  # fmt: skip


def _sh(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["/bin/sh", "-ec", command], cwd=folder, capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shell_command_gets_values_as_they_are(command: str, tmp_path: Path) -> None:
    for value in NASTY:
        wanted = COMMANDS[command].replace("{}", value)
        assert _sh(render_command(command, {"params": {"x": value}}), tmp_path) == wanted
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [v for v in NASTY if "touch" in v])
@pytest.mark.parametrize(
    "command",
    [
        f"cat <<EOF\n{X}\nEOF",
        f"cat <<'EOF'\nit's {X}\nEOF",
        f"echo $(( 1 + 1 )) {X} )",
        f"echo `echo '{X}'`",
        f"echo \\{X}",
    ],
)
def test_no_value_becomes_code_in_odd_syntax(command: str, value: str, tmp_path: Path) -> None:
    rendered = render_command(command, {"params": {"x": value}})
    subprocess.run(["/bin/sh", "-c", rendered], cwd=tmp_path, capture_output=True, timeout=20, check=False)
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from(["'", '"', "\\", "$(", ")", "(", " ", "#", "\n", "a", X, "`", ";", "echo "]), max_size=12)
)
def test_no_value_becomes_code_in_any_command(parts: list[str]) -> None:
    with TemporaryDirectory() as folder:
        rendered = render_command("".join(parts), {"params": {"x": "$(touch pwned)`touch pwned`;touch pwned;'\"\n"}})
        subprocess.run(["/bin/sh", "-c", rendered], cwd=folder, capture_output=True, timeout=20, check=False)
        assert list(Path(folder).iterdir()) == []


def test_values_that_are_no_text_are_json_in_a_command() -> None:
    command = render_command("printf '%s ' ${{ params.n }} ${{ params.on }} ${{ item }}", SCOPE)
    assert _sh(command, Path("/")) == '3 true ["a", "b"] '
    with pytest.raises(InvalidInput, match="a DataFrame cannot be part of a text"):
        render_command("cat ${{ steps.frame.output }}", SCOPE)


def test_a_command_without_expressions_stays_as_it_is() -> None:
    assert render_command("echo '$x' \"${y}\" # z", {}) == "echo '$x' \"${y}\" # z"
