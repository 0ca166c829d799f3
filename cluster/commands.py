"""The commands that look at a platform: status, env. ``python -P -m cluster`` prepares their environment."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import traceback
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster import inspection
from mlplat.errors import PlatformError
from mlplat.settings import Settings

app = typer.Typer(name="mlplat", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show every part of the running platform."""
    rows = inspection.status(Settings())
    if as_json:
        print(json.dumps(rows, indent=2))  # noqa: T201
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, justify="right" if column in {"pid", "restarts"} else "left")
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    console.print(table)


@app.command()
def env() -> None:
    """Print the exports that `ray job submit` and other clients need: eval "$(mlplat env)"."""
    for name, value in inspection.environment(Settings()).items():
        print(f"export {name}={shlex.quote(value)}")  # noqa: T201


def _exit(code: int) -> None:
    """Not sys.exit: a half-connected Ray would print its own farewell."""
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    """Runs a command; a problem is one line on stderr and exit code 1."""
    for library in ("ray.serve", "clickhouse_connect"):  # what they would say comes back as an error
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app()
    except PlatformError as error:
        print(f"mlplat: {error}", file=sys.stderr)  # noqa: T201
        _exit(1)
    except Exception as error:  # a defect of ours or of Ray: the details go to a file, the user gets a line
        log = Settings().state_dir / "bringup-error.log"
        log.write_text(traceback.format_exc())
        first_line = (str(error).strip().splitlines() or [""])[0]
        print(f"mlplat: unexpected {type(error).__name__}: {first_line} (details: {log})", file=sys.stderr)  # noqa: T201
        _exit(1)


if __name__ == "__main__":
    main()
