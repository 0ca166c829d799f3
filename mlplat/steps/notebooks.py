"""Steps that are notebooks: executed with the step's arguments, and kept with what they showed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput

#: The cell with this tag holds defaults; arguments are set in a new cell after it.
PARAMETERS_TAG = "parameters"
#: From this minor version of the format on, cells have ids; before it they may not.
FIRST_WITH_IDS = 5
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class NotebookFailed(Exception):
    """A cell of the notebook raised."""


def run_notebook(target: str, arguments: Mapping[str, Any], artifacts: ArtifactStore, folder: str) -> Any:
    """Executes the notebook ``blob:<digest>:<name>`` and stores the result in the artifact store.

    Arguments become variables, in a cell after the one tagged ``parameters``, or first. The step's output is
    ``{"notebook": path}`` with the path of the executed notebook.

    Raises:
        InvalidInput: nbclient is not installed where steps run, or an argument is not JSON.
        NotebookFailed: a cell raised; the notebook is kept up to there.
    """
    try:
        import nbformat  # noqa: PLC0415 - optional: mlplat[notebooks]
        from nbclient import NotebookClient  # noqa: PLC0415
        from nbclient.exceptions import CellExecutionError  # noqa: PLC0415
    except ImportError as error:
        raise InvalidInput("notebook steps need nbclient where they run: pip install 'mlplat[notebooks]'") from error
    _blob, digest, name = target.split(":", 2)
    notebook = nbformat.reads(artifacts.get_blob(digest).decode(), as_version=4)
    _insert_parameters(notebook, nbformat.v4.new_code_cell(_assignments(arguments)))
    path = f"{folder}/{name}"
    try:
        NotebookClient(notebook, kernel_name="python3").execute()
    except CellExecutionError as error:
        traceback = _COLOURS.sub("", error.traceback)
        raise NotebookFailed(f"{name}: {error.ename}: {error.evalue}\n{traceback}") from error
    finally:
        artifacts.write(path, [nbformat.writes(notebook).encode()])
    return {"notebook": path}


def _insert_parameters(notebook: Any, cell: Any) -> None:
    cell.metadata["tags"] = ["injected-parameters"]
    if notebook.nbformat_minor < FIRST_WITH_IDS:
        del cell["id"]
    tagged = [index for index, other in enumerate(notebook.cells) if PARAMETERS_TAG in other.metadata.get("tags", [])]
    notebook.cells.insert(tagged[0] + 1 if tagged else 0, cell)


def _assignments(arguments: Mapping[str, Any]) -> str:
    try:
        values = {name: json.loads(json.dumps(value, allow_nan=False)) for name, value in arguments.items()}
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"a notebook takes arguments that are JSON: {error}") from error
    return "\n".join(f"{name} = {value!r}" for name, value in values.items())
