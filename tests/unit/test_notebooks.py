"""Steps that are notebooks: what their cells get, and what is kept of them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput, NotFound
from mlplat.pipelines.expressions import OutputRef
from mlplat.pipelines.model import AttemptRequest
from mlplat.steps.calls import call_step
from mlplat.steps.notebooks import NotebookFailed, run_notebook
from tests.platform import eventually

#: JSON of all kinds, and texts that look like code or like the end of a text.
VALUES: dict[str, Any] = {
    "nothing": None, "yes": True, "no": False, "zero": 0, "huge": 2**70, "tiny": 5e-324, "minus": -0.0, "empty": "",
    "quotes": "'\"\\'''\"\"\"", "lines": "a\nb\r\n\tc\x00", "code": "__import__('os')._exit(1) # {x} %s",
    "words": "ü€🧪\u2028", "half": "\ud800", "numbers": [1, 2.5, [], [[]]], "rate": 0.5,
    "nested": {"a b": {"'": [None, {"": False}]}},
}  # fmt: skip


def notebook_of(*cells: dict[str, Any]) -> bytes:
    """A notebook of the format that most have: its cells have no ids."""
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}).encode()


def code(source: str, *tags: str) -> dict[str, Any]:
    metadata = {"tags": list(tags)} if tags else {}
    return {"cell_type": "code", "metadata": metadata, "outputs": [], "execution_count": None, "source": source}


FAILING = notebook_of(
    {"cell_type": "markdown", "metadata": {}, "source": "# Parameters"},
    code("rate, other = 0.1, 'default'", "parameters"),
    code(f"import json\nprint(json.dumps([{', '.join(VALUES)}]), other)"),
    code("def fail():\n    1 / 0\nfail()"),
    code("print('not reached')"),
)


@dataclass(frozen=True)
class Failed:
    """What is left of a notebook that failed."""

    store: ArtifactStore
    error: NotebookFailed
    processes: list[psutil.Process]

    @property
    def folder(self) -> str:
        return "pipelines/run/notebooks/explore/7/2"

    @property
    def kept(self) -> Any:
        return nbformat.reads(b"".join(self.store.read(f"{self.folder}/explore.ipynb")).decode(), as_version=4)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Failed:
    """One notebook, executed as the second attempt of a fan-out's item."""
    store = ArtifactStore(f"file://{tmp_path_factory.mktemp('notebooks')}")
    target = f"blob:{store.put_blob(FAILING)}:explore.ipynb"
    before = set(psutil.Process().children(recursive=True))
    request = AttemptRequest("p", "run", "explore", 7, 2, "notebook", target, VALUES, max_attempts=2)
    with pytest.raises(NotebookFailed) as caught:
        call_step(request, store, None)
    return Failed(store, caught.value, [p for p in psutil.Process().children(recursive=True) if p not in before])


def test_arguments_replace_the_defaults_and_arrive_as_they_are(failed: Failed) -> None:
    kinds = [(cell.cell_type, cell.metadata.get("tags", [])) for cell in failed.kept.cells]
    assert kinds[1:4] == [("code", ["parameters"]), ("code", ["injected-parameters"]), ("code", [])]
    [output] = failed.kept.cells[3].outputs
    shown, _space, other = output.text.rstrip().rpartition(" ")
    assert (json.loads(shown), other) == (list(VALUES.values()), "default")
    assert math.copysign(1, json.loads(shown)[list(VALUES).index("minus")]) == -1


def test_a_failure_names_the_notebook_and_keeps_what_it_showed(failed: Failed) -> None:
    assert str(failed.error).startswith("explore.ipynb: ZeroDivisionError: division by zero\n")
    assert "in fail()" in str(failed.error)
    [output] = failed.kept.cells[4].outputs
    assert (output.output_type, output.ename) == ("error", "ZeroDivisionError")
    assert (failed.kept.cells[5].outputs, failed.kept.cells[5].execution_count) == ([], None)


def test_what_is_kept_is_a_valid_notebook(failed: Failed) -> None:
    nbformat.validate(failed.kept)


def test_the_kernel_ends_with_its_notebook(failed: Failed) -> None:
    eventually(lambda: not any(process.is_running() for process in failed.processes), 60)


def never_run(tmp_path: Path, **arguments: Any) -> Callable[[], Any]:
    """A call with arguments that no kernel may see."""
    store = ArtifactStore(f"file://{tmp_path}")
    target = f"blob:{store.put_blob(notebook_of(code('1')))}:explore.ipynb"
    return lambda: run_notebook(target, arguments, store, "folder")


@pytest.mark.parametrize(
    "value", [OutputRef("d", "Model"), {1, 2}, b"bytes", math.nan, [math.inf], {"a": -math.inf}, {(1, 2): 3}]
)
def test_arguments_that_are_no_json_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a notebook takes arguments that are JSON"):
        never_run(tmp_path, x=value)()
    assert ArtifactStore(f"file://{tmp_path}").list("folder") == []


def test_a_notebook_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="No such blob"):
        run_notebook(f"blob:{'0' * 64}:explore.ipynb", {}, ArtifactStore(f"file://{tmp_path}"), "folder")


@pytest.mark.parametrize("missing", ["nbclient", "nbformat"])
def test_without_what_runs_notebooks_it_is_told_what_to_install(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InvalidInput, match=r"pip install 'mlplat\[notebooks\]'"):
        never_run(tmp_path)()
