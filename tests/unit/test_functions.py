"""From a name to a function, where steps run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput
from mlplat.steps.calls import takes_context
from mlplat.steps.failures import user_traceback
from mlplat.steps.functions import check_arguments, import_function, load_function, try_imports


def test_a_function_is_found_by_its_name() -> None:
    assert import_function("json:dumps") is json.dumps
    assert import_function("pathlib:Path.cwd")() == Path.cwd()


@pytest.mark.parametrize(
    ("uses", "reason"),
    [
        ("no_such_module_here:f", "cannot import 'no_such_module_here': ModuleNotFoundError"),
        ("json:nobody", "module 'json' has no function 'nobody'"),
        ("json:dumps.nobody", "has no function 'dumps.nobody'"),
        ("string:digits", "is a str, not a function"),
    ],
)
def test_what_is_no_function_is_told(uses: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        import_function(uses)


def test_a_shipped_function_is_unpickled(tmp_path: Path) -> None:
    artifacts = ArtifactStore(f"file://{tmp_path}")
    digest = artifacts.put_blob(cloudpickle.dumps(lambda x: x + 1))
    assert load_function(f"pickle:{digest}:m.f", artifacts)(2) == 3


def test_imports_are_reported_with_their_code() -> None:
    report = try_imports(["json:dumps", "json:loads", "time:sleep", "no_such_module_here:f"])
    assert set(report.problems) == {"no_such_module_here:f"}
    assert report.code["json:dumps"] == report.code["json:loads"]
    assert report.code["json:dumps"] == hashlib.sha256(Path(json.__file__).read_bytes()).hexdigest()
    assert report.code["time:sleep"] != report.code["json:dumps"]  # without a file: by its name


def test_arguments_that_do_not_fit_are_told() -> None:
    def function(a: int, b: int = 1) -> None: ...

    check_arguments(function, {"a": 1}, "m:f")
    check_arguments(function, {"a": 1, "b": 2}, "m:f")
    bad: list[dict[str, Any]] = [{}, {"b": 1}, {"a": 1, "c": 2}]
    for arguments in bad:
        with pytest.raises(InvalidInput, match=r"m:f cannot be called with"):
            check_arguments(function, arguments, "m:f")


def test_only_a_function_that_asks_for_it_gets_the_context() -> None:
    assert takes_context(lambda ctx: None)
    assert not takes_context(lambda **more: None)
    assert not takes_context(dict)


def test_a_traceback_begins_with_the_users_line() -> None:
    try:
        check_arguments(None, {}, "m:f")  # type: ignore[arg-type]  # on purpose
        json.loads("{")
    except ValueError as error:
        text = user_traceback(error)
    assert "test_functions.py" in text.splitlines()[1]
    assert "mlplat/execution" not in text
