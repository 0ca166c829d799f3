"""The ``mlplat`` command."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from mlplat import __version__
from mlplat.cli import (
    approvals,
    artifacts,
    backups,
    lifecycle,
    lineage,
    models,
    pipelines,
    schedules,
    storage,
    watch,
    webhooks,
)
from mlplat.cli.becoming import become_cluster
from mlplat.demo.show import run_demo
from mlplat.errors import Overloaded, PlatformError, Unavailable
from mlplat.sdk.client import client_for, default_url
from mlplat.sdk.console import console_text
from mlplat.sdk.leftovers import resend_leftovers, sender_to
from mlplat.settings import Settings

app = typer.Typer(
    help="A self-hosted ML platform on Ray.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
console = Console(highlight=False, soft_wrap=True)
app.add_typer(lifecycle.commands)
app.add_typer(backups.commands)
app.add_typer(pipelines.commands)
app.add_typer(pipelines.definitions, name="pipeline")
models.models.add_typer(approvals.commands)
app.add_typer(models.models, name="models")
app.add_typer(lineage.lineage, name="lineage")
app.add_typer(schedules.schedules, name="schedule")
app.add_typer(schedules.triggers, name="trigger")
app.add_typer(webhooks.webhooks, name="webhooks")
app.add_typer(artifacts.artifacts, name="artifacts")
app.add_typer(storage.storage, name="storage")
app.add_typer(watch.commands)


@app.command("up")
def up_command(
    dashboard: Annotated[bool, typer.Option(help="Run Ray's dashboard, which `ray job submit` needs.")] = True,
) -> None:
    """Start the platform on this machine, or find it running."""
    become_cluster("up", "--dashboard" if dashboard else "--no-dashboard")


@app.command("down")
def down_command() -> None:
    """Stop the platform; its data stays."""
    become_cluster("down")


@app.command("status")
def status_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show every part of the running platform."""
    become_cluster("status", *(["--json"] if as_json else []))


@app.command("env")
def env_command() -> None:
    """Print the exports that other clients need: eval "$(mlplat env)"."""
    become_cluster("env")


@app.command("sync")
def sync_command(
    watch: Annotated[bool, typer.Option(help="Go on until interrupted.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between two looks.")] = 5.0,
    url: Annotated[str | None, typer.Option(help="Send to this platform, whichever the runs were meant for.")] = None,
) -> None:
    """Send what runs could not send while the platform was away, or kept back in offline mode.

    What a process that still runs has kept is its own to send; an offline run's is sent once its process has ended.
    """
    settings = Settings()
    if not watch:
        outcome = sync_once(settings, url)
        _show_sync(outcome)
        raise typer.Exit(1 if outcome.away else 0)
    before = None
    with suppress(KeyboardInterrupt):
        while True:
            outcome = sync_once(settings, url)
            if outcome.sent or outcome != before:  # that nothing has changed is no news
                _show_sync(outcome)
            before = outcome
            time.sleep(every)


@app.command("console")
def console_command(
    run_id: Annotated[str, typer.Argument(help="The run.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print what a run printed."""
    for text in console_text(client_for(default_url()), run_id, follow=follow):
        sys.stdout.write(text)
        sys.stdout.flush()


@app.command("demo")
def demo_command() -> None:
    """Start the platform, train a digit classifier in a pipeline, register it and predict with it."""
    run_demo(console)


@app.command("version")
def version_command() -> None:
    """Print the version."""
    console.print(__version__)


@dataclass(frozen=True)
class Synced:
    """One look at the spool folder: how many files were sent, and why the platform left something over, if it did."""

    folder: Path
    sent: int
    away: str | None


def sync_once(settings: Settings, url: str | None) -> Synced:
    """Sends what dead processes left, and prints what became of each file."""
    sent = 0
    folder = settings.spool_folder
    try:
        for left in resend_leftovers(folder, lambda origin: sender_to(url or origin), max_bytes=settings.spool_bytes):
            sent += 1
            console.print(f"{left.origin.host}:{left.origin.pid} → {url or left.origin.url}: {left.summary}")
            for refusal in left.refusals:
                console.print(f"  run {refusal.run_id}: {refusal.reason}", style="yellow", markup=False)
    except (Unavailable, Overloaded) as error:
        return Synced(folder, sent, str(error))
    return Synced(folder, sent, None)


def _show_sync(outcome: Synced) -> None:
    if outcome.away is not None:
        print(f"mlplat: {outcome.away}", file=sys.stderr)  # noqa: T201
    elif not outcome.sent:
        console.print(f"nothing to send in {outcome.folder}")


def main() -> None:
    """Entry point: a problem is one line on stderr and exit code 1."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `mlplat logs … | head` is no error
    try:
        app()
    except PlatformError as error:
        print(f"mlplat: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except ValidationError as error:
        for item in error.errors():
            name = f"MLPLAT_{'_'.join(str(part) for part in item['loc']).upper()}"
            print(f"mlplat: {name}: {item['msg']}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
