"""The commands that start and stop a platform: up, down; beside those of ``cluster.commands``."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster import bringup, teardown
from cluster.commands import app, console, main
from mlplat.settings import Settings


@app.command()
def up(
    dashboard: Annotated[bool, typer.Option(help="Run Ray's dashboard, which `ray job submit` needs.")] = True,
) -> None:
    """Start the platform, or find it running."""
    settings = Settings()
    record = bringup.up(settings, dashboard=dashboard, say=_say)
    console.print(f"mlplat is up: {record.http_url}")
    if record.dashboard_url:
        console.print(f"Ray dashboard: {record.dashboard_url}")
    console.print(f"state: {settings.state_dir}   stop with: mlplat down")


@app.command()
def down() -> None:
    """Stop the platform; its data stays."""
    stopped = teardown.down(Settings(), say=_say)
    console.print("mlplat is down; the data stays in the state folder" if stopped else "mlplat was not running")


def _say(message: str) -> None:
    console.print(f"[dim]{message} …[/dim]")


if __name__ == "__main__":
    main()
