"""What started this code: a script, a module, a notebook or a step of a pipeline."""

from __future__ import annotations

import getpass
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlplat.sdk.capture.redact import redact_arguments
from mlplat.sdk.context import current_step
from mlplat.settings import notebook_path

MAX_COMMAND = 8_000


@dataclass(frozen=True)
class EntryPoint:
    """``kind`` is MLflow's: NOTEBOOK, JOB or LOCAL. ``folder`` is where the code lies."""

    name: str
    kind: str
    folder: Path

    def tags(self) -> dict[str, str]:
        """MLflow's tags."""
        return {"mlflow.source.name": self.name, "mlflow.source.type": self.kind, "mlflow.user": user()}


def entry_point() -> EntryPoint:
    """What started this code."""
    folder = Path.cwd()
    step = current_step()
    if step is not None:
        return EntryPoint(f"{step.pipeline}/{step.step}", "JOB", folder)
    notebook = _notebook()
    if notebook is not None:
        return EntryPoint(notebook, "NOTEBOOK", folder)
    # `python -m package.module` and scripts have a file; `python -c` and a prompt have none.
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is None:
        return EntryPoint(Path(sys.executable).name, "LOCAL", folder)
    file = Path(main).resolve()
    return EntryPoint(str(main), "LOCAL", file.parent if file.is_file() else folder)


def command() -> str:
    """The command line of this process as a shell would take it, without secrets, cut if very long."""
    return shlex.join(redact_arguments(sys.orig_argv))[:MAX_COMMAND]


def user() -> str:
    """Who runs this; a user without a name goes by none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def _notebook() -> str | None:
    """The notebook's path, or ``notebook`` where its editor keeps that to itself; None outside of notebooks."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    # VS Code leaves the path in the notebook's own names, Jupyter's server in the environment.
    path = shell.user_ns.get("__vsc_ipynb_file__") or notebook_path()
    return str(path) if path else "notebook"
