"""Backing up a whole installation, and restoring it."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from mlplat.backup.catalog import find_backups, open_place, pick, place_url, verify
from mlplat.backup.model import Backup, parse_at
from mlplat.backup.tree import plain_errors
from mlplat.cli.becoming import become_cluster
from mlplat.cli.tables import plain_table
from mlplat.errors import InvalidInput
from mlplat.tally import human_bytes, tally

commands = typer.Typer()
console = Console(highlight=False, soft_wrap=True)
_AT = "The last backup until this time, such as 2026-01-31T12:00 (without a zone in this machine's time), or its name."
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@commands.command("backup")
def backup_command(
    target: Annotated[str, typer.Argument(help="Where backups lie: a folder or s3://…")],
    list_: Annotated[bool, typer.Option("--list", help="Only show the backups that are there.")] = False,
    verify_: Annotated[bool, typer.Option("--verify", help="Only read a backup and compare all digests.")] = False,
    at: Annotated[str | None, typer.Option(help=f"With --verify: {_AT}")] = None,
    as_json: _Json = False,
) -> None:
    """Back up the running platform: Postgres, metric points, artifacts (those that the target does not have yet)."""
    if (list_ and verify_) or (at is not None and not verify_):
        raise InvalidInput("--list and --verify are two commands, and --at is for --verify")
    url = place_url(target)
    if list_:
        _list(url, as_json=as_json)
    elif verify_:
        _verify(url, at, as_json=as_json)
    else:
        become_cluster("backup", url, *(["--json"] if as_json else []))


@commands.command("restore")
def restore_command(
    source: Annotated[str, typer.Argument(help="Where backups lie: a folder or s3://…")],
    at: Annotated[str | None, typer.Option(help=_AT)] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave out artifacts whose bytes are damaged in the backup.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Restore a backup, the last one by default, into an empty installation that is down; then mlplat up.

    After a failure run it again: it starts over, and until it is finished mlplat up refuses.
    """
    if at is not None:
        parse_at(at)
    options = [*(["--at", at] if at is not None else []), *(["--skip-damaged"] if skip_damaged else [])]
    become_cluster("restore", place_url(source), *options, *(["--json"] if as_json else []))


def _list(url: str, *, as_json: bool) -> None:
    with plain_errors(url):
        backups = find_backups(open_place(url))
    if as_json:
        print(json.dumps([_row(name, backup) for name, backup in backups.items()], indent=2))  # noqa: T201
        return
    table = plain_table("backup", "state", "schema", "rows", "points", "artifacts", "of its own")
    for name, backup in backups.items():
        if backup is None:
            table.add_row(name, "incomplete")
            continue
        table.add_row(
            name, "complete", backup.schema, f"{backup.rows:,}", f"{backup.points:,}",
            f"{backup.artifacts:,} ({human_bytes(backup.artifact_bytes)})",
            human_bytes(backup.dump_bytes + backup.copied_bytes),
        )  # fmt: skip
    console.print(table)


def _row(name: str, backup: Backup | None) -> dict[str, Any]:
    return {"name": name, "complete": backup is not None, **({} if backup is None else backup.summary)}


def _verify(url: str, at: str | None, *, as_json: bool) -> None:
    place = open_place(url)
    with plain_errors(url), tally(Console(stderr=True)) as show:
        backup = pick(place, None if at is None else parse_at(at))
        problems = verify(place, backup, show)
    if as_json:
        print(json.dumps({"name": backup.name, "problems": problems}, indent=2))  # noqa: T201
    for problem in [] if as_json else problems:
        print(f"mlplat: {problem}", file=sys.stderr)  # noqa: T201
    if problems:
        raise typer.Exit(1)
    if not as_json:
        console.print(f"backup {backup.name} is sound: {backup.artifacts:,} artifacts, {len(backup.files)} dump files")
