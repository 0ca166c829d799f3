"""The commands that back an installation up and restore it, beside those of ``cluster.commands``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from cluster import backing_up, restoring
from cluster.commands import app, console, main
from mlplat.backup.model import parse_at
from mlplat.settings import Settings
from mlplat.tally import human_bytes, tally

_progress = Console(stderr=True)
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def backup(target: str, as_json: _Json = False) -> None:
    """Back up the running platform into ``target``, a URL."""
    with tally(_progress) as show:
        made = backing_up.back_up(Settings(), target, show)
    if as_json:
        print(json.dumps(made.summary, indent=2))  # noqa: T201
        return
    console.print(
        f"backup {made.name}: {made.rows:,} rows, {made.points:,} points, {made.artifacts:,} artifacts "
        f"({human_bytes(made.artifact_bytes)}); new here: {human_bytes(made.dump_bytes + made.copied_bytes)}"
    )


@app.command()
def restore(
    source: str,
    at: Annotated[str | None, typer.Option()] = None,
    skip_damaged: Annotated[bool, typer.Option("--skip-damaged")] = False,
    as_json: _Json = False,
) -> None:
    """Restore a backup from ``source``, a URL, into an empty installation that is down."""
    moment = None if at is None else parse_at(at)
    with tally(_progress) as show:
        made, left_out = restoring.restore(Settings(), source, moment, skip_damaged=skip_damaged, tally=show)
    for problem in left_out:
        print(f"mlplat: left out: {problem}", file=sys.stderr)  # noqa: T201
    if as_json:
        print(json.dumps({**made.summary, "left_out": left_out}, indent=2))  # noqa: T201
        return
    console.print(
        f"restored backup {made.name}: {made.rows:,} rows, {made.points:,} points, "
        f"{made.artifacts - len(left_out):,} artifacts. Start the platform with: mlplat up"
    )


if __name__ == "__main__":
    main()
