"""``mlplat watch`` and ``mlplat logs``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from mlplat.progress import follow
from mlplat.sdk.client import client_for, default_url
from mlplat.sdk.pipeline_runs import PipelineRunHandle

INTERRUPTED = 130
commands = typer.Typer()
console = Console(highlight=False, soft_wrap=True)


@commands.command("watch")
def watch_command(run_id: Annotated[str, typer.Argument(help="The pipeline run.")]) -> None:
    """Follow a run: its steps, their progress and last words. The exit code says how it ended: 0 succeeded, 1 not.

    Ctrl-C ends the watching; the run goes on.
    """
    watch_to_end(PipelineRunHandle(client_for(default_url()), run_id), console)


@commands.command("logs")
def logs_command(
    run_id: Annotated[str, typer.Argument(help="The pipeline run.")],
    step: Annotated[str | None, typer.Option(help="One step only.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Attempts with this number only.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print what the attempts of a run printed, those that are over first."""
    handle = PipelineRunHandle(client_for(default_url()), run_id)
    try:
        for text in handle.log_parts(step, attempt, follow=follow):
            sys.stdout.write(text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def watch_to_end(handle: PipelineRunHandle, out: Console) -> dict[str, Any]:
    """Shows a run to its end and returns its last status.

    Raises:
        typer.Exit: with 1 when the run did not succeed, with 130 after Ctrl-C.
    """
    try:
        final = follow(out, handle.events(logs="all"))
    except KeyboardInterrupt:
        out.print(f"\nno longer watching; the run goes on: mlplat watch {handle.run_id}", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    if final["state"] != "SUCCEEDED":
        print(f"mlplat: {final['error']}\nsee: mlplat logs {handle.run_id}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1)
    out.print(f"{handle.run_id} succeeded", style="green", markup=False)
    return final
